"""The command line: what it prints and where, its exit codes, its JSON; a user's mistake is never a traceback."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import awq2marlin
from awq2marlin import __version__
from awq2marlin.checkpoint.synthetic import write_checkpoint
from awq2marlin.cli import progress as shown_progress
from awq2marlin.cli.app import app, main
from awq2marlin.cli.json import report_of
from awq2marlin.cli.text import show
from awq2marlin.commands.options import TARGET_OPTIONS, ConvertOptions, RevertOptions
from awq2marlin.errors import size_text
from awq2marlin.pipeline.shard import ShardResult, ShardTask, rewrite_shard
from tests.e2e import oracle
from tests.e2e.inputs import hub_snapshot, layer, plain, say

COMMANDS = ("convert", "verify", "revert", "inspect", "demo")
SHARD = "model.safetensors"
SIX_FILES = {SHARD, "README.md", "config.json", "generation_config.json", "marlin_manifest.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``awq`` (3 modules to convert, 4 to keep) and its conversion ``marlin``, not to be changed."""
    root = tmp_path_factory.mktemp("cli")
    recipe = plain(layer(0, hidden=192, kv=64, inter=512), {"model.norm.weight": (192,), "lm_head.weight": (8, 192)})
    write_checkpoint(root / "awq", recipe)
    (root / "file").write_text("no folder")
    (root / "awq" / "pytorch_model.bin").write_bytes(b"pickled")
    assert main(["convert", str(root / "awq"), str(root / "marlin"), "--quiet"]) == 0
    return root


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A conversion with one value changed."""
    folder = Path(shutil.copytree(made / "marlin", tmp_path / "damaged"))
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs every test in a folder of its own, and without colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    return


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Runs a command in this process: exit code, standard output, standard error."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:  # the parser's own way to end after --help
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Runs a command in a process of its own."""
    root = str(Path(awq2marlin.cli.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-m", "awq2marlin", *map(str, arguments)], env=environment, **options)


# --- help and version ----------------------------------------------------------------------------------------------


def parameters(command: str) -> list[Any]:
    """The arguments and options of a command, as typer has them."""
    group: Any = typer.main.get_command(app)
    return [each for each in group.commands[command].params if each.name != "help"]


@pytest.mark.parametrize(
    ("command", "options"),
    [("convert", ConvertOptions), ("batch", ConvertOptions), ("revert", RevertOptions)],
    ids=["convert", "batch", "revert"],
)
def test_a_command_has_every_option_with_its_default(command: str, options: type) -> None:
    defaults = {each.name: each.default for each in parameters(command)}
    assert {each.name: defaults.get(each.name, "missing") for each in fields(options)} == {
        each.name: each.default for each in fields(options)
    }
    assert command == "revert" or {*TARGET_OPTIONS} <= {*defaults}


def test_every_result_is_shown_and_reported() -> None:
    results = {name for name in awq2marlin.__all__ if name.endswith("Result")} - {"ItemResult"}
    assert show.names - {"GemmRun"} == report_of.names == results


def test_no_arguments_give_the_help_and_a_usage_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (2, "")
    assert "Usage: awq2marlin [OPTIONS] COMMAND" in out


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "awq2marlin", *arguments]
    root = str(Path(awq2marlin.cli.__file__).parents[2])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "awq2marlin" in imported
    assert imported & {"numpy", "numba", "torch", "safetensors", "huggingface_hub", "tqdm", "xxhash"} == set()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"awq2marlin {__version__}\n", "")


# --- exit codes and JSON -------------------------------------------------------------------------------------------

DOCUMENT: dict[str, type] = {
    "schema_version": int,
    "command": str,
    "status": str,
    "exit_code": int,
    "source": str,
    "output": str,
    "files": list,
    "modules": list,
    "bytes": int,
    "seconds": float,
    "warnings": list,
    "left_behind": dict,
    "details": dict,
    "errors": list,
}
FILE: dict[str, Any] = {"name": str, "bytes": int, "sha256": (str, type(None))}
ERROR: dict[str, Any] = {"file": str, "tensor": str, "code": str, "message": str}
MODULE: dict[str, Any] = {
    "name": str,
    "K": int,
    "N": int,
    "layout": str,
    "padded": (list, type(None)),
    "verified": bool,
    "reason": str,
}


def check_keys(found: dict[str, Any], wanted: dict[str, Any], *, exact: bool = True) -> None:
    assert set(wanted) <= set(found)
    assert not exact or set(found) == set(wanted)
    assert [key for key, kind in wanted.items() if not isinstance(found[key], kind)] == []


def read_json(out: str, command: str, code: int) -> dict[str, Any]:
    """Asserts that standard output is one object of the documented shape, and returns it."""
    document = json.loads(out)
    assert list(document) == list(DOCUMENT)
    check_keys(document, DOCUMENT)
    for file in document["files"]:
        check_keys(file, FILE)
    for module in document["modules"]:
        check_keys(module, MODULE, exact=command != "inspect")
        assert module["layout"] in ("awq", "marlin")
    for error in document["errors"]:
        check_keys(error, ERROR)
    status = {0: "done", 1: "failed", 2: "usage", 3: "difference", 130: "interrupted"}[code]
    assert document["schema_version"] == 1
    assert (document["command"], document["exit_code"], document["status"]) == (command, code, status)
    assert bool(document["errors"]) == (code != 0)
    return document


def test_one_module_is_not_called_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).parents[1] / "formats/data/awq/gemv_fast_g64/checkpoint"
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "converted  1 module to the Marlin layout",
        "kept       1 module in AWQ layout (1 unaligned); --dry-run lists them",
        "verified   2 modules value for value",
    ]


def test_json_of_convert(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "convert", made / "awq", "output", "--json", "--verify", "2")
    document = read_json(out, "convert", 0)
    assert (code, err) == (0, "")
    assert (document["source"], document["output"]) == (str(made / "awq"), "output")
    size = Path("output", SHARD).stat().st_size
    files = {SHARD: size, "generation_config.json": 25}
    assert document["files"] == [{"name": name, "bytes": size, "sha256": None} for name, size in files.items()]
    assert document["bytes"] == size
    assert document["seconds"] > 0
    assert document["left_behind"] == {"pytorch_model.bin": "pickled weights"}
    assert len(document["modules"]) == 7
    assert document["modules"][0] == {
        "name": "model.layers.0.mlp.down_proj",
        "K": 512,
        "N": 192,
        "layout": "marlin",
        "padded": None,
        "verified": True,
        "reason": "",
    }
    kept = {module["name"]: module["reason"] for module in document["modules"] if module["layout"] == "awq"}
    reason = "unaligned: K=192, N={} is neither a multiple of (128, 64) nor of (64, 128)"
    sizes = {"k_proj": 64, "o_proj": 192, "q_proj": 192, "v_proj": 64}
    assert kept == {f"model.layers.0.self_attn.{name}": reason.format(size_n) for name, size_n in sizes.items()}
    details = document["details"]
    assert (details["dry_run"], details["converted"], details["kept"], details["verified"]) == (False, 3, 4, 2)
    assert details["side_files"] == ["generation_config.json"]


def test_json_of_a_padded_conversion(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "convert", made / "awq", "output", "--json", "--unaligned", "pad")
    padded = {module["name"]: module["padded"] for module in read_json(out, "convert", 0)["modules"]}
    assert padded["model.layers.0.self_attn.k_proj"] == [256, 64]
    assert padded["model.layers.0.mlp.down_proj"] is None


def test_json_of_verify(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", made / "awq", made / "marlin", "--json", "--layers", "1")
    document = read_json(out, "verify", 0)
    assert (code, err) == (0, "")
    assert [module["name"] for module in document["modules"]] == ["model.layers.0.mlp.down_proj"]
    details = {"modules_verified": 1, "modules_converted": 3, "other_tensors": 14, "side_files": 1}
    details |= {"device": None, "gemm": None, "kind": "conversion", "differences": None}
    details |= {"formats": {"source": "awq", "output": "marlin_native"}, "of_the_format": {"source": [], "output": []}}
    assert document["details"] == details
    assert (document["source"], document["output"]) == (str(made / "awq"), str(made / "marlin"))


def test_json_of_revert(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "revert", made / "marlin", "back", "--json")
    document = read_json(out, "revert", 0)
    assert (code, err) == (0, "")
    found = {file["name"]: file["sha256"] for file in document["files"]}
    assert found == oracle.file_hashes(Path("back"))
    assert document["bytes"] == sum(path.stat().st_size for path in Path("back").iterdir())
    assert document["left_behind"] == {"pytorch_model.bin": "pickled weights"}


@pytest.mark.parametrize(("folder", "kind", "marlin"), [("awq", "awq", 0), ("marlin", "marlin_native", 3)])
def test_json_of_inspect(folder: str, kind: str, marlin: int, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", made / folder, "--json")
    document = read_json(out, "inspect", 0)
    assert (code, err) == (0, "")
    details = document["details"]
    assert (details["format"], details["bits"], details["group_size"], details["zero_point"]) == (kind, 4, 64, True)
    assert (details["model_type"], details["tensors"]) == ("llama", 23)
    assert details["unquantized_modules"] == ["lm_head"]
    assert document["bytes"] == (made / folder / SHARD).stat().st_size
    assert document["seconds"] > 0
    modules = {module["name"].rpartition(".")[2]: module for module in document["modules"]}
    assert sum(module["layout"] == "marlin" for module in modules.values()) == marlin
    down = modules["down_proj"]
    assert (down["K"], down["N"], down["group_size"], down["aligned"], down["reason"]) == (512, 192, 64, True, "")
    assert down["bytes"] == 512 * 192 // 2 + 8 * 192 // 2 + 8 * 192 * 2
    assert (modules["q_proj"]["aligned"], modules["q_proj"]["layout"]) == (False, "awq")
    assert modules["q_proj"]["reason"] == "K=192, N=192 is neither a multiple of (128, 64) nor of (64, 128)"


def test_json_of_demo(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "demo", "--json", "--quiet")
    document = read_json(out, "demo", 0)
    assert (code, err) == (0, "")
    details = document["details"]
    assert (details["converted"], details["kept"], details["identical_files"]) == (12, 16, 6)
    assert details["folder"] is None
    assert len(document["files"]) == 6
    assert list(Path().iterdir()) == []


FAILURES = {
    "convert": ["convert", "nowhere", "output"],
    "verify": ["verify", "nowhere", "nor_here"],
    "revert": ["revert", "nowhere", "output"],
    "inspect": ["inspect", "nowhere"],
}


@pytest.mark.parametrize("command", FAILURES)
def test_a_failure_is_told_on_both_streams_and_exits_1(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = (
        "nowhere: cannot open it as a checkpoint: no such file or folder; check the path; a repository of the Hub is "
        "written org/name"
    )
    assert run(capsys, *FAILURES[command]) == (1, "", f"error: {message}\n")
    assert run(capsys, *FAILURES[command], "--quiet") == (1, "", f"error: {message}\n")
    code, out, err = run(capsys, *FAILURES[command], "--json")
    (error,) = read_json(out, command, 1)["errors"]
    assert (code, err) == (1, f"error: {message}\n")
    assert error == {"file": "nowhere", "tensor": "", "code": "not-found", "message": message.partition(": ")[2]}
    assert list(Path().iterdir()) == []


def test_a_failed_demo_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full", "x").touch()
    code, out, err = run(capsys, "demo", "full", "--json")
    (error,) = read_json(out, "demo", 1)["errors"]
    assert (code, error["code"], err) == (1, "not-empty", "error: full: the folder is not empty; choose another\n")


def test_a_difference_exits_3(made: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["verify", made / "awq", damaged], ["revert", damaged, "back"]):
        code, out, err = run(capsys, *arguments, "--json")
        (error,) = read_json(out, str(arguments[0]), 3)["errors"]
        assert code == 3
        assert error["file"] == SHARD
        assert error["message"] in err
        assert run(capsys, *arguments)[:2] == (3, "")
    assert not Path("back", "config.json").exists()


def test_a_conversion_that_fails_its_own_verification_exits_3_and_is_never_loadable(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(task: ShardTask, progress: Any) -> ShardResult:
        done = rewrite_shard(task, progress)
        data = bytearray(done.partial.read_bytes())
        data[task.plan.target.data_start + task.plan.target.tensors["model.layers.0.mlp.up_proj.qweight"].start] ^= 1
        done.partial.write_bytes(data)
        return done

    with monkeypatch.context() as patch:
        patch.setattr("awq2marlin.pipeline.run.rewrite_shard", wrong)
        code, out, err = run(capsys, "convert", made / "awq", "output", "--json", "--verify", "all")
    (error,) = read_json(out, "convert", 3)["errors"]
    assert (code, error["tensor"]) == (3, "model.layers.0.mlp.up_proj.qweight")
    assert error["message"].startswith("value at row 0, column 0: the source has ")
    assert error["message"] in err
    assert not Path("output", "config.json").exists()
    code, _, err = run(capsys, "convert", made / "awq", "output")
    # After a difference nothing is trusted, so there is nothing to find damaged.
    assert (code, err) == (0, "starting again: an earlier run left no finished shard here\n")
    assert oracle.file_hashes(Path("output")) == oracle.file_hashes(made / "marlin")


USAGE = [
    ("frobnicate", "", "No such command 'frobnicate'"),
    ("convert", "convert", "Missing argument 'SOURCE'"),
    ("convert a b c", "convert", "unexpected extra argument"),
    ("convert a --bogus", "convert", "No such option: --bogus"),
    ("convert a --unaligned maybe", "convert", "'--unaligned': 'maybe' is not keep, pad or error"),
    ("convert a --verify some", "convert", "'some' is neither a number nor 'all' nor 'none'"),
    ("convert a --verify -1", "convert", "'-1' is neither a number nor 'all' nor 'none'"),
    ("convert a --workers 0", "convert", "'--workers': '0' is not a number from 1 to 256"),
    ("convert a --workers many", "convert", "'--workers': 'many' is not a number from 1 to 256"),
    ("batch a --jobs 257", "batch", "'--jobs': '257' is not a number from 1 to 256"),
    ("verify a b --device tpu", "verify", "'--device': 'tpu' is not auto, cpu or cuda"),
    ("convert a --device cpu --verify none", "convert", "--device needs --verify: it runs the modules"),
    ("convert a --device cpu --low-disk", "convert", "--device needs the whole source, which --low-disk removes"),
    ("batch a --device cpu --verify 0", "batch", "--device needs --verify: it runs the modules"),
    ("convert a --ovewrite", "convert", "No such option: --ovewrite. Did you mean --overwrite?\n"),
    ("convert a --out b", "convert", "No such option: --out\n"),
    ("convert a --out-dir b", "convert", "No such option: --out-dir\n"),
    ("verify a b --modlues 3", "verify", "No such option: --modlues. Did you mean --modules?\n"),
    ("convert a --private", "convert", "--private needs --push-to"),
    (
        "convert a --revision x",
        "convert",
        "--revision needs --push-to; for a revision of the source, write org/name@REVISION",
    ),
    ("convert a --commit-message x", "convert", "--commit-message needs --push-to"),
    ("convert a --push-to verify", "convert", "'verify' is not a repository name (org/name)"),
    ("push a b/c --create-pr --revision x", "push", "a pull request is opened on main; drop --revision"),
    ("verify a b --plot x.png", "verify", "--plot needs --device: there is nothing to plot otherwise"),
    ("verify a b --modules none", "verify", "'none' is neither a number nor 'all'"),
    ("verify a b --modules 3 --layers 2", "verify", "--modules and --layers are two names of one argument"),
    ("verify a", "verify", "Missing argument 'OUTPUT'"),
    ("verify a b --layers none", "verify", "'none' is neither a number nor 'all'"),
    ("revert", "revert", "Missing argument 'CONVERTED'"),
    ("revert a --workers 0", "revert", "'--workers'"),
    ("inspect", "inspect", "Missing argument 'PATH'"),
    ("demo a b", "demo", "unexpected extra argument"),
    ("convert a \x1b[31m b", "convert", "\\x1b[31m"),
]


@pytest.mark.parametrize(("line", "command", "text"), USAGE)
def test_a_usage_error_exits_2(line: str, command: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *line.split(" "))
    assert (code, out) == (2, "")
    assert text in err or "unexpected extra" in err
    assert "Invalid value: " not in err
    assert err.startswith("usage error: ")
    assert err.endswith(f"\nTry 'awq2marlin {command} --help'.\n" if command else "\nTry 'awq2marlin --help'.\n")
    assert "\x1b" not in err
    code, out, _ = run(capsys, *line.split(" "), "--json")
    (error,) = read_json(out, command, 2)["errors"]
    assert (code, error["code"]) == (2, "usage")


def test_an_interrupt_exits_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("awq2marlin.commands.inspect.inspect", interrupted)
    code, out, err = run(capsys, "inspect", "x", "--json")
    (error,) = read_json(out, "inspect", 130)["errors"]
    assert (code, error["code"]) == (130, "interrupted")
    assert err == "error: interrupted\n"


def test_many_problems_are_counted_and_all_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {f"part{number}.{name}": size for number in range(5) for name, size in layer().items()}
    write_checkpoint(Path("awq"), plain(modules, {}))
    say(group_size=32)(Path("awq"))
    code, out, err = run(capsys, "convert", "awq", "--json")
    assert code == 1
    assert len(read_json(out, "convert", 1)["errors"]) == 35
    lines = err.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("error: 35 problems:", "... and 15 more of this kind", 22)


def test_what_all_layers_have_in_common_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {name: size for number in range(5) for name, size in layer(number).items()}
    narrow = {name: (128, 96) for name in modules if "gate" in name or "up" in name}
    write_checkpoint(Path("awq"), plain({**modules, **narrow, "model.layers.7.q_proj": (64, 64)}, {}))
    code, out, err = run(capsys, "convert", "awq", "--unaligned", "error", "--json")
    assert code == 1
    assert len(read_json(out, "convert", 1)["errors"]) == 11
    lines = err.splitlines()
    assert lines[0] == "error: 11 problems:"
    assert [line.partition(": unaligned")[0] for line in lines[1:]] == [
        "model.safetensors: model.layers.*.mlp.gate_proj",
        "model.safetensors: model.layers.*.mlp.up_proj",
        "model.safetensors: model.layers.7.q_proj",
    ]
    assert [line.endswith(" (5 of them)") for line in lines[1:]] == [True, True, False]


# --- what people see -----------------------------------------------------------------------------------------------


def test_quiet_prints_nothing_but_errors(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", made / "awq", "dry", "--quiet", "--dry-run") == (0, "", "")
    assert run(capsys, "convert", made / "awq", "output", "--quiet") == (0, "", "")
    assert run(capsys, "verify", made / "awq", "output", "-q") == (0, "", "")
    assert run(capsys, "revert", "output", "back", "-q") == (0, "", "")
    assert run(capsys, "inspect", "output", "-q") == (0, "", "")
    assert run(capsys, "demo", "shown", "-q") == (0, "", "")
    assert sorted(path.name for path in Path().iterdir()) == ["back", "output", "shown"]


def test_dry_run_writes_nothing_and_tells_what_becomes_of_every_module(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "convert", made / "awq", "output", "--dry-run")
    assert (code, err) == (0, "")
    assert list(Path().iterdir()) == []
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "module K N modules action" in lines
    assert "model.layers.*.mlp.down_proj 512 192 1 convert" in lines
    assert "model.layers.*.self_attn.k_proj 192 64 1 keep" in lines
    assert lines.count("keep: unaligned: (K, N) is neither a multiple of (128, 64) nor of (64, 128)") == 1
    size = (made / "marlin" / SHARD).stat().st_size
    assert f"would write {size_text(size)} to output" in lines
    assert "would convert 3 modules, keep 4 in AWQ layout" in lines
    (told,) = (line for line in lines if "pytorch_model.bin" in line)
    assert told.startswith("warning left behind, so 'revert' cannot restore it: pytorch_model.bin (")


def test_hidden_files_that_are_left_behind_are_listed_without_a_warning(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "awq", "awq")
    Path("awq/.gitattributes").write_text("*.safetensors filter=lfs\n")
    for options in (["--dry-run"], []):
        code, out, _ = run(capsys, "convert", "./awq", "output", *options)
        assert code == 0
        lines = out.splitlines()
        assert "not carried over: .gitattributes (hidden)" in lines
        assert [line for line in lines if ".gitattributes" in line and "warning" in line] == []


def test_a_dry_run_says_what_would_stop_the_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def warned(command: str, *arguments: object) -> list[str]:
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        document = read_json(run(capsys, command, *arguments, "--dry-run", "--json")[1], command, 0)
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
        return [line for line in document["warnings"] if "would stop" in line]

    stops = "a run would stop: "
    assert warned("convert", made / "awq", "output") == []
    run(capsys, "convert", made / "awq", "output", "-q")
    finished = "output: the folder holds a finished conversion; use --overwrite to replace it, or choose another folder"
    assert warned("convert", made / "awq", "output") == [stops + finished]
    assert f"warning    {stops}{finished}" in run(capsys, "convert", made / "awq", "output", "--dry-run")[1]
    assert warned("convert", made / "awq", "output", "--overwrite") == []
    assert "finished conversion" not in run(capsys, "convert", made / "awq", "output", "--overwrite", "-q")[2]

    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    mine = "taken: the folder is not empty (notes.txt); choose another, or an empty one"
    assert warned("convert", made / "awq", "taken", "--overwrite") == [stops + mine]
    assert warned("revert", "output", "taken") == [stops + mine]
    assert warned("revert", "output", "taken", "--overwrite") == []
    assert f"{stops}{mine}\n" in run(capsys, "revert", "output", "taken", "--dry-run")[2]
    Path("taken/file").write_text("mine")
    assert warned("convert", made / "awq", "taken/file") == [
        f"{stops}taken/file: a file of this name exists; choose another output folder"
    ]
    below = f"{stops}taken/file/below/it: a part of this path is a file, not a folder; check the path"
    assert warned("convert", made / "awq", "taken/file/below/it") == [below]
    assert warned("revert", "output", "taken/file/below/it") == [below]


@pytest.mark.parametrize(
    ("flags", "said"), [(0, "permission denied"), (os.ST_RDONLY, "the file system is mounted read-only")]
)
def test_a_dry_run_says_that_a_place_cannot_be_written(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: int, said: str
) -> None:
    """For root every folder can be written, and who runs the tests cannot mount one read-only."""
    place, access = made.absolute().parent, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    for name in "new", "new/below/it":
        warned = run(capsys, "convert", made / "awq", place / name, "--dry-run")[1]
        assert f"warning    a run would stop: {place}: {said}" in warned


def test_dry_run_of_padding_tells_the_sizes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "convert", made / "awq", "output", "--dry-run", "--unaligned", "pad")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "model.layers.*.self_attn.k_proj 192 64 1 pad to 256x64" in lines


def test_dry_run_as_json_lists_every_module_and_the_same_bytes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = read_json(run(capsys, "convert", made / "awq", "output", "--dry-run", "--json")[1], "convert", 0)
    assert list(Path().iterdir()) == []
    wet = read_json(run(capsys, "convert", made / "awq", "output", "--json", "--verify", "none")[1], "convert", 0)
    assert (dry["details"].pop("dry_run"), wet["details"].pop("dry_run")) == (True, False)
    assert [dry.pop("seconds") >= 0, wet.pop("seconds") >= 0] == [True, True]
    assert dry == wet


def test_convert_tells_what_it_did(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "convert", made / "awq", "output")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "converted  3 modules to the Marlin layout"
    assert lines[1] == "kept       4 modules in AWQ layout (4 unaligned); --dry-run lists them"
    assert lines[2].startswith("verified   3 modules value for value")
    assert "output     output" in lines
    assert set(oracle.file_hashes(Path("output"))) == SIX_FILES


def test_a_conversion_that_gains_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("awq"), plain({"model.q_proj": (64, 64)}, {}))
    code, out, _ = run(capsys, "convert", "awq")
    assert code == 0
    assert (
        "no module could be converted, so this checkpoint gains nothing; --unaligned pad converts what does not fit"
        in out
    )


@pytest.mark.parametrize(("given", "verified"), [("all", 3), ("none", 0), ("0", 0), ("1", 1), ("2", 2), ("99", 3)])
def test_verify_takes_a_number_all_or_none(
    given: str, verified: int, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "convert", made / "awq", "output", "--verify", given, "--json")
    document = read_json(out, "convert", 0)
    assert (code, document["details"]["verified"]) == (0, verified)
    assert sum(module["verified"] for module in document["modules"]) == verified


@pytest.mark.parametrize("workers", [1, 3])
def test_workers(workers: int, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", made / "awq", "output", "--workers", workers)[0] == 0
    assert run(capsys, "verify", made / "awq", "output", "--workers", workers)[0] == 0
    assert run(capsys, "revert", "output", "back", "--workers", workers)[0] == 0
    assert oracle.file_hashes(Path("output")) == oracle.file_hashes(made / "marlin")


def test_the_default_output_is_named_after_the_folder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "awq", "some.model-AWQ")
    assert run(capsys, "convert", "some.model-AWQ", "-q")[0] == 0
    assert set(oracle.file_hashes(Path("some.model-AWQ-marlin"))) == SIX_FILES
    assert run(capsys, "convert", "some.model-AWQ")[:2] == (1, "")
    assert run(capsys, "convert", "some.model-AWQ", "--overwrite", "-q")[0] == 0


def test_the_default_output_of_a_hub_snapshot_is_named_after_its_repository(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = hub_snapshot(Path(shutil.copytree(made / "awq", tmp_path / "download")))
    assert run(capsys, "convert", snapshot, "-q")[0] == 0
    assert set(oracle.file_hashes(Path("tiny-AWQ-marlin"))) == SIX_FILES


def test_a_folder_of_any_name_is_converted_and_printed_escaped(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff\x1b[31m[bold]")
    shutil.copytree(made / "awq", name)
    code, out, err = run(capsys, "convert", name)
    assert (code, err) == (0, "")
    assert "output     \\udcff\\x1b[31m[bold]-marlin" in out.splitlines()
    assert json.loads(run(capsys, "inspect", f"{name}-marlin", "--json")[1])["source"].endswith(f"{name}-marlin")


@pytest.mark.parametrize(
    ("folder", "head", "row"),
    [
        ("awq", "AWQ checkpoint, 4 bits, group size 64, with zero points, llama", "awq 1 53.0 kB yes"),
        ("marlin", "Marlin-native checkpoint, 4 bits, group size 64, with zero points, llama", "marlin 1 53.0 kB yes"),
    ],
)
def test_inspect_shows_a_table(
    folder: str, head: str, row: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "inspect", made / folder)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert lines[0] == head
    assert f"model.layers.*.mlp.gate_proj 192 512 {row}" in lines
    assert "model.layers.*.self_attn.q_proj 192 192 awq 1 19.9 kB no" in lines
    assert lines.count("no: (K, N) is neither a multiple of (128, 64) nor of (64, 128)") == 1
    assert "7 quantized modules, 1 in full precision" in lines


@pytest.mark.parametrize("columns", [60, 80, 100, 160])
@pytest.mark.parametrize("command", ["inspect", "convert --dry-run"])
def test_a_table_fits_the_terminal_and_breaks_no_part_of_a_name(
    command: str, columns: int, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run(capsys, *command.split(" "), made / "awq")[1].splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("module"))
    last = next(at for at, line in enumerate(lines) if line.startswith(("no: ", "keep: ")))
    table = lines[first:last]
    assert max(map(len, table)) <= columns
    names = [line.split("  ")[0].strip() for line in table[2:]]
    shown = "".join(names) + " "
    parts = {"model.layers.*.self_attn.q_proj", "model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"}
    assert [name for name in parts if name not in shown] == []
    assert {
        name for name in names if not re.fullmatch(r"(model\.|layers\.|\*\.|self_attn\.|mlp\.|[a-z]+_proj)+", name)
    } == set()


def test_inspect_shows_padded_modules(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "convert", made / "awq", "output", "--unaligned", "pad")
    _, out, _ = run(capsys, "inspect", "output")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    size = size_text(256 * 64 // 2 + 4 * 64 // 2 + 4 * 64 * 2)
    assert f"model.layers.*.self_attn.k_proj 192 64 marlin padded to 256x64 1 {size} no" in lines


def test_verify_and_revert_tell_what_they_did(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", made / "awq", made / "marlin")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "equal: 3 of 3 converted modules, value for value"
    code, out, err = run(capsys, "revert", made / "marlin", "back")
    assert (code, err) == (0, "")
    hashes = oracle.file_hashes(made / "awq")
    assert out.splitlines()[:4] == [f"{hashes[name]}  {name}" for name in sorted(set(hashes) - {"pytorch_model.bin"})]


def test_one_thing_is_not_told_as_several(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = awq2marlin.verify(made / "awq", made / "marlin")
    capsys.readouterr()
    show(replace(result, tensors=1, files=1))
    assert capsys.readouterr().out.splitlines()[1] == "       1 other tensor and 1 file, byte for byte"
    show(replace(result, tensors=0, files=2))
    assert capsys.readouterr().out.splitlines()[1] == "       0 other tensors and 2 files, byte for byte"


def test_a_resumed_revert_tells_what_the_earlier_run_did(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = awq2marlin.revert(made / "marlin", "again")
    capsys.readouterr()
    show(replace(result, resumed=(SHARD,), bytes=2_000_000, seconds=0.5))
    told = "restored 4 files (1 shard by an earlier run), 2.0 MB in 0.5 s, all digests match"
    assert told in capsys.readouterr().out.splitlines()


def test_a_dry_run_of_revert_writes_nothing_and_lists_every_file(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "revert", made / "marlin", "--dry-run")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2].startswith("would restore 4 files, ")
    assert out.splitlines()[-2].endswith(" to marlin-reverted")
    document = read_json(run(capsys, "revert", made / "marlin", "--dry-run", "--json")[1], "revert", 0)
    assert document["details"] == {"dry_run": True, "resumed": [], "restores": "files"}
    assert list(Path().iterdir()) == []
    assert run(capsys, "revert", made / "marlin", "-q") == (0, "", "")
    written = {file.name: file.stat().st_size for file in Path("marlin-reverted").iterdir()}
    assert {file["name"]: file["bytes"] for file in document["files"]} == written
    assert {file["sha256"] for file in document["files"]} == {None}


def test_revert_does_it_again_only_when_asked(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "revert", made / "marlin", "back", "-q")[0] == 0
    assert run(capsys, "revert", made / "marlin", "back", "-q")[0] == 1
    assert run(capsys, "revert", made / "marlin", "back", "-q", "--overwrite")[0] == 0


def test_demo_shows_a_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "demo")
    assert code == 0
    assert [line[0] for line in out.splitlines() if line[0].isdigit()] == list("12345")
    assert "5. compared  all 6 files with the first checkpoint: identical, byte for byte" in out
    assert list(Path().iterdir()) == []
    code, out, _ = run(capsys, "demo", "kept")
    assert code == 0
    assert sorted(path.name for path in Path("kept").iterdir()) == ["awq", "marlin", "reverted"]
    assert oracle.file_hashes(Path("kept/awq")) == oracle.file_hashes(Path("kept/reverted"))
    assert "kept in kept: awq/, marlin/, reverted/" in out


# --- progress ------------------------------------------------------------------------------------------------------

LINE = re.compile(r"(convert|verify|revert): (\d+) %, [\d.]+ \w?B of [\d.]+ \w?B, [\d.]+ \w?B/s, \d+ s left")


def test_progress_is_plain_lines_where_there_is_no_terminal(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_progress, "PLAIN_INTERVAL", 0.0)
    code, out, err = run(capsys, "convert", made / "awq", "output", "--workers", "1", "--json")
    told = [LINE.fullmatch(line) for line in err.splitlines()]
    assert code == 0
    assert all(told)
    assert [(line[1], line[2]) for line in told if line and line[2] == "100"] == [("convert", "100"), ("verify", "100")]
    assert read_json(out, "convert", 0)["exit_code"] == 0
    assert LINE.fullmatch(run(capsys, "revert", "output", "back")[2].splitlines()[-1])
    assert run(capsys, "verify", made / "awq", "output", "-q")[2] == ""


def run_on_terminal(*arguments: object) -> tuple[int, str]:
    """Runs a command with standard error on a pseudo-terminal: exit code, what it printed there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = start(*arguments, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # raised where the other side closed
        while chunk := os.read(ours, 1 << 16):
            text += chunk
    os.close(ours)
    return process.wait(timeout=60), text.decode()


def test_progress_is_a_bar_on_a_terminal(made: Path, tmp_path: Path) -> None:
    code, text = run_on_terminal("convert", made / "awq", tmp_path / "output")
    assert code == 0
    assert "\rconvert:   0%|" in text
    assert "B/s" in text
    assert text.endswith("\r"), "the bar is wiped when it is done"


def test_an_error_on_a_terminal_stands_on_a_line_of_its_own(made: Path, damaged: Path) -> None:
    code, text = run_on_terminal("verify", made / "awq", damaged)
    assert code == 3
    assert "\rverify:   0%|" in text
    assert "\rerror: model.safetensors: " in text


# --- never a traceback ---------------------------------------------------------------------------------------------

MISTAKES = {
    "a_file_as_source": ("convert {made}/awq/config.json", "a checkpoint is a folder"),
    "a_file_as_output": ("convert {made}/awq {made}/file", "a file of this name exists"),
    "the_source_as_output": ("convert {made}/awq {made}/awq", "the output folder is the source"),
    "inside_the_source": ("convert {made}/awq {made}/awq/x", "is inside the source"),
    "above_the_source": ("convert {made}/awq {made}", "the source is inside the output folder"),
    "finished_already": ("convert {made}/awq {made}/marlin", "use --overwrite to replace it"),
    "converted_already": ("convert {made}/marlin x", "already Marlin-native"),
    "unaligned_refused": ("convert {made}/awq x --unaligned error", "use --unaligned keep or pad"),
    "no_such_parent": ("convert {made}/awq {made}/file/x", "a part of this path is a file"),
    "not_converted": ("revert {made}/awq x", "there is nothing to revert"),
    "over_the_source": ("revert {made}/marlin {made}/awq", "the folder is not empty"),
    "not_a_checkpoint": ("inspect {made}", "config.json: not found in "),
    "a_very_long_name": ("inspect {long}", "does not allow a name this long"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(name: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, text = MISTAKES[name]
    before = oracle.file_hashes(made)
    code, out, err = run(capsys, *line.format(made=made, long="x" * 5000).split(" "))
    assert (code, out) == (1, "")
    assert text in err
    assert err.startswith("error: ")
    assert oracle.file_hashes(made) == before
    assert list(Path().iterdir()) == []


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awq2marlin.commands.verify.verify", lambda *_, **__: pytest.fail("the work was begun"))
    arguments = ["verify", made / "awq", made / "marlin", "--device", "cpu", "--plot"]
    code, out, err = run(capsys, *arguments, "errors.xyz")
    assert (code, out) == (1, "")
    assert "errors.xyz: a picture's name must end in .png" in err
    assert run(capsys, *arguments, "none/errors.png")[2] == "error: none: no such file or folder; check the path\n"


FULL = "error: cannot write to standard output: no space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("inspect {made}/awq --json", ""),
        ("inspect {made}/awq", ""),
        (
            "inspect {made}/none --json",
            "error: {made}/none: cannot open it as a checkpoint: no such file or folder; check the path\n",
        ),
        ("revert {made}/marlin back --quiet --json", ""),
        ("--help", ""),
        ("inspect --help", ""),
        ("--version", ""),
    ],
)
def test_an_output_that_takes_nothing_is_told_once(arguments: str, told: str, made: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start(*arguments.format(made=made).split(" "), stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    assert err.decode() == told.format(made=made) + FULL
    assert process.returncode == 1
    assert not arguments.startswith("revert") or Path("back/config.json").is_file()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_unexpected_error_shows_its_traceback_after_the_json(
    options: list[str], made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: str) -> None:
        raise RuntimeError(f"no \x1b[31m{Path(path).name}")

    monkeypatch.setattr("awq2marlin.commands.inspect.inspect", wrong)
    with pytest.raises(RuntimeError, match=r"no .*awq"):
        main(["inspect", str(made / "awq"), *options])
    out, err = capsys.readouterr()
    assert err == ""
    if not options:
        assert out == ""
        return
    (error,) = read_json(out, "inspect", 1)["errors"]
    assert error["code"] == "internal-error"
    assert error["message"].endswith("report it with the traceback: RuntimeError: no \x1b[31mawq")


@pytest.mark.parametrize("name", ["inspect", "convert", "convert to", "revert to", "verify"])
def test_a_name_with_a_null_character_is_refused(name: str, made: Path) -> None:
    bad = str(made / "a\0b")
    calls = {
        "inspect": lambda: awq2marlin.inspect(bad),
        "convert": lambda: awq2marlin.convert(bad),
        "convert to": lambda: awq2marlin.convert(made / "awq", bad),
        "revert to": lambda: awq2marlin.revert(made / "marlin", bad),
        "verify": lambda: awq2marlin.verify(made / "awq", bad),
    }
    with pytest.raises(awq2marlin.Awq2MarlinError, match="a NUL character"):
        calls[name]()


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect {made}/marlin",
        "inspect {made}/awq --json",
        "verify {made}/awq {made}/marlin",
        "convert {made}/awq x --dry-run",
        "frobnicate --json",
        "--help",
        "--version",
    ],
)
def test_a_reader_that_leaves_is_no_error_worth_telling(arguments: str, made: Path) -> None:
    """As with ``| head -1``; the pipe's other end is closed before anything is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments.format(made=made).split(" "), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    told = [line for line in err.decode().splitlines() if not line.startswith(("usage error:", "Try 'awq2marlin"))]
    assert told == []
    assert process.returncode in (1, 2)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_standard_stream_that_is_closed_stops_nothing(closed: int, made: Path) -> None:
    """As with ``>&-``, which some supervisors do."""
    command = f"batch - --record record.jsonl {closed}>&-" if closed else "batch - 0<&-"
    command = f"{sys.executable} -m awq2marlin {command}"
    done = subprocess.run(
        ["sh", "-c", command], input=f"{made / 'awq'}\n", capture_output=True, text=True, timeout=60, check=False
    )
    if closed == 0:
        assert (done.returncode, done.stderr) == (1, "error: standard input: the list is empty\n")
    else:
        assert done.returncode == 0, done.stderr
        assert Path("awq-marlin/config.json").exists()
        assert "Traceback" not in done.stderr


def test_a_working_directory_that_was_removed_is_told() -> None:
    Path("gone").mkdir()
    command = f"cd gone && rmdir ../gone && {sys.executable} -m awq2marlin inspect ./model"
    environment = {**os.environ, "PYTHONPATH": str(Path(awq2marlin.__file__).parent.parent)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, check=False)
    said = "the working directory was removed; change to another one and run the command again"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: model: cannot open it as a checkpoint: {said}\n"
