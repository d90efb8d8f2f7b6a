"""Made everything in ``data/`` with version 0.1.0, at commit ed6d472: what later versions must still take and give.

    git worktree add ../v0.1 ed6d472
    cp -r tests/compat ../v0.1/tests/
    cd ../v0.1 && PYTHONPATH=. python -m tests.compat.make_fixtures

It runs with that version only, and refuses any other: fixtures of a later one would show nothing. It is kept to tell
how they came about. Run again it writes the same bytes: what differs from run to run, such as dates, seconds and the
random part of a partial file's name, is replaced by constants, and the paths of folders by ``{data}`` and ``{folder}``.

- ``llama``: 4 bits with zero points, two shards, an older tool's quantization config, modules of both fates. Its
  conversion (``marlin``), the same with ``--unaligned pad`` (``padded``), a conversion and a reversion killed when the
  first shard was finished and the second about to get its name (``killed_convert``, ``killed_revert``), and
  the conversion as if Transformers had saved it (``saved``: its manifest restores tensors).
- ``eight_bits``: bf16 scales, one shard. Its conversion.
- ``no_zero_points``: one group over all of K, headers and a config as no tool of ours writes them. Its conversion.
- ``denied_zero_points``: zero points that its config denies (``zero_point: false``). Its conversion, which has them
  too, as no later version's has.
- ``hub``: the conversion of the same out of a repository of the Hub, and one with ``--low-disk`` that was killed.
- ``batch``: a list and its record, with one item done and one failed.
- ``api.json``, ``commands.json``, ``reports.json``, ``documents.json``: what Python callers, command lines, readers
  of ``--json`` and readers of docs/json.md rely on.
"""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from awq2marlin.resaving import complete_saved
from awq2marlin.synthetic import Recipe, write_checkpoint

import awq2marlin
from tests.hub.client import environment
from tests.hub.server import LoopbackHub

from .helpers import (
    DATA,
    FIRST,
    KEPT_WORK,
    MANIFEST,
    REPORTS,
    REPOSITORY,
    SECOND,
    VERSION,
    WORK,
    add_repository,
    arguments,
    comparable,
    described_api,
    documented_keys,
    hashes,
    listed_options,
    stage,
    stage_batch,
)

LAYER = "model.layers.0"
LLAMA = Recipe(
    modules={
        f"{LAYER}.self_attn.q_proj": (128, 64),
        f"{LAYER}.self_attn.k_proj": (128, 64),
        f"{LAYER}.self_attn.v_proj": (128, 32),  # unaligned: the three are kept together
        f"{LAYER}.self_attn.o_proj": (128, 128),
        f"{LAYER}.mlp.gate_proj": (128, 64),
        f"{LAYER}.mlp.up_proj": (128, 64),
        f"{LAYER}.mlp.down_proj": (64, 64),  # unaligned
        "lm_head": (128, 64),  # never converted
    },
    weights={"model.embed_tokens.weight": (8, 128), "model.norm.weight": (128,)},
    group_size=64,
    shards=2,
    seed=1,
    config={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-05},
)
EIGHT_BITS = Recipe(
    modules={f"{LAYER}.mlp.{name}_proj": (128, 64) for name in ("gate", "up")},
    weights={"model.norm.weight": (128,)},
    bits=8,
    scale_dtype="BF16",
    weight_dtype="BF16",
    seed=2,
    config={"model_type": "qwen2"},
)
NO_ZERO_POINTS = Recipe(
    modules={f"{LAYER}.mlp.{name}_proj": (128, 64) for name in ("gate", "up")},
    weights={"model.embed_tokens.weight": (2, 64)},
    group_size=-1,
    has_qzeros=False,
    shards=2,
    seed=3,
)
DENIED_ZERO_POINTS = Recipe(
    modules={f"{LAYER}.mlp.down_proj": (128, 64), f"{LAYER}.self_attn.o_proj": (64, 48)},
    weights={"model.norm.weight": (16,)},
    group_size=32,
    zero_point=False,
    seed=11,
)
CARD = """---
license: apache-2.0
base_model: org/tiny
tags:
- awq
- tiny
pipeline_tag: text-generation
---

# Tiny, in AWQ

Random weights.
"""


def main():
    """Makes all fixtures anew."""
    if awq2marlin.__version__ != VERSION:
        sys.exit(f"this is version {awq2marlin.__version__}; the fixtures are those of version {VERSION}")
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    (DATA / ".gitattributes").write_text("* -text\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_sources()
        convert_all(folder)
        save(folder)
        with LoopbackHub(folder / "hub") as hub:
            variables = environment(hub, folder / "home")
            convert_repository(hub, variables, folder)
            record_batch(folder)
            store_json("reports.json", {name: report(name, folder, variables) for name in REPORTS})
    store_json("api.json", described_api())
    store_json("commands.json", commands())
    store_json("documents.json", documented_keys())


# --- checkpoints ---------------------------------------------------------------------------------------------------


def write_sources():
    """Writes the AWQ checkpoints."""
    llama = DATA / "llama" / "source"
    write_checkpoint(llama, LLAMA)
    config = json.loads((llama / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (llama / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    legacy = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (llama / "quant_config.json").write_text(json.dumps(legacy, indent=4), "utf-8")
    (llama / "README.md").write_text(CARD, "utf-8")
    (llama / "tokenizer.json").write_bytes('{"version": "1.0",\r\n "model": {"vocab": {"ü": 0}}}'.encode())
    (llama / "assets").mkdir()
    (llama / "assets" / "chat.jinja").write_text("{{ messages }}", "utf-8")
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04N.")  # left behind

    write_checkpoint(DATA / "eight_bits" / "source", EIGHT_BITS)
    write_checkpoint(DATA / "denied_zero_points" / "source", DENIED_ZERO_POINTS)

    odd = DATA / "no_zero_points" / "source"
    write_checkpoint(odd, NO_ZERO_POINTS)
    (odd / "README.md").unlink()
    reword_header(odd / FIRST)
    quantization = '{"quant_method":"awq","w_bit":4,"bits":4,"q_group_size":-1,"group_size":-1,"zero_point":false}'
    text = f'{{"a": [1e-05, NaN, 12345678901234567890],\r\n"quantization_config":{quantization}, "ü\\ud83d": null}}'
    (odd / "config.json").write_bytes(text.encode())


def reword_header(path):
    """Writes a shard's header anew: other metadata, its names in no order, with white space."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = [(name, entry) for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"]
    random.Random(7).shuffle(entries)
    document = dict([entries[0], ("__metadata__", {"made by": "händ"}), *entries[1:]])
    text = (json.dumps(document, indent=3, ensure_ascii=False) + "\n \t\r\n").encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


def convert_all(folder):
    """Converts the checkpoints, and leaves some work half done."""
    for name in ("llama", "eight_bits", "no_zero_points", "denied_zero_points"):
        awq2marlin.convert(DATA / name / "source", DATA / name / "marlin")
    llama = DATA / "llama"
    awq2marlin.convert(llama / "source", llama / "padded", unaligned="pad")
    kill("convert", llama / "source", folder / "killed_convert")
    kill("revert", llama / "marlin", folder / "killed_revert")
    for name in ("killed_convert", "killed_revert"):
        store_unfinished(folder / name, llama / name)


def kill(command, source, output, *options, variables=None):
    """Runs a command that is killed when the first shard is finished and the second about to get its name."""
    line = [sys.executable, "-m", __spec__.name, "killed-at", SECOND, command, source, output, "--workers", "1"]
    done = subprocess.run([*map(str, line), *options], env={**os.environ, **(variables or {})}, check=False)
    if done.returncode != -signal.SIGKILL:
        sys.exit(f"{command} ended with {done.returncode}")


def run_until_killed(name, command_line):
    """Runs the command line in this process, which is killed when it is about to give a file its name."""

    def kill_before_rename(event, details):
        if event == "os.rename" and Path(details[1]).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill_before_rename)
    sys.argv = ["awq2marlin", *command_line]
    runpy.run_module("awq2marlin", run_name="__main__")


def store_unfinished(output, target):
    """Stores the folder of a command that was killed."""
    journal = json.loads((output / WORK / "journal.json").read_text("utf-8"))
    if [*journal["finished"]] != [FIRST] or (output / SECOND).exists():
        sys.exit(f"{output.name} was not killed where it should be")
    for partial in (output / WORK).glob("*-*.partial"):  # its name begins with eight random digits
        partial.rename(partial.with_name("0" * 8 + partial.name[8:]))
    shutil.rmtree(output / WORK / "source" / ".cache", ignore_errors=True)  # notes of the Hub's client, with dates
    (output / WORK).rename(output / KEPT_WORK)
    shutil.copytree(output, target)


def save(folder):
    """Makes of the conversion what ``save_pretrained`` of Transformers would leave, and stores what it reverts to."""
    saved = DATA / "llama" / "saved"
    shutil.copytree(DATA / "llama" / "marlin", saved)
    for name in (MANIFEST, "README.md", "quant_config.json", "tokenizer.json", "assets/chat.jinja"):
        (saved / name).unlink(missing_ok=True)
    (saved / "assets").rmdir()
    complete_saved(saved, {})
    awq2marlin.revert(saved, folder / "reverted")
    store_json("llama/saved_reverted.json", hashes(folder / "reverted"))


def convert_repository(hub, variables, folder):
    """Converts a repository of the Hub, and leaves a conversion with little disk half done."""
    add_repository(hub)
    run(["convert", REPOSITORY, str(DATA / "hub" / "marlin"), "--json"], 0, variables)
    kill("convert", REPOSITORY, folder / "killed_low_disk", "--low-disk", variables=variables)
    store_unfinished(folder / "killed_low_disk", DATA / "hub" / "killed_low_disk")


# --- what commands say ---------------------------------------------------------------------------------------------


def run(command_line, code=None, variables=None):
    """Returns what a command prints on standard output."""
    line = [sys.executable, "-m", "awq2marlin", *command_line]
    settings = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **(variables or {})}
    done = subprocess.run(line, capture_output=True, text=True, env=settings, check=False)
    if code is not None and done.returncode != code:
        sys.exit(done.stderr)
    return done.stdout


def record_batch(folder):
    """Runs a batch of which the second item's source is not there, and stores its list and its record."""
    batch = DATA / "batch"
    batch.mkdir()
    entries = [{"source": "{folder}/sources/eight_bits"}, {"source": "{folder}/sources/late", "verify": "all"}]
    (batch / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    listed = stage_batch(folder / "batch")
    shutil.rmtree(folder / "batch" / "out")
    run(["batch", str(listed), "--out-dir", str(folder / "batch" / "out"), "--json"], 1)
    lines = (folder / "batch" / "list.jsonl.record.jsonl").read_text("utf-8").splitlines()
    documents = [comparable(json.loads(line), folder / "batch") for line in lines]
    (batch / "list.jsonl.record.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), "utf-8")


def report(name, folder, variables):
    """Returns the JSON object of one of `REPORTS`, without what differs from run to run."""
    place = stage(folder / "reports" / name.replace(" ", "_"))
    return comparable(json.loads(run(arguments(name, place), variables=variables)), place)


def commands():
    """Returns the options of every command, as ``--help`` lists them."""
    names = ("convert", "batch", "verify", "revert", "push", "inspect", "demo", "doctor")
    return {name: listed_options(run([name, "--help"], 0)) for name in names}


def store_json(name, document):
    """Stores a JSON file."""
    (DATA / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["killed-at"]:
        run_until_killed(sys.argv[2], sys.argv[3:])
    else:
        main()
