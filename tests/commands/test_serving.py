"""How an output is served: plan, conversion, inspection and card say the same, with commands that can be copied."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest

from awq2marlin import convert, inspect
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.cli.app import main

MODULES = {f"model.layers.0.self_attn.{name}_proj": (256, 256) for name in "qkvo"}
ENGINES = ["vLLM", "SGLang", "Transformers"]


@pytest.fixture
def awq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = {"num_attention_heads": 4, "num_key_value_heads": 4}
    write_checkpoint(tmp_path / "awq", Recipe(MODULES, group_size=64, config=config))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "awq"


def test_plan_conversion_inspection_and_card_say_the_same(awq: Path) -> None:
    planned, done = convert(awq, dry_run=True), convert(awq)
    assert [each.engine for each in done.serving] == ENGINES
    assert planned.serving == done.serving == inspect("awq").serving == inspect("awq-marlin").serving
    vllm, sglang, transformers = done.serving
    assert (vllm.command, vllm.note) == (
        "vllm serve awq-marlin",
        "Over several GPUs: --tensor-parallel-size 2 or 4",
    )
    assert (sglang.command, sglang.note) == (
        "sglang serve --model-path awq-marlin",
        "Over several GPUs: --tp-size 2 or 4. Tested on one H100 and two H200s, with small models",
    )
    assert transformers.command.startswith("import awq2marlin.integrations.transformers")
    card = Path("awq-marlin/README.md").read_text("utf-8")
    for each in done.serving:
        assert f"```{each.language}\n{each.command.replace('awq-marlin', 'THIS_MODEL')}\n```\n" in card


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_weights_that_no_engine_s_marlin_supports_are_said_to_need_a_newer_gpu(
    tmp_path: Path, bits: int, zeros: bool
) -> None:
    write_checkpoint(tmp_path / "awq", Recipe(MODULES, group_size=64, bits=bits, has_qzeros=zeros))
    vllm, sglang, _ = convert(tmp_path / "awq", tmp_path / "out").serving
    is_said = {"8 bits with zero points; they need compute capability 8.0" in each.note for each in (vllm, sglang)}
    assert is_said == {bits == 8 and zeros}
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"\n{vllm.note}." in card


@pytest.mark.parametrize("to", ["marlin", "awq", "compressed-tensors"])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_output_is_served_by_an_engine_or_says_why_not(tmp_path: Path, to: str, zeros: bool, bits: int) -> None:
    recipe = Recipe(MODULES, group_size=64, bits=bits, has_qzeros=zeros)
    write_checkpoint(tmp_path / "awq", recipe)
    convert(tmp_path / "awq", tmp_path / "source", to="marlin")
    result = convert(tmp_path / "source" if to != "marlin" else tmp_path / "awq", tmp_path / "out", to=to, dry_run=True)
    assert [each.engine for each in result.serving] == ENGINES
    for each in result.serving:
        assert bool(each.command) != bool(each.reason)
        assert not (each.reason + each.note).endswith(".")
        if each.language == "python" and each.command:
            ast.parse(each.command)


@pytest.mark.parametrize("name", ["two words", "it's", '"', "-x", "a\\b", "$HOME", "ünï"])
def test_commands_take_any_name_as_it_is(awq: Path, name: str) -> None:
    vllm, sglang, transformers = convert(awq, name, dry_run=True).serving
    for command in vllm.command, sglang.command:
        assert Path(shlex.split(command)[-1]) == Path(name)
    named = [node.value for node in ast.walk(ast.parse(transformers.command)) if isinstance(node, ast.Constant)]
    assert named.count(name) == 2


@pytest.mark.usefixtures("awq")
def test_the_last_lines_are_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "awq"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("to serve it") :] == [
        "to serve it",
        "  vLLM          vllm serve awq-marlin",
        "                Over several GPUs: --tensor-parallel-size 2 or 4",
        "  SGLang        sglang serve --model-path awq-marlin",
        "                Over several GPUs: --tp-size 2 or 4. Tested on one H100 and two H200s, with small models",
        "  Transformers  import awq2marlin.integrations.transformers  # without this line, Transformers refuses it",
        "                from transformers import AutoModelForCausalLM, AutoTokenizer",
        '                model = AutoModelForCausalLM.from_pretrained("awq-marlin", device_map="auto")',
        '                tokenizer = AutoTokenizer.from_pretrained("awq-marlin")',
        "to install what they need",
        "  vLLM, SGLang  pip install '.[cuda]'  # in a clone of awq2marlin",
        "  Transformers  pip install '.[transformers,cuda]'  # in a clone of awq2marlin",
    ]
