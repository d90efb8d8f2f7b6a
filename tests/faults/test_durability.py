"""The order of writing, syncing and renaming: what a power failure must find."""

import os
from pathlib import Path

import pytest

from awq2marlin.io import stream

from .helpers import WORK, run_here


@pytest.fixture
def events(monkeypatch):
    """Records syncs and renames in order, paths resolved."""
    seen = []
    fsync, rename, unlink, write = os.fsync, Path.replace, Path.unlink, stream._write_exactly

    def recording_fsync(descriptor):
        fsync(descriptor)
        seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def recording_rename(self, target):
        seen.append(("rename", Path(self), Path(target)))
        return rename(self, target)

    def recording_unlink(self, missing_ok=False):
        seen.append(("unlink", Path(self)))
        return unlink(self, missing_ok)

    def recording_write(target, offset, buffer):
        write(target, offset, buffer)
        seen.append(("write", Path(target.name)))

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_rename)
    monkeypatch.setattr(Path, "unlink", recording_unlink)
    monkeypatch.setattr(stream, "_write_exactly", recording_write)
    return seen


@pytest.fixture(params=["convert", "revert"])
def recorded(made, events, capsys, tmp_path, request):
    """The events of a run into a folder two levels below an existing one."""
    given = made / ("source" if request.param == "convert" else "marlin")
    out = tmp_path / "new" / "out"
    events.clear()
    assert run_here(capsys, request.param, given, out).code == 0
    return out, list(events)


def renames(events):
    return [(at, event[1], event[2]) for at, event in enumerate(events) if event[0] == "rename"]


def test_every_file_is_synced_after_its_last_byte_and_before_it_gets_its_name(recorded):
    _, events = recorded
    assert len(renames(events)) > 8
    for at, partial, final in renames(events):
        before = [event for event in events[:at] if event[1] == partial and event[0] in ("sync", "write")]
        assert before, final
        assert before[-1][0] == "sync", final


def test_every_folder_up_to_the_existing_one_is_synced_before_config_json_gets_its_name(recorded):
    out, events = recorded
    (commit,) = [at for at, _, final in renames(events) if final == out / "config.json"]
    named = [(at, final) for at, _, final in renames(events)[:-1] if WORK not in final.parts and at < commit]
    assert named
    for at, final in named:
        for folder in final.parents:
            if folder == out.parent.parent.parent:
                break
            assert ("sync", folder) in events[at:commit] or not folder.is_relative_to(out), (final, folder)
    for folder in (out, out.parent, out.parent.parent):
        assert ("sync", folder) in events[:commit], folder
    assert ("sync", out) in events[commit:]


def test_the_journal_goes_only_after_config_json_is_durable(recorded):
    out, events = recorded
    (commit,) = [at for at, _, final in renames(events) if final == out / "config.json"]
    gone = max(at for at, event in enumerate(events) if event == ("unlink", out / WORK / "journal.json"))
    assert ("sync", out) in events[commit:gone]


def test_a_replaced_conversion_stops_being_loadable_before_anything_else_of_it_goes(made, events, capsys, tmp_path):
    out = tmp_path / "out"
    assert run_here(capsys, "convert", made / "source", out).code == 0
    events.clear()
    assert run_here(capsys, "convert", made / "source", out, "--overwrite").code == 0
    removed = [(at, event[1]) for at, event in enumerate(events) if event[0] == "unlink" and WORK not in event[1].parts]
    assert removed[0][1] == out / "config.json"
    assert ("sync", out) in events[removed[0][0] : removed[1][0]]
    journal = min(at for at, _, final in renames(events) if final == out / WORK / "journal.json")
    assert journal < removed[0][0]
