"""Whoever called version 0.1 from Python or a shell, or read its JSON objects, can go on; new things may join."""

import json
import re
import runpy
import sys

import pytest

import awq2marlin

from .helpers import DATA, REPORTS, arguments, comparable, described_api, documented_keys, stage


def stored(name):
    return json.loads((DATA / name).read_text("utf-8"))


API, COMMANDS, DOCUMENTS, STORED_REPORTS = map(stored, ("api.json", "commands.json", "documents.json", "reports.json"))


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs what ``python -m awq2marlin`` runs, in this process; returns exit code, standard output and errors."""

    def run_here(*line):
        monkeypatch.setattr(sys, "argv", ["awq2marlin", *line])
        monkeypatch.delitem(sys.modules, "awq2marlin.__main__", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("awq2marlin", run_name="__main__")
        captured = capsys.readouterr()
        return ended.value.code or 0, re.sub(r"\x1b\[[0-9;]*m", "", captured.out), captured.err

    return run_here


# --- JSON objects --------------------------------------------------------------------------------------------------

#: Texts for people, which may change.
FOR_PEOPLE = {"message"}

#: Lists of sentences for people, to which new ones may be added.
MAY_GROW = {"warnings"}

#: Numbers of what an engine can do with the plugin, which may do more than then.
MAY_RISE = {"largest_tensor_parallel_size"}


def changes(then, now, where=""):
    """Yields every place at which a JSON value of today lacks, or says otherwise, what one of 0.1 said."""
    if type(then) is not type(now):
        yield f"{where}: was {then!r}, is {now!r}"
    elif isinstance(then, dict):
        yield from (f"{where}/{key}: gone" for key in then if key not in now)
        yield from (f"{where}/{key}: less" for key in then.keys() & MAY_GROW if {*then[key]} - {*now[key]})
        yield from (f"{where}/{key}: fell" for key in then.keys() & now.keys() & MAY_RISE if now[key] < then[key])
        for key in (then.keys() & now.keys()) - FOR_PEOPLE - MAY_GROW - MAY_RISE:
            yield from changes(then[key], now[key], f"{where}/{key}")
        yield from (f"{where}/{key}: empty" for key in then.keys() & now.keys() & FOR_PEOPLE if not now[key])
    elif isinstance(then, list) and len(then) == len(now):
        for number, (old, new) in enumerate(zip(then, now, strict=True)):
            yield from changes(old, new, f"{where}[{number}]")
    elif then != now:
        yield f"{where}: was {then!r}, is {now!r}"


@pytest.mark.parametrize("name", REPORTS)
def test_every_key_of_a_json_object_is_still_there_with_its_type_and_value(name, run, hub, tmp_path):  # noqa: ARG001
    code, out, _ = run(*arguments(name, stage(tmp_path)))
    report = json.loads(out)
    assert report["exit_code"] == code
    assert list(changes(STORED_REPORTS[name], comparable(report, tmp_path))) == []


def test_a_json_object_that_lost_something_would_be_noticed():
    then = {"a": [{"b": 1, "message": "old"}], "c": None, "d": {"x": 1}}
    assert list(changes(then, {"a": [{"b": 1, "message": "new", "more": 2}], "c": None, "d": {"x": 1}})) == []
    now = {"a": [{"b": "1", "message": ""}], "c": 0, "d": {}}
    assert sorted(changes(then, now)) == [
        "/a[0]/b: was 1, is '1'",
        "/a[0]/message: empty",
        "/c: was None, is 0",
        "/d/x: gone",
    ]


# --- the command line ----------------------------------------------------------------------------------------------


def example(takes):
    """A value for an option that takes one, as ``--help`` called it."""
    if takes.startswith("<int"):
        return ["1"]
    return [] if takes == "<bool>" else [takes.strip("<>").split("|")[0].replace("N", "1")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_still_taken_and_listed(command, run):
    options = {name: option for name, option in COMMANDS[command].items() if name != "--help"}
    line = [word for name, option in options.items() for word in (name, *example(option["takes"]))]
    short = [option["short"] for option in options.values() if option["short"]]
    code, out, err = run(command, *line, *short, "--help")
    assert (code, err) == (0, "")
    for option in COMMANDS[command]:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", out), f"{command} --help does not list {option}"


def test_an_option_that_is_none_would_be_noticed(run):
    assert run("convert", "--low-disks", "--help")[0] == 2
    assert run("convert", "--low-disk", "1", "--dry-run=1", "--help")[0] == 2


CHOICES = [
    (command, name, value.replace("N", "2"))
    for command, options in COMMANDS.items()
    for name, option in options.items()
    if "|" in option["takes"]
    for value in option["takes"].strip("<>").split("|")
]


@pytest.mark.parametrize(("command", "option", "value"), CHOICES)
def test_every_choice_of_an_option_is_still_one(command, option, value, run, tmp_path):
    folders = [str(tmp_path / "nothing"), *([str(tmp_path / "out")] if command != "batch" else [])]
    code, out, _ = run(command, *folders, option, value, "--json")
    (error,) = json.loads(out)["errors"]
    assert code == 1
    assert error["code"] in ({"not-found", "no-gpu"} if value == "cuda" else {"not-found"})


def test_there_are_choices():
    assert ("convert", "--unaligned", "pad") in CHOICES
    assert ("verify", "--layers", "2") in CHOICES
    assert len(CHOICES) == 23


def test_the_version_is_still_printed(run):
    assert run("--version")[:2] == (0, f"awq2marlin {awq2marlin.__version__}\n")


# --- Python --------------------------------------------------------------------------------------------------------

#: What is meant to differ: the default that a parameter got, by function and parameter. May differ, need not.
NEW_DEFAULTS = {
    ("AWQMarlinConfig.get_quant_method", "prefix"): "''",
    ("convert", "unaligned"): "None",  # which keeps, as before, and tells an explicit "keep" from none
    ("revert", "output"): "None",
}

#: Functions whose parameters are shown by calls instead.
SHOWN_BY_CALLS = {"unpack_cols"}


def broken_calls(where, then, now):
    """Yields what keeps calls that were right at 0.1 from meaning the same today."""
    by_name = {parameter["name"]: parameter for parameter in now}
    for place, old in enumerate(then):
        new = by_name.pop(old["name"], None)
        if new is None:
            yield f"{where}: {old['name']} is gone"
            continue
        if old["kind"] != new["kind"] and (old["kind"], new["kind"]) != ("KEYWORD_ONLY", "POSITIONAL_OR_KEYWORD"):
            yield f"{where}: {old['name']} was {old['kind']}, is {new['kind']}"
        if old["kind"] == "POSITIONAL_OR_KEYWORD" and now.index(new) != place:
            yield f"{where}: {old['name']} has another place"
        allowed = {old.get("default"), NEW_DEFAULTS.get((where, old["name"]), old.get("default"))}
        if new.get("default") not in allowed:
            yield f"{where}: the default of {old['name']} was {old.get('default')}, is {new.get('default')}"
    yield from (
        f"{where}: {name} is new and has no default"
        for name, new in by_name.items()
        if "default" not in new and not new["kind"].startswith("VAR_")
    )


def broken_name(name, then, now):
    """Yields what a caller of a public name at 0.1 would miss today."""
    if "value" in then:
        if then != now:
            yield f"{name} was {then['value']}, is {now.get('value')}"
        return
    if then["call"] is not None and name not in SHOWN_BY_CALLS:
        yield from broken_calls(name, then["call"], now["call"] or [])
    yield from (f"{name} is no {base} any more" for base in then.get("bases", ()) if base not in now["bases"])
    for member, old in then.get("members", {}).items():
        new = now["members"].get(member)
        if isinstance(old, list) and isinstance(new, list):
            yield from broken_calls(f"{name}.{member}", old, new)
        elif old != new:
            yield f"{name}.{member} was {old}, is {new}"


def test_every_public_name_is_still_there():
    assert [name for name in API if name not in awq2marlin.__all__] == []
    assert [name for name in API if not hasattr(awq2marlin, name)] == []
    assert {"convert", "convert_many", "verify", "revert", "push", "inspect", "demo", "doctor"} <= API.keys()


@pytest.fixture(scope="module")
def today():
    return described_api()


@pytest.mark.parametrize("name", API)
def test_a_public_name_still_means_the_same(name, today):
    assert list(broken_name(name, API[name], today[name])) == []


def test_a_broken_signature_would_be_noticed():
    def parameter(name, kind="POSITIONAL_OR_KEYWORD", **default):
        return {"name": name, "kind": kind, **default}

    then = [parameter("a"), parameter("b", default="1"), parameter("c", "KEYWORD_ONLY", default="None")]
    new = parameter("new", "KEYWORD_ONLY", default="None")
    assert list(broken_calls("f", then, [*then, new])) == []
    assert list(broken_calls("f", then, [*then[1:], new])) == ["f: a is gone", "f: b has another place"]
    assert list(broken_calls("f", then[:1], [parameter("a", default="2")])) == [
        "f: the default of a was None, is 2",
    ]
    assert list(broken_calls("f", then, [parameter("a", "KEYWORD_ONLY"), *then[1:]])) == [
        "f: a was POSITIONAL_OR_KEYWORD, is KEYWORD_ONLY",
    ]
    assert list(broken_calls("f", then[:1], [then[0], parameter("d")])) == ["f: d is new and has no default"]
    assert list(broken_calls("revert", [parameter("output")], [parameter("output", default="None")])) == []


def test_unpack_cols_takes_its_tensor_by_place_and_by_its_name_of_then():
    import torch

    values = torch.arange(32, dtype=torch.int32).reshape(2, 16) % 16
    packed = awq2marlin.pack_cols(values, 4, 2, 16)
    assert packed.shape == (2, 2)
    assert torch.equal(awq2marlin.unpack_cols(packed, 4, 2, 16), values)
    assert torch.equal(awq2marlin.unpack_cols(packed, num_bits=4, size_k=2, size_n=16), values)
    assert torch.equal(awq2marlin.unpack_cols(packed_q_w=packed, num_bits=4, size_k=2, size_n=16), values)


# --- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", DOCUMENTS)
def test_every_documented_key_and_error_code_still_stands_in_the_document(table):
    now = documented_keys()[table]
    assert {key: now.get(key) for key in DOCUMENTS[table]} == DOCUMENTS[table]


def test_the_tables_were_read():
    assert len(DOCUMENTS["error codes"]) == 112
    assert {"report", "record", "gemm", "convert details", "doctor details"} <= DOCUMENTS.keys()
    assert "not-shared" in DOCUMENTS["error codes"]
