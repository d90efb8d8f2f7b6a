"""Options are stated once: every wrong one is refused in one wording, which a command line puts in its own spelling."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import awq2marlin
from awq2marlin import PushTarget, convert, convert_many, revert, verify
from awq2marlin.arguments import ArgumentError, Checked, kind_of
from awq2marlin.commands.options import TARGET_OPTIONS, ConvertOptions, RevertOptions, Unaligned, VerifyOptions
from awq2marlin.pipeline import plan

SOURCE = "; for a revision of the source, write org/name@REVISION"

WRONG: dict[str, dict[str, Any]] = {
    "unaligned must be 'keep', 'pad' or 'error', found 'maybe'": {"unaligned": "maybe"},
    "unaligned is about Marlin's shapes, so it cannot be used with to": {"to": "awq", "unaligned": "keep"},
    "workers must be a number from 1 to 256, found 0": {"workers": 0},
    "workers must be a number from 1 to 256, found 257": {"workers": 257},
    "workers must be a number from 1 to 256, found True": {"workers": True},
    "overwrite must be true or false, found 1": {"overwrite": 1},
    "verify must be a number >= 0, 'all' or 'none', found -1": {"verify": -1},
    "verify must be a number >= 0, 'all' or 'none', found 'some'": {"verify": "some"},
    "device must be 'auto', 'cpu' or 'cuda', found 'tpu'": {"device": "tpu"},
    "device needs verify: it runs the modules that are compared": {"device": "cpu", "verify": 0},
    "device needs the whole source, which low_disk removes; use 'verify' afterwards": {
        "device": "cpu",
        "low_disk": True,
    },
    "push_to must be a non-empty string or a PushTarget, found 7": {"push_to": 7},
    "'verify' is not a repository name (org/name)": {"push_to": "verify"},
    "'{verify}' is not a repository name (org/name)": {"push_to": "{verify}"},
    "commit_message needs push_to": {"commit_message": "x"},
    "commit_message must be a non-empty string, found ''": {"push_to": "org/name", "commit_message": ""},
}

WRONG_BESIDE_EACH_OTHER: dict[str, dict[str, Any]] = {
    "private needs push_to": {"private": True},
    f"revision needs push_to{SOURCE}": {"revision": "x"},
    "revision must be a branch, not a commit": {"push_to": "org/name", "revision": "a" * 40},
    "revision must be a non-empty string, found ''": {"push_to": "org/name", "revision": ""},
    "a pull request is opened on main; drop revision": {"push_to": "org/name", "revision": "x", "create_pr": True},
}


@pytest.mark.parametrize(("sentence", "options"), WRONG.items())
def test_what_is_wrong_is_refused_in_one_wording(sentence: str, options: dict[str, Any], tmp_path: Path) -> None:
    for make in (ConvertOptions, lambda **given: convert(tmp_path / "no source", **given)):
        with pytest.raises(ValueError, match=r".") as raised:
            make(**options)
        assert str(raised.value) == sentence
    with pytest.raises(ArgumentError) as refused:
        ConvertOptions.of(options)
    assert sentence == str(refused.value) or "push_to" in options


@pytest.mark.parametrize(("sentence", "options"), WRONG_BESIDE_EACH_OTHER.items())
def test_options_of_the_target_may_stand_beside_the_others(sentence: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as raised:
        ConvertOptions.of(options)
    assert str(raised.value) == sentence


def test_a_command_line_spells_options_but_not_what_was_found() -> None:
    def spelled(**options: object) -> str:
        with pytest.raises(ArgumentError) as raised:
            ConvertOptions.of(options)
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
        return raised.value.spelled(lambda name: "--" + name.replace("_", "-"))

    assert spelled(device="cpu", low_disk=True).startswith("--device needs the whole source, which --low-disk removes")
    assert spelled(push_to="{verify}") == "'{verify}' is not a repository name (org/name)"
    assert spelled(unaligned="{verify} pad") == "--unaligned must be 'keep', 'pad' or 'error', found '{verify} pad'"


def test_options_of_the_target_make_one() -> None:
    given = {"push_to": "org/name", "private": True, "create_pr": False, "revision": None, "overwrite": True, "jobs": 3}
    options = ConvertOptions.of({**given, "low_disk": True})
    assert options.target == PushTarget("org/name", private=True, overwrite=True)
    assert (options.passes_on, options.overwrite, options.verify) == (True, True, 8)
    assert ConvertOptions(push_to="org/name").target == PushTarget("org/name")
    assert ConvertOptions.of({}) == ConvertOptions()
    assert {*TARGET_OPTIONS} < {each.name for each in fields(PushTarget)}


@pytest.mark.parametrize(
    ("function", "options", "others"),
    [
        (convert, ConvertOptions, {"source", "output", "executor", "progress"}),
        (revert, RevertOptions, {"converted", "output", "executor", "progress"}),
        (verify, VerifyOptions, {"source", "output", "progress"}),
    ],
    ids=["convert", "revert", "verify"],
)
def test_a_function_takes_its_options_with_their_defaults(function: Any, options: type, others: set[str]) -> None:
    parameters = {
        name: each.default for name, each in inspect.signature(function).parameters.items() if name not in others
    }
    assert parameters == {each.name: each.default for each in fields(options)}


def test_the_choices_of_the_plan_are_those_of_the_options() -> None:
    assert Unaligned == plan.Unaligned


def test_options_of_revert_check_themselves_too() -> None:
    assert RevertOptions.of({"workers": 2, "dask": "x"}) == RevertOptions(workers=2)
    for options in ({"workers": 0}, {"dry_run": None}, {"low_disk": "yes"}, {"overwrite": 1}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must be "):
            RevertOptions(**options)


def test_verify_takes_the_number_of_modules_by_either_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two names of one argument; give only modules"):
        verify(tmp_path, tmp_path, modules=1, layers=2)
    for name in ("modules", "layers"):
        with pytest.raises(ValueError, match=f"{name} must be a number >= 0 or 'all', found 'none'"):
            verify(tmp_path, tmp_path, **{name: "none"})


@pytest.mark.parametrize("name", ["modules", "workers", "device", "layers"])
def test_options_of_verify_check_themselves_too(tmp_path: Path, name: str) -> None:
    for value in ("a", 1.5, True):
        for make in (VerifyOptions, lambda **given: verify(tmp_path, tmp_path, **given)):
            with pytest.raises(ValueError, match=f"^{name} must be "):
                make(**{name: value})


@pytest.mark.parametrize("name", ["jobs", "workers", "retry_failed", "dry_run", "executor", "progress"])
def test_options_of_a_batch_are_checked_too(tmp_path: Path, name: str) -> None:
    for value in (0, "a", 1.5):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            convert_many([tmp_path], **{name: value})


@pytest.mark.parametrize(
    ("function", "name", "needed"),
    [
        (convert, "executor", "an Executor"),
        (convert, "progress", "a Progress"),
        (revert, "executor", "an Executor"),
        (revert, "progress", "a Progress"),
        (verify, "progress", "a Progress"),
    ],
)
def test_what_is_no_executor_or_progress_is_refused(function: Any, name: str, needed: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be {needed}, found 3$"):
        function(tmp_path, tmp_path / "out", **{name: 3})


def test_a_type_says_what_an_argument_may_be() -> None:
    @dataclass(frozen=True)
    class Options(Checked):
        size: Annotated[int, range(2, 5)] | Literal["any"] = 2
        name: str | None = None

    Options(size=4, name="x")
    Options(size="any")
    with pytest.raises(ValueError, match="size must be a number from 2 to 4 or 'any', found 5"):
        Options(size=5)
    with pytest.raises(ValueError, match="name must be a non-empty string, found ''"):
        Options(name="")
    assert kind_of(Literal["a", "b"] | bool | None).needed == "'a', 'b' or true or false"


def test_options_import_nothing_heavy() -> None:
    code = (
        "import sys, awq2marlin.commands.options; "
        "heavy = {'numpy', 'numba', 'torch', 'huggingface_hub', 'rich', 'tqdm', 'typer', 'xxhash', 'yaml'}; "
        "print(sorted(heavy & {*sys.modules}))"
    )
    root = str(Path(awq2marlin.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
