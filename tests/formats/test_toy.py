"""A format is one file: a toy that is registered here alone goes through everything that AWQ goes through."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from awq2marlin import CheckpointError, DifferenceError, convert, inspect, revert, verify
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.formats.registry import registered
from tests.faults.helpers import WORK, Stepped, contents, finished_shards
from tests.formats.toy import MASKED, TOY
from tests.hostile.hostile_files import pack_tensors

MODULES = {
    "model.layers.0.self_attn.q_proj": (128, 64),
    "model.layers.0.self_attn.k_proj": (128, 64),
    "model.layers.0.mlp.down_proj": (192, 96),  # Marlin cannot take it as it is
    "model.layers.1.mlp.down_proj": (256, 128),
}
WEIGHTS = {"model.embed_tokens.weight": (16, 128), "model.norm.weight": (128,)}
KINDS = [
    pytest.param({"group_size": 64}, id="4 bits"),
    pytest.param({"group_size": 32, "bits": 8, "scale_dtype": "BF16"}, id="8 bits"),
    pytest.param({"group_size": -1}, id="one group"),
    pytest.param({"group_size": 64, "has_qzeros": False}, id="no zero points"),
]


@pytest.fixture(autouse=True)
def toy(request):
    with registered(getattr(request, "param", TOY)):
        yield


#: The second toy needs two tensors to read, or to write, one.
both = pytest.mark.parametrize("toy", [TOY, MASKED], ids=["toy", "masked"], indirect=True)


def write_awq(folder, **options):
    write_checkpoint(folder, Recipe(MODULES, WEIGHTS, **{"group_size": 64, "shards": 2, **options}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def made(tmp_path):
    """Makes (an AWQ checkpoint, the toy checkpoint that was made of it, now a source of its own)."""

    def make(**options):
        awq, toy = write_awq(tmp_path / "awq", **options), tmp_path / "toy"
        convert(awq, toy, to="toy")
        verify(awq, toy)
        (toy / "marlin_manifest.json").unlink()
        return awq, toy

    return make


@both
@pytest.mark.parametrize("options", KINDS)
def test_it_is_written_verified_and_taken_back(tmp_path, options):
    awq, toy = write_awq(tmp_path / "awq", **options), tmp_path / "toy"
    result = convert(awq, toy, to="toy", verify="all")
    assert len(result.converted) == len(result.verified) == len(MODULES)
    found = inspect(toy)
    assert (found.format, {module.layout for module in found.modules}) == ("toy", {"toy"})
    assert {module.name: (module.size_k, module.size_n) for module in found.modules} == MODULES
    names = {name.rpartition(".")[2] for name in open_checkpoint(toy).tensors}
    assert names == {"weight", "codes", "steps", "dims", *(["offsets"] if options.get("has_qzeros", True) else [])}
    assert verify(awq, toy).modules_total == len(MODULES)
    revert(toy, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(awq)


@both
@pytest.mark.parametrize("unaligned", ["keep", "pad"])
@pytest.mark.parametrize("options", KINDS)
def test_it_is_read_and_every_output_is_that_of_the_same_numbers_in_awq(made, tmp_path, options, unaligned):
    awq, toy = made(**options)
    convert(awq, tmp_path / "of_awq", unaligned=unaligned)
    result = convert(toy, tmp_path / "of_toy", unaligned=unaligned, verify="all")
    assert len(result.kept) == (0 if unaligned == "pad" else 1)
    one, other = (open_checkpoint(tmp_path / name) for name in ("of_awq", "of_toy"))
    assert {name: (each.dtype, each.shape) for name, each in one.tensors.items()} == {
        name: (each.dtype, each.shape) for name, each in other.tensors.items()
    }
    for name in one.tensors:
        assert data_of(one, name) == data_of(other, name), name
    assert verify(toy, tmp_path / "of_toy").modules_total == len(MODULES)
    revert(tmp_path / "of_toy", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(toy)


def data_of(checkpoint, name):
    shard, tensor = checkpoint.shard_of[name], checkpoint.tensors[name]
    start = checkpoint.shards[shard].data_start
    return checkpoint.folder.path(shard).read_bytes()[start + tensor.start : start + tensor.end]


def test_inspect_and_dry_run_tell_what_it_is(made, tmp_path):
    _, toy = made()
    assert inspect(toy).format == "toy"
    result = convert(toy, tmp_path / "out", dry_run=True)
    assert [module.name for module in result.kept] == ["model.layers.0.mlp.down_proj"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("part", "place"), [("codes", "value"), ("offsets", "zero point"), ("steps", "scale (bits)")])
def test_a_changed_value_is_found_and_named(made, tmp_path, part, place):
    _, toy = made()
    convert(toy, tmp_path / "marlin")
    checkpoint = open_checkpoint(toy)
    name = f"model.layers.1.mlp.down_proj.{part}"
    shard = toy / checkpoint.shard_of[name]
    at = checkpoint.shards[shard.name].data_start + checkpoint.tensors[name].start
    with shard.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(DifferenceError) as caught:
        verify(toy, tmp_path / "marlin", layers=100)
    (problem,) = caught.value.problems
    target = {"codes": "qweight", "offsets": "qzeros", "steps": "scales"}[part]
    assert problem.tensor == f"model.layers.1.mlp.down_proj.{target}"
    assert problem.message.startswith(f"{place} at row 0, column 0: the source has ")


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_compared_by_a_few_of_its_columns_at_once(made, tmp_path, monkeypatch, bits):
    """They hold rows, and rows are what its counterpart holds."""
    monkeypatch.setattr("awq2marlin.verification.values.BAND_BYTES", 1 << 10)
    awq, toy = made(bits=bits, group_size=32)
    convert(awq, tmp_path / "again", to="toy", verify="all")
    convert(toy, tmp_path / "marlin", unaligned="pad", verify="all")
    checkpoint, name = open_checkpoint(toy), "model.layers.1.mlp.down_proj.codes"
    shard = toy / checkpoint.shard_of[name]
    data = bytearray(shard.read_bytes())
    data[checkpoint.shards[shard.name].data_start + checkpoint.tensors[name].end - 1] ^= 0x80  # the last of all
    shard.write_bytes(data)
    with pytest.raises(DifferenceError, match="value at row 255, column 127: the source has "):
        verify(toy, tmp_path / "marlin", layers=100)


def test_a_derived_tensor_that_does_not_follow_is_refused_before_the_output_is_loadable(made, tmp_path):
    _, toy = made()
    checkpoint, name = open_checkpoint(toy), "model.layers.0.self_attn.q_proj.dims"
    shard = toy / checkpoint.shard_of[name]
    data = bytearray(shard.read_bytes())
    data[checkpoint.shards[shard.name].data_start + checkpoint.tensors[name].start] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="could not be undone") as caught:
        convert(toy, tmp_path / "out")
    assert [(each.file, each.tensor, each.code) for each in caught.value.problems] == [
        (shard.name, name, "contradiction")
    ]
    assert not (tmp_path / "out" / "config.json").exists()


def zeros(dtype, *shape):
    return dtype, list(shape), bytes(int(np.prod(shape)) * {"I32": 4, "F16": 2, "I64": 8, "F32": 4}[dtype])


SOUND = {
    "m.codes": zeros("I32", 64, 16),
    "m.offsets": zeros("I32", 64, 1),
    "m.steps": zeros("F16", 64, 2),
    "m.dims": zeros("I64", 2),
}
HOSTILE = {
    "codes missing": ({"m.codes": None}, "m.codes", "missing-tensor"),
    "steps missing": ({"m.steps": None}, "m.steps", "missing-tensor"),
    "offsets missing": ({"m.offsets": None}, "m.offsets", "missing-tensor"),
    "dims missing": ({"m.dims": None}, "m.dims", "missing-tensor"),
    "steps of another type": ({"m.steps": zeros("F32", 64, 2)}, "m.steps", "wrong-dtype"),
    "codes flat": ({"m.codes": zeros("I32", 1024)}, "m.codes", "wrong-shape"),
    "steps of other groups": ({"m.steps": zeros("F16", 64, 3)}, "m.steps", "contradiction"),
    "offsets of other columns": ({"m.offsets": zeros("I32", 8, 1)}, "m.offsets", "contradiction"),
    "dims of another shape": ({"m.dims": zeros("I64", 3)}, "m.dims", "contradiction"),
    "a dense weight besides": ({"m.weight": zeros("F16", 64, 128)}, "m.weight", "contradiction"),
    "a row order": ({"m.g_idx": zeros("I32", 128)}, "m.g_idx", "foreign-format"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_are_refused_by_name(tmp_path, name):
    change, tensor, code = HOSTILE[name]
    tensors = {key: value for key, value in {**SOUND, **change}.items() if value is not None}
    (tmp_path / "model.safetensors").write_bytes(pack_tensors(tensors))
    config = {"quantization_config": {"quant_method": "toy", "bits": 4, "group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, tmp_path / "out")
    assert (tensor, code) in {(problem.tensor, problem.code) for problem in caught.value.problems}
    assert not (tmp_path / "out").exists()


def test_two_configs_of_different_formats_contradict_each_other(made, tmp_path):
    _, toy = made()
    config = json.loads((toy / "config.json").read_text())
    config["text_config"] = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}}
    (toy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"it is AWQ here but toy in config\.json"):
        convert(toy, tmp_path / "out")


def test_a_file_of_an_older_tool_that_speaks_of_another_format_is_told_of(made, tmp_path):
    _, toy = made()
    (toy / "quant_config.json").write_text('{"quant_method": "awq", "bits": 4, "group_size": 64}')
    result = convert(toy, tmp_path / "out")
    said = "quant_config.json is ignored: config.json says how the checkpoint is quantized (it describes AWQ)"
    assert result.warnings == (said,)
    assert not (tmp_path / "out/quant_config.json").exists()


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    runner = Stepped(tmp_path_factory.mktemp("stepped"), AWQ2MARLIN_TEST_TOY="1")
    yield runner
    runner.close()


def test_killed_before_any_of_its_steps_it_is_completed_by_the_same_command(made, killed_there_and_back):
    killed_there_and_back(made(shards=1)[1])


ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import os, sys
import tests.formats.toy
from awq2marlin import convert, revert
from awq2marlin.pipeline import run
shard = run.rewrite_shard
left = int(sys.argv[3])

def rewrite_shard(task, progress):
    global left
    if not left:
        os.kill(os.getpid(), 9)
    left -= 1
    return shard(task, progress)

run.rewrite_shard = rewrite_shard
{"toy": lambda: convert(*sys.argv[1:3], to="toy", workers=1),
 "marlin": lambda: convert(*sys.argv[1:3], workers=1),
 "back": lambda: revert(*sys.argv[1:3], workers=1)}[sys.argv[4]]()
"""


def run_child(source, output, shards, what):
    """Runs a conversion in a process of its own that is killed before its next shard but so many."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AWQ2MARLIN_TEST_TOY": "1"}
    arguments = [sys.executable, "-c", CHILD, str(source), str(output), str(shards), what]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("what", ["toy", "marlin", "back"])
def test_killed_it_resumes_and_ends_with_the_same_bytes(made, tmp_path, what):
    awq, toy = made()
    source = {"toy": awq, "marlin": toy, "back": tmp_path / "marlin"}[what]
    convert(toy, tmp_path / "marlin")
    assert run_child(source, tmp_path / "whole", -1, what).returncode == 0
    out = tmp_path / "out"
    assert run_child(source, out, 1, what).returncode == -9
    assert len(finished_shards(out)) == 1
    assert not (out / "config.json").exists()
    done = run_child(source, out, 1, what)  # the other shard is all that is left to do
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / WORK).exists()
