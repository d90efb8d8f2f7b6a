"""``save_pretrained``: the same format again, from which `revert` gives back the AWQ tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from awq2marlin import inspect, revert, verify
from awq2marlin.errors import CheckpointError, DifferenceError
from tests.integrations.transformers.checkpoints import Format, read_tensors
from tests.integrations.transformers.conftest import Case

MakeCase = Callable[..., Case]

CASES = [
    ("llama", "keep", Format()),
    ("llama", "keep", Format(bits=8, group_size=-1, zero_point=False)),
    ("unaligned", "keep", Format(shards=2)),
    ("unaligned", "pad", Format()),
    ("qwen2 tied", "keep", Format()),
    ("mixtral", "keep", Format()),
    ("qwen2 moe", "keep", Format()),
]


def quantization_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return document


def assert_same_tensors(found: Path, expected: Path) -> None:
    found_tensors, expected_tensors = read_tensors(found), read_tensors(expected)
    assert sorted(found_tensors) == sorted(expected_tensors)
    for name, tensor in expected_tensors.items():
        assert found_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(found_tensors[name], tensor), name


@pytest.mark.parametrize(("architecture", "unaligned", "form"), CASES)
def test_saves_the_same_checkpoint_and_revert_gives_the_awq_tensors(
    make_case: MakeCase, tmp_path: Path, architecture: str, unaligned: str, form: Format
) -> None:
    case = make_case(architecture, form, unaligned)
    case.load().save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert_same_tensors(tmp_path / "saved", case.marlin)
    assert quantization_of(tmp_path / "saved") == quantization_of(case.marlin)
    assert inspect(tmp_path / "saved").format == "marlin_native"

    compared = verify(case.awq, tmp_path / "saved")
    assert compared.modules_total == sum(each.layout == "marlin" for each in inspect(case.marlin).modules)
    assert compared.files == 0

    result = revert(tmp_path / "saved", tmp_path / "awq")
    assert result.restores == "tensors"
    assert_same_tensors(tmp_path / "awq", case.awq)
    assert inspect(tmp_path / "awq").format == "awq"
    assert quantization_of(tmp_path / "awq") == quantization_of(case.awq)
    assert (tmp_path / "awq" / "generation_config.json").exists()


def test_loads_what_it_saved(make_case: MakeCase, tmp_path: Path, prompt: torch.Tensor) -> None:
    model = make_case("unaligned").load()
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    with torch.no_grad():
        assert torch.equal(again(prompt).logits, model(prompt).logits)
    again.save_pretrained(tmp_path / "twice")
    assert_same_tensors(tmp_path / "twice", tmp_path / "once")


def test_a_model_whose_layers_lie_on_the_disk_is_saved_too(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("unaligned")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = case.load(device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tmp_path / "saved", case.marlin)


def test_a_model_of_another_type_is_saved_in_it(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("unaligned")
    case.load(dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    scales = read_tensors(tmp_path / "saved")["model.layers.0.self_attn.q_proj.scales"]
    assert scales.dtype == torch.bfloat16
    assert torch.equal(scales, read_tensors(case.awq)["model.layers.0.self_attn.q_proj.scales"].bfloat16())
    revert(tmp_path / "saved", tmp_path / "awq")
    assert read_tensors(tmp_path / "awq")["model.layers.0.mlp.up_proj.scales"].dtype == torch.bfloat16
    with pytest.raises(DifferenceError, match=r"expected F16 .*, found BF16"):
        verify(case.awq, tmp_path / "saved")


def test_the_base_model_is_saved_under_its_own_names(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("unaligned", unaligned="pad")
    base = case.load().model
    whole = type(base).from_pretrained(case.marlin)
    whole.save_pretrained(tmp_path / "saved")
    names = set(quantization_of(tmp_path / "saved")["padded_modules"])
    assert names <= {name.removesuffix(".qweight") for name in read_tensors(tmp_path / "saved")}
    revert(tmp_path / "saved", tmp_path / "awq")
    awq, expected = read_tensors(tmp_path / "awq"), read_tensors(case.awq)
    assert all(torch.equal(tensor, expected[f"model.{name.removeprefix('model.')}"]) for name, tensor in awq.items())


def test_other_names_than_those_of_the_file_are_refused(make_case: MakeCase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_original_format=False is not supported"):
        make_case("llama").load().save_pretrained(tmp_path / "saved", save_original_format=False)
    assert not (tmp_path / "saved").exists()


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Collects what models are told to push, to which repository and how."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def push(self: Any, repo_id: str, **options: Any) -> None:  # noqa: ARG001
        calls.append((repo_id, options))

    monkeypatch.setattr(PreTrainedModel, "push_to_hub", push)
    return calls


def test_pushing_happens_once_the_manifest_is_there(
    make_case: MakeCase, tmp_path: Path, pushed: list[tuple[str, dict[str, Any]]]
) -> None:
    options = {"commit_message": "it", "revision": "branch", "private": True}
    make_case("llama").load().save_pretrained(
        tmp_path / "saved", push_to_hub=True, repo_id="me/it", max_shard_size="100KB", **options
    )
    assert (tmp_path / "saved" / "marlin_manifest.json").exists()
    assert pushed == [("me/it", {"max_shard_size": "100KB", **options})]


def test_only_the_main_process_completes_and_pushes(
    make_case: MakeCase, tmp_path: Path, pushed: list[tuple[str, dict[str, Any]]]
) -> None:
    make_case("llama").load().save_pretrained(tmp_path / "saved", is_main_process=False, push_to_hub=True)
    assert not (tmp_path / "saved" / "marlin_manifest.json").exists()
    assert not pushed


def test_what_is_pushed_holds_the_manifest(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers saves to a folder of its own, which is gone afterwards, and uploads it."""
    model = make_case("unaligned").load()

    def upload(folder: str, repo_id: str, **options: Any) -> None:  # noqa: ARG001
        shutil.copytree(folder, tmp_path / "uploaded")

    hub, card = mock.Mock(), mock.Mock()
    hub.return_value.create_repo.return_value.repo_id = "me/it"
    monkeypatch.setattr("transformers.utils.hub.hf_api", hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", card)
    monkeypatch.setattr(type(model), "_upload_modified_files", staticmethod(upload))
    model.push_to_hub("me/it")
    verify(make_case("unaligned").awq, tmp_path / "uploaded")


@pytest.fixture
def saved(make_case: MakeCase, tmp_path: Path) -> Path:
    make_case("llama").load().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_revert_refuses_a_saved_file_that_was_changed(saved: Path, tmp_path: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DifferenceError, match="this file differs from the one that the conversion wrote"):
        revert(saved, tmp_path / "awq")


@pytest.mark.parametrize("value", ["everything", 1, None, []])
def test_a_manifest_that_restores_something_else_is_refused(saved: Path, tmp_path: Path, value: object) -> None:
    path = saved / "marlin_manifest.json"
    document = json.loads(path.read_text("utf-8"))
    assert document["restores"] == "tensors"
    path.write_text(json.dumps({**document, "restores": value}), "utf-8")
    with pytest.raises(CheckpointError, match="restores must be 'files' or 'tensors'"):
        revert(saved, tmp_path / "awq")


def test_a_manifest_that_claims_to_restore_files_needs_their_digests(saved: Path, tmp_path: Path) -> None:
    path = saved / "marlin_manifest.json"
    document = json.loads(path.read_text("utf-8"))
    del document["restores"]
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError, match="digests must begin with one"):
        revert(saved, tmp_path / "awq")
