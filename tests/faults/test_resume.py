"""What a rerun trusts, what it makes again, and what it refuses."""

import json
import shutil

import pytest

from .helpers import MANIFEST, WORK, contents, digests, make_source, refused

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def unfinished(source, stepped, tmp_path):
    """A conversion killed when both shards were finished and the manifest was about to be named."""
    out = tmp_path / "out"
    stepped.run("convert", source, out, "--workers", 1, root=out)
    at = stepped.trace.index(f"os.rename {MANIFEST}")
    shutil.rmtree(out)
    assert stepped.run("convert", source, out, "--workers", 1, root=out, at=at).code == -9
    assert sorted(json.loads((out / WORK / "journal.json").read_text())["finished"]) == [FIRST, SECOND]
    return out


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def test_finished_shards_are_not_converted_again(unfinished, source, expected, run):
    before = {name: (unfinished / name).stat() for name in (FIRST, SECOND)}
    outcome = run("convert", source, unfinished)
    assert outcome.report["details"]["resumed"] == [FIRST, SECOND]
    assert "resuming: 2 of 2 shards are already there" in outcome.err
    for name, earlier in before.items():
        now = (unfinished / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (earlier.st_ino, earlier.st_mtime_ns)
    assert contents(unfinished) == expected
    assert not (unfinished / WORK).exists()


def test_a_run_that_was_stopped_before_its_first_shard_says_that_it_starts_again(source, stepped, tmp_path, run):
    out = tmp_path / "out"
    stepped.run("convert", source, out, "--workers", 1, root=out)
    at = stepped.trace.index(f"os.rename {FIRST}")
    shutil.rmtree(out)
    stepped.run("convert", source, out, "--workers", 1, root=out, at=at)
    assert json.loads((out / WORK / "journal.json").read_text())["finished"] == {}
    told = "starting again: an earlier run left no finished shard here"
    assert told in run("convert", source, out).err
    assert told not in run("convert", source, out, "--overwrite").err


@pytest.mark.parametrize("damage", [flip_last_byte, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_finished_shard_is_made_again(unfinished, source, expected, run, damage):
    kept = (unfinished / FIRST).stat().st_ino
    damage(unfinished / SECOND)
    outcome = run("convert", source, unfinished)
    assert outcome.report["details"]["resumed"] == [FIRST]
    assert f"{SECOND} was finished by an earlier run but is damaged now; it is written again" in outcome.err
    assert (unfinished / FIRST).stat().st_ino == kept
    assert contents(unfinished) == expected


def test_a_damaged_shard_of_a_reversion_is_made_again(made, stepped, run, tmp_path):
    out = tmp_path / "out"
    stepped.run("revert", made / "marlin", out, root=out)
    at = stepped.trace.index("os.rename config.json")
    shutil.rmtree(out)
    stepped.run("revert", made / "marlin", out, root=out, at=at)
    flip_last_byte(out / FIRST)
    outcome = run("revert", made / "marlin", out)
    assert outcome.code == 0
    assert f"{FIRST} was finished by an earlier run but is damaged now" in outcome.err
    assert contents(out) == contents(made / "source")


def test_a_source_with_other_values_under_the_same_header_is_refused(unfinished, source, run, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    flip_last_byte(other / SECOND)
    kept = (FIRST, SECOND, f"{WORK}/journal.json")
    before = [digests(unfinished)[name] for name in kept]
    error = refused(run("convert", other, unfinished))
    assert error["code"] == "other-plan"
    assert error["file"] == str(unfinished)
    assert f"{SECOND} has changed" in error["message"]
    assert [digests(unfinished)[name] for name in kept] == before


def test_overwrite_makes_the_shards_of_a_changed_source_again(unfinished, source, run, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    flip_last_byte(other / SECOND)
    assert run("convert", other, tmp_path / "undisturbed").code == 0
    assert run("convert", other, unfinished, "--overwrite").code == 0
    assert contents(unfinished) == contents(tmp_path / "undisturbed")


def test_overwrite_resumes_its_own_unfinished_run(unfinished, source, expected, run):
    outcome = run("convert", source, unfinished, "--overwrite")
    assert outcome.report["details"]["resumed"] == [FIRST, SECOND]
    assert contents(unfinished) == expected


def test_a_journal_of_another_source_is_refused(unfinished, run, tmp_path):
    other = make_source(tmp_path / "other", layers=2)
    before = digests(unfinished)
    error = refused(run("convert", other, unfinished))
    assert (error["code"], error["file"]) == ("other-plan", str(unfinished))
    assert "unfinished run from another source, with other options or of another version" in error["message"]
    assert digests(unfinished) == before


def test_a_journal_of_other_options_is_refused(unfinished, source, run):
    assert refused(run("convert", source, unfinished, "--unaligned", "pad"))["code"] == "other-plan"


def test_a_journal_of_a_conversion_is_refused_by_a_reversion(unfinished, made, run):
    error = refused(run("revert", made / "marlin", unfinished))
    assert error["code"] == "other-plan"
    assert "choose another folder" in error["message"]


def test_overwrite_replaces_an_unfinished_run_of_another_plan(unfinished, run, tmp_path):
    other = make_source(tmp_path / "other", shards=1)
    assert run("convert", other, tmp_path / "undisturbed").code == 0
    (unfinished / "mine.txt").write_text("not the converter's")
    assert run("convert", other, unfinished, "--overwrite").code == 0
    assert contents(unfinished) == contents(tmp_path / "undisturbed") | {"mine.txt": b"not the converter's"}


DAMAGED = {
    "empty": b"",
    "cut": b'{"version": 1, "plan": "sha256:',
    "not JSON": b"\xff\xfe\x00",
    "a list": b"[]",
    "no plan": b'{"version": 1, "names": [], "finished": {}}',
    "another version": b'{"version": 99, "plan": "x", "names": [], "finished": {}}',
    "a name outside": b'{"version": 1, "plan": "x", "names": ["../x"], "finished": {}}',
    "a wrong entry": b'{"version": 1, "plan": "x", "names": ["a"], "finished": {"a": {"source_size": 1}}}',
    "a size that is no number": json.dumps(
        {
            "version": 1,
            "plan": "x",
            "names": ["a"],
            "finished": {
                "a": {
                    "source_size": "1",
                    "source_digest": "xxh3_128:" + "0" * 32,
                    "target_size": [],
                    "target_digest": "xxh3_128:" + "0" * 32,
                }
            },
        }
    ).encode(),
    "names that are a string": b'{"version": 1, "plan": "x", "names": "ab", "finished": {}}',
    "deep nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("journal", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_journal_gives_a_clear_message(unfinished, source, run, journal, overwrite):
    (unfinished / WORK / "journal.json").write_bytes(journal)
    before = digests(unfinished)
    error = refused(run("convert", source, unfinished, *overwrite))
    assert error["code"] == "bad-journal"
    assert error["file"].endswith("out/.awq2marlin/journal.json")
    assert "remove this output folder and run the command again" in error["message"]
    assert digests(unfinished) == before


def test_partial_files_of_a_killed_run_are_not_used(unfinished, source, expected, run):
    for number in range(20):
        (unfinished / WORK / f"{number}.partial").write_bytes(b"half a shard")
    (unfinished / WORK / "journal.json.new").write_bytes(b"half a journal")
    assert run("convert", source, unfinished).code == 0
    assert contents(unfinished) == expected
    assert not (unfinished / WORK).exists()
