"""What the fixtures of version 0.1 are made and read with: folders, the command line, and what can be said of an API.

`make_fixtures` stored what these functions returned at version 0.1; the tests compare it with what they return today.
"""

import dataclasses
import hashlib
import inspect
import json
import re
import shutil
from functools import cached_property
from pathlib import Path

import awq2marlin

DATA = Path(__file__).resolve().parent / "data"
DOCS = Path(__file__).resolve().parents[2] / "docs"
VERSION = "0.1.0"

WORK = ".awq2marlin"
KEPT_WORK = "work"  # its name in the fixtures, where no tool overlooks it

MANIFEST = "marlin_manifest.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

#: A repository of the loopback hub, and the hash of its only commit.
REPOSITORY = "org/tiny-AWQ"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- folders -------------------------------------------------------------------------------------------------------


def contents(folder):
    """Returns every file's bytes by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hashes(folder):
    """Returns every file's SHA-256 by name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def copy_fixture(name, target):
    """Copies a folder of the fixtures; an unfinished one gets its working folder's true name back."""
    shutil.copytree(DATA / name, target)
    if (target / KEPT_WORK).is_dir():
        (target / KEPT_WORK).rename(target / WORK)
    return target


def spoil(path):
    """Changes the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def tensors(folder):
    """Returns (type, shape, bytes) of every tensor in a folder's shards, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), raw[start + begin : start + end])
    return found


def stage(folder):
    """Fills a folder with what the commands of `REPORTS` work on."""
    copy_fixture("llama/killed_convert", folder / "killed")
    copy_fixture("llama/marlin", folder / "spoiled")
    spoil(folder / "spoiled" / SECOND)
    if (DATA / "batch").is_dir():
        stage_batch(folder)
    return folder


def stage_batch(folder):
    """Lays out a batch of which one item is done and one has failed, as its record says; returns its list."""
    copy_fixture("eight_bits/source", folder / "sources" / "eight_bits")
    copy_fixture("eight_bits/marlin", folder / "out" / "eight_bits-marlin")
    for path in (DATA / "batch").iterdir():
        text = path.read_text("utf-8").replace("{folder}", json.dumps(str(folder))[1:-1])
        (folder / path.name).write_text(text, "utf-8")
    return folder / "list.jsonl"


def add_repository(hub):
    """Makes a checkpoint of the fixtures a repository of the loopback hub, with the commit that 0.1 saw."""
    repository = hub.add_repository(REPOSITORY, DATA / "no_zero_points" / "source")
    repository.commits[COMMIT] = dataclasses.replace(repository.commit(), oid=COMMIT)
    repository.refs["refs/heads/main"] = COMMIT
    return repository


# --- the command line ----------------------------------------------------------------------------------------------

#: Commands whose JSON objects are stored; each begins in a folder of its own, filled by `stage`.
REPORTS = {
    "convert": ["convert", "{data}/llama/source", "{folder}/new"],
    "convert padded": ["convert", "{data}/llama/source", "{folder}/new", "--unaligned", "pad", "--verify", "2"],
    "convert dry run": ["convert", "{data}/eight_bits/source", "{folder}/new", "--dry-run"],
    "convert with the GEMM": ["convert", "{data}/no_zero_points/source", "{folder}/new", "--device", "cpu"],
    "convert resumed": ["convert", "{data}/llama/source", "{folder}/killed"],
    "convert refused": ["convert", "{data}/llama/marlin", "{folder}/new"],
    "convert misused": ["convert"],
    "verify": ["verify", "{data}/llama/source", "{data}/llama/marlin"],
    "verify with the GEMM": ["verify", "{data}/eight_bits/source", "{data}/eight_bits/marlin", "--device", "cpu"],
    "verify a difference": ["verify", "{data}/llama/source", "{folder}/spoiled"],
    "revert": ["revert", "{data}/llama/marlin", "{folder}/new"],
    "revert what was saved": ["revert", "{data}/llama/saved", "{folder}/new"],
    "revert a difference": ["revert", "{folder}/spoiled", "{folder}/new"],
    "inspect awq": ["inspect", "{data}/llama/source"],
    "inspect marlin": ["inspect", "{data}/llama/padded"],
    "batch": ["batch", "{folder}/list.jsonl", "--out-dir", "{folder}/out"],
    "batch dry run": ["batch", "{folder}/list.jsonl", "--out-dir", "{folder}/new", "--retry-failed", "--dry-run"],
    "push": ["push", "{data}/llama/marlin", "org/pushed"],
}


def arguments(name, folder):
    """Returns the arguments of one of `REPORTS`."""
    return [each.format(data=DATA, folder=folder) for each in REPORTS[name]] + ["--json"]


#: What stands in the place of texts that differ from run to run, or from version to version.
CONSTANTS = {
    "commit": "0" * 40,
    "finished_at": "2026-01-01T00:00:00+00:00",
    "tool_version": VERSION,
    "url": "https://example.org",
}


def comparable(value, folder):
    """Returns a JSON value with constants for what differs from run to run, and placeholders for paths."""
    if isinstance(value, dict):
        return {
            key: CONSTANTS[key] if key in CONSTANTS and isinstance(each, str) else comparable(each, folder)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [comparable(each, folder) for each in value]
    if isinstance(value, str):
        return value.replace(str(folder), "{folder}").replace(str(DATA), "{data}")
    return 0.125 if isinstance(value, float) else value  # seconds, and errors of the GEMM


def listed_options(text):
    """Returns the options in the left column of a command's ``--help``: what each takes, and its short name."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"│ (--[a-z-]+) +(?:(-\w) +)?(\S.*?)(?:  |\s*│$)", line)
        if match:
            found[match[1]] = {"short": match[2], "takes": match[3]}
    return found


# --- the Python API ------------------------------------------------------------------------------------------------


def described_api():
    """Returns what a caller can rely on of every public name but the version."""
    return {name: _described(getattr(awq2marlin, name)) for name in awq2marlin.__all__ if name != "__version__"}


def _described(value):
    if inspect.isclass(value):
        own = [each for each in value.__mro__ if each.__module__.startswith("awq2marlin")]
        is_called = not getattr(value, "_is_protocol", False) and any("__init__" in vars(each) for each in own)
        bases = [each.__name__ for each in value.__mro__[1:] if issubclass(each, Exception)]
        return {"bases": bases, "call": described_call(value) if is_called else None, "members": _members(value, own)}
    return {"call": described_call(value)} if callable(value) else {"value": repr(value)}


def described_call(value):
    """Returns name, kind and default of every parameter."""
    return [
        {"name": each.name, "kind": each.kind.name}
        | ({} if each.default is each.empty else {"default": _said(each.default)})
        for each in inspect.signature(value).parameters.values()
    ]


def _said(value):
    return "the version" if value == awq2marlin.__version__ else repr(value)


def _members(value, own):
    fields = [each.name for each in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    members = dict.fromkeys(fields, "attribute")
    for each in reversed(own):
        for name, member in vars(each).items():
            if name.startswith("_") or name in fields:
                continue
            if isinstance(member, (property, cached_property)):
                members[name] = "attribute"
            elif callable(getattr(value, name)):
                members[name] = described_call(getattr(value, name))
            else:
                members[name] = _said(member)
    return members


# --- the documents -------------------------------------------------------------------------------------------------


def documented_keys():
    """Returns the marked tables of docs/json.md: from the name of each table to (key, second column) of its rows."""
    text = (DOCS / "json.md").read_text("utf-8")
    tables = {}
    for match in re.finditer(r"<!-- keys: (?P<name>.+?) -->\n(?P<rows>(?:\|.*\n?)+)", text):
        rows = [row.split(" | ") for row in match["rows"].splitlines()[2:]]
        tables[match["name"]] = {key: row[1].strip() for row in rows for key in re.findall("`([^`]+)`", row[0])}
    tables["error codes"] = dict.fromkeys(tables["error codes"], "")  # what they mean is said in other words each time
    return tables
