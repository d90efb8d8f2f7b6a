"""The model card: people's warning first, the source's front matter and text kept, nothing of it executed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st

import awq2marlin
from awq2marlin import CheckpointError, convert, inspect, revert, verify
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from awq2marlin.gemm.check import GemmCheck, GemmRun
from awq2marlin.integrations.vllm.needs import TRIED
from awq2marlin.pipeline.model_card import MAX_FRONT_MATTER, addressed, merge_front_matter, model_card, split_card
from awq2marlin.pipeline.plan import plan_conversion

REPOSITORY = "org/Llama-3-8B-AWQ"
REVISION = "0123456789abcdef0123456789abcdef01234567"
OWN: dict[str, str | list[str]] = {"base_model_relation": "quantized", "tags": ["awq", "marlin"]}


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "awq", llama_recipe(192, 512, 1, 64, 256, group_size=64, shards=2))
    return tmp_path / "awq"


def card_of(awq: Path, **options: Any) -> str:
    """Returns the card of a checkpoint of which nothing was verified."""
    plan = plan_conversion(open_checkpoint(awq), "keep")
    return model_card(plan, options.pop("verified", ()), options.pop("gemm", None), **options).decode("utf-8")


def metadata(card: str, folder: Path) -> dict[str, Any]:
    """Returns a card's front matter as the Hub's client reads it."""
    (folder / "card.md").write_text(card, "utf-8", newline="")
    loaded = metadata_load(folder / "card.md")
    assert loaded is not None
    return loaded


GOOD = """---
license: llama3
license_link: https://example.com/licence # and a comment
language:
- en
- no
base_model: meta-llama/Meta-Llama-3-8B
library_name: transformers
base_model_relation: finetune
tags: [text-generation, awq, 1.0]
inference: false
model-index:
- name: x
  results:
  - metrics:
    - value: 0.850
      date: 2024-01-01
---

# Llama

| a | b |
"""


def test_the_source_s_front_matter_is_kept_and_ours_added(awq: Path, tmp_path: Path) -> None:
    (awq / "README.md").write_text(GOOD)
    card = card_of(awq)
    assert metadata(card, tmp_path) == {
        "license": "llama3",
        "license_link": "https://example.com/licence",
        "language": ["en", False],  # as it stands; see the next test
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "library_name": "awq2marlin",
        "base_model_relation": "quantized",
        "tags": ["text-generation", "awq", 1.0, "marlin", "awq2marlin", "4-bit"],
        "inference": False,
        "model-index": yaml.safe_load(split_card(GOOD)[0])["model-index"],
    }
    assert "library_name: transformers" not in card
    assert card.endswith("\n\n# Llama\n\n| a | b |\n")


def test_values_stay_as_they_are_written(awq: Path) -> None:
    (awq / "README.md").write_text(GOOD)
    card = card_of(awq)
    assert "\n- no\n" in card  # Norwegian, which YAML 1.1 takes for false
    assert "value: 0.850\n" in card
    assert "date: 2024-01-01\n" in card


@pytest.mark.parametrize("to", ["marlin", "awq", "compressed-tensors"])
@pytest.mark.parametrize("origin", [{}, {"repo_id": REPOSITORY, "revision": REVISION}], ids=["folder", "repository"])
def test_a_card_says_what_made_it_and_links_only_what_exists(awq: Path, to: str, origin: dict[str, str]) -> None:
    if to == "awq":
        convert(awq, awq.parent / "source", to="compressed-tensors")
        awq = awq.parent / "source"
    plan = plan_conversion(open_checkpoint(awq), "keep", to)
    card = model_card(plan, (), None, **origin).decode("utf-8")
    assert f"Made by awq2marlin {awq2marlin.__version__}" in card
    ours = f"https://huggingface.co/{REPOSITORY}"
    linked = {link.rstrip(").,") for link in re.findall(r"https?://[^\s\])]+", card)}
    assert linked == ({ours, f"{ours}/tree/{REVISION}"} if origin else set())
    assert re.findall(r"\]\((?!https://)[^)]*\)", card) == [], "a card has no folder that a link could be relative to"


def test_the_warning_comes_first_and_the_commands_are_exact(awq: Path) -> None:
    card = card_of(awq)
    _, text = split_card(card)
    assert text.strip().startswith("> **Load this checkpoint only with an engine that knows the format `marlin_native`")
    assert "garbage" in text.strip().split("\n\n")[0]
    first = f"{TRIED[0][0]}.{TRIED[0][1]}"
    after = "after `pip install '.[cuda]'` in a clone of awq2marlin"
    assert f"vLLM {first} or newer, {after}:\n\n```sh\nvllm serve THIS_MODEL\n```\n" in text
    assert "```sh\nsglang serve --model-path THIS_MODEL\n```\n" in text
    assert "Transformers 5.17 or newer, after `pip install '.[transformers,cuda]'`" in text
    assert 'AutoModelForCausalLM.from_pretrained("THIS_MODEL"' in text
    assert "awq2marlin verify SOURCE THIS_MODEL\n" in text
    assert "awq2marlin revert THIS_MODEL OUTPUT\n" in text


def test_a_repository_is_named_with_its_revision(awq: Path, tmp_path: Path) -> None:
    card = card_of(awq, repo_id=REPOSITORY, revision=REVISION)
    assert metadata(card, tmp_path)["base_model"] == REPOSITORY
    assert "# Llama-3-8B-AWQ, Marlin-native\n" in card
    assert f"[{REPOSITORY}](https://huggingface.co/{REPOSITORY})" in card
    assert f"[`{REVISION}`](https://huggingface.co/{REPOSITORY}/tree/{REVISION})" in card
    assert f"awq2marlin verify {REPOSITORY}@{REVISION} THIS_MODEL\n" in card
    assert "base_model" not in metadata(card_of(awq).replace("base_model_relation", "relation"), tmp_path)


def test_a_card_is_addressed_to_the_repository_it_is_pushed_to(awq: Path) -> None:
    card = addressed(card_of(awq).encode(), "me/model-marlin").decode()
    assert "THIS_MODEL" not in card
    assert "vllm serve me/model-marlin\n" in card
    assert "is this folder's path" not in card
    assert addressed(card.encode(), "other/name").decode() == card
    assert addressed(b"# my own\xff\n", "me/model") == b"# my own\xff\n"


def test_the_table_tells_what_was_checked_and_what_was_not(awq: Path) -> None:
    bare = card_of(awq)
    assert "| quantized layers | 7 |\n| of these in the Marlin layout | 3 |\n" in bare
    assert "| compared with the source, value for value | not done |\n" in bare
    assert "| run through the Marlin GEMM | not done |\n" in bare
    checks = tuple(GemmCheck("m", 64, 64, "float16", (1, 16), 0.1, 0.01, error, 0.2) for error in (0.125, 0.031))
    checked = card_of(awq, verified=("a", "b"), gemm=GemmRun("cuda", "NVIDIA H200\x1b[31m", checks))
    assert "| 2 of 3: no difference |" in checked
    assert r"(NVIDIA H200\x1b[31m) | 2: identity activations reproduced every weight, bit for bit |" in checked
    assert "| 12.5% of the bound |" in checked


def test_convert_writes_it_before_the_config(awq: Path, tmp_path: Path) -> None:
    (awq / "README.md").write_text(GOOD)
    result = convert(awq, tmp_path / "out", verify=2)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card == card_of(awq, verified=result.verified)
    assert "| 2 of 3: no difference |" in card
    order = [
        (tmp_path / "out" / name).stat().st_mtime_ns for name in ("marlin_manifest.json", "README.md", "config.json")
    ]
    assert order == sorted(order)
    assert "README.md" in inspect(tmp_path / "out").files
    assert "README.md" in inspect(awq).files


SOURCE_CARDS = {
    "none": None,
    "empty": b"",
    "plain": b"# A model\n",
    "with front matter": GOOD.encode(),
    "not UTF-8": b"---\nlicense: mit\n---\n# Mod\xe8le \xff\xfe\x00\n",
    "with a byte order mark": b"\xef\xbb\xbf---\nlicense: mit\n---\ntext\n",
    "with carriage returns": b"---\r\nlicense: mit\r\n---\r\ntext\r\n",
    "broken front matter": b"---\nlicense: [mit\n---\ntext\n",
    "binary": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("name", SOURCE_CARDS)
def test_every_source_card_comes_back_byte_for_byte(awq: Path, tmp_path: Path, name: str) -> None:
    data = SOURCE_CARDS[name]
    (awq / "README.md").unlink()
    if data is not None:
        (awq / "README.md").write_bytes(data)
    convert(awq, tmp_path / "out")
    loaded = metadata((tmp_path / "out" / "README.md").read_text("utf-8"), tmp_path)
    assert loaded["base_model_relation"] == "quantized"
    assert loaded.get("license") == (
        "mit" if b"license: mit\n" in (data or b"").replace(b"\r", b"") else loaded.get("license")
    )
    assert verify(awq, tmp_path / "out").files == 2
    revert(tmp_path / "out", tmp_path / "back")
    back = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert back == {path.name: path.read_bytes() for path in awq.iterdir()}


def test_a_card_may_be_edited(awq: Path, tmp_path: Path) -> None:
    convert(awq, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    verify(awq, tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    verify(awq, tmp_path / "out")
    revert(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_bytes() == (awq / "README.md").read_bytes()


def test_a_card_of_another_case_keeps_its_name(awq: Path, tmp_path: Path) -> None:
    (awq / "README.md").rename(awq / "Readme.md")
    convert(awq, tmp_path / "out")
    assert not (tmp_path / "out" / "Readme.md").exists()
    assert "A synthetic AWQ checkpoint" in (tmp_path / "out" / "README.md").read_text()
    verify(awq, tmp_path / "out")
    revert(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "Readme.md").read_bytes() == (awq / "Readme.md").read_bytes()


def test_a_card_in_a_subfolder_is_a_file_like_any_other(awq: Path, tmp_path: Path) -> None:
    (awq / "docs").mkdir()
    (awq / "docs" / "README.md").write_text("# Docs\n")
    result = convert(awq, tmp_path / "out")
    assert "docs/README.md" in result.files
    assert (tmp_path / "out" / "docs" / "README.md").read_text() == "# Docs\n"


def test_what_cannot_be_a_card_is_refused_before_anything_is_written(awq: Path, tmp_path: Path) -> None:
    (awq / "README.md").write_bytes(bytes(8_000_001))
    with pytest.raises(CheckpointError, match=r"README.md: a model card of 8000001 bytes.*shorten it"):
        convert(awq, tmp_path / "out")
    (awq / "README.md").unlink()
    (awq / "README.md").mkdir()
    (awq / "README.md" / "x").write_text("a folder where the card goes")
    with pytest.raises(CheckpointError) as caught:
        convert(awq, tmp_path / "out")
    assert caught.value.problems[0].code == "unsafe-name"
    assert not (tmp_path / "out").exists()


def test_a_damaged_card_in_the_manifest_is_not_given_back(awq: Path, tmp_path: Path) -> None:
    convert(awq, tmp_path / "out")
    path = tmp_path / "out" / "marlin_manifest.json"
    document = json.loads(path.read_text())
    document["source_card"]["digests"] = ["xxh3_128:" + "0" * 32]
    path.write_text(json.dumps(document))
    with pytest.raises(Exception, match=r"README.md: the text in the manifest does not match its digest"):
        revert(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    document["source_card"]["name"] = "config.txt"
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"'config.txt', which is not README.md"):
        revert(tmp_path / "out", tmp_path / "back")


# --- hostile front matter --------------------------------------------------------------------------------------------

HOSTILE = {
    "code": ("a: !!python/object/apply:os.system ['touch owned']\n", "types that YAML does not define"),
    "a foreign tag": ("a: !secret x\n", "types that YAML does not define"),
    "aliases": ("a: &x [1]\nb: *x\n", "aliases"),
    "a bomb of aliases": (
        "a: &a [x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)),
        "aliases",
    ),
    "a bomb of merges": ("a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}\n", "aliases"),
    "a circle": ("a: &a [*a]\n", "aliases"),
    "a list": ("- a\n- b\n", "not a mapping"),
    "text": ("just text\n", "not a mapping"),
    "keys that are lists": ("? [a, b]\n: c\n", "not a mapping"),
    "no YAML": ("a: [b\n", "not YAML"),
    "tabs": ("a:\n\t- b\n", "not YAML"),
    "control characters": ("a: \x07\n", "not YAML"),
    "two documents": ("a: 1\n--- x\n", "not YAML"),
    "depth": ("a: " + "[" * 50_000 + "\n", "nested too deeply"),
    "length": ("a: x\n" * (MAX_FRONT_MATTER // 5 + 1), f"more than {MAX_FRONT_MATTER} characters"),
    "fences": ("a: [```` b\n```\n", "not YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_front_matter_is_shown_and_not_merged(
    awq: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    front_matter, reason = HOSTILE[name]
    (awq / "README.md").write_text(f"---\n{front_matter}---\n\n# Text\n")
    begun = time.process_time()
    card = card_of(awq)
    assert time.process_time() - begun < 5
    assert not Path("owned").exists()
    assert metadata(card, tmp_path) == {
        "base_model_relation": "quantized",
        "library_name": "awq2marlin",
        "tags": ["awq", "marlin", "awq2marlin", "4-bit"],
    }
    shown = card.split("Its front matter could not be merged (")[1]
    assert reason in shown.split("):\n\n")[0]
    if "`" in front_matter:
        assert f"`````yaml\n{front_matter}`````\n" in shown
    else:
        assert f"```yaml\n{front_matter}```\n" in shown
    assert card.endswith("# Text\n")


@pytest.mark.parametrize(
    "tags", ["", "null", "awq", "[awq, [nested]]", "{a: b}", "[]", "[~, 5]", "{}", "- a", "|\n  x\n  y"]
)
def test_tags_of_any_kind_become_a_list(tags: str) -> None:
    merged, problem = merge_front_matter(f"tags: {tags}\n" if tags != "- a" else "tags:\n- a\n", OWN)
    assert problem == ""
    found = yaml.safe_load(merged)["tags"]
    assert set(OWN["tags"]) <= set(map(str, found))
    assert all(isinstance(each, str | int) for each in found)
    assert len(found) == len(set(found))


@settings(max_examples=200)
@given(st.text("aeflnorstuyNO0189-_/ .", min_size=1) | st.sampled_from(["No", "null", "org/name", "1_0", "4-bit", "n"]))
def test_without_front_matter_it_is_written_as_yaml_would(text: str) -> None:
    own: dict[str, str | list[str]] = {"base_model": text, "tags": ["awq", text]}
    merged, problem = merge_front_matter(" \n", own)
    assert problem == ""
    assert yaml.safe_load(merged) == own
    assert merged == yaml.safe_dump(own, sort_keys=False, width=1 << 20)


def test_a_number_too_long_for_python_is_kept() -> None:
    merged, problem = merge_front_matter(f"a: {'9' * 5000}\nb: 2024-99-99\n", OWN)
    assert problem == ""
    assert f"a: {'9' * 5000}\nb: 2024-99-99\n" in merged


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(st.dictionaries(st.text(min_size=1), VALUES, max_size=6), st.booleans())
def test_any_mapping_survives_the_merge(source: dict[str, Any], flow: bool) -> None:
    dumper = type("NoAliases", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text = yaml.dump(source, Dumper=dumper, default_flow_style=flow)
    merged, problem = merge_front_matter(text, OWN)
    assert problem == ""
    result = yaml.safe_load(merged)
    tags = source.get("tags")
    theirs = tags if isinstance(tags, list) else [tags]
    kept = [each for each in theirs if each is not None and not isinstance(each, list | dict)]
    assert result.pop("tags")[: len(kept)] == kept
    assert result.pop("base_model_relation") == "quantized"
    assert result == {key: value for key, value in source.items() if key not in OWN}
    assert merge_front_matter(merged, OWN) == (merged, "")


@settings(max_examples=300)
@given(st.text() | st.text(alphabet="-\n abc:[]{}*&!|>'\"#%@`?,\t\r\ufeff\x85\u2028"))
def test_any_text_makes_a_card_that_the_client_reads(text: str) -> None:
    front_matter, body = split_card(text)
    merged, problem = merge_front_matter(front_matter, OWN)
    assert problem.isprintable()
    card = f"---\n{merged}---\n\n{body}"
    assert split_card(card) == (merged, "\n" + body)
    data = ModelCard(card).data.to_dict()
    assert data["base_model_relation"] == "quantized"
    assert set(OWN["tags"]) <= set(map(str, data["tags"]))
