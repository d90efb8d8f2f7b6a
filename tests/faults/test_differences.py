"""What the converter finds wrong with its own output, and a source that changes under its hands."""

import os
import shutil
from contextlib import contextmanager

import pytest

from awq2marlin.commands import convert as conversion
from awq2marlin.layout.repack import Repack

from .helpers import contents, make_source, refused

SHARD = "model-00001-of-00002.safetensors"


@contextmanager
def corrupt(part):
    """Lets the repack of one part get its very last byte wrong."""
    rewrite = Repack.rewrite_rows

    def wrong_rewrite(self, first, last, source, target):
        rewrite(self, first, last, source, target)
        if self.target.part == part:
            target[-1] ^= 0x80

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repack, "rewrite_rows", wrong_rewrite)
        yield


#: Where the highest bit of a tensor's last byte lies, K = 128, N = 64, 2 groups: found by hand from the layout.
#: The last word of qweight is lane 31, block 3; its field 7 holds value order[7] = 7: row 15, column 63 of the tile.
PLACES = {
    "qweight": ("value at row 127, column 63: ", 8),
    "qzeros": ("zero point at row 1, column 63: ", 8),
    "scales": ("scale (bits) at row 1, column 63: ", 0x8000),
}


@pytest.mark.parametrize("part", PLACES)
def test_a_wrong_value_is_named_and_the_output_never_becomes_loadable(source, run, tmp_path, part):
    out = tmp_path / "out"
    with corrupt(part):
        outcome = run("convert", source, out, "--verify", "all")
    error = refused(outcome, 3)
    place, bit = PLACES[part]
    assert error["code"] == "different-value"
    assert error["file"].endswith(".safetensors")
    assert error["tensor"] == f"model.layers.0.mlp.down_proj.{part}"
    assert error["message"].startswith(place)
    expected, found = (int(word.split()[-1]) for word in error["message"].removeprefix(place).split(", "))
    assert expected ^ found == bit
    assert f"{error['file']}: {error['tensor']}: {place}the source has {expected}, the output {found}" in outcome.err
    assert not (out / "config.json").exists()


def test_a_rerun_does_not_trust_the_shards_in_which_a_difference_was_found(source, expected, run, tmp_path):
    """Not even one that verifies nothing."""
    out = tmp_path / "out"
    with corrupt("qweight"):
        refused(run("convert", source, out), 3)
    outcome = run("convert", source, out, "--verify", "none")
    assert outcome.report["details"]["resumed"] == []
    assert {**contents(out), "README.md": expected["README.md"]} == expected  # the card says that nothing was compared


def test_a_wrong_value_restored_by_revert_is_named_and_never_becomes_loadable(made, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rewrite = Repack.rewrite_rows

    def wrong_rewrite(self, first, last, source, target):
        rewrite(self, first, last, source, target)
        target[-1] ^= 0x80

    with monkeypatch.context() as patch:
        patch.setattr(Repack, "rewrite_rows", wrong_rewrite)
        error = refused(run("revert", made / "marlin", out), 3)
    assert error["code"] == "wrong-digest"
    assert error["file"].endswith("-of-00002.safetensors")
    assert "the restored file differs from the original" in error["message"]
    assert not (out / "config.json").exists()
    assert not (out / error["file"]).exists()
    assert run("revert", made / "marlin", out).code == 0
    assert contents(out) == contents(made / "source")


def change_header(path):
    text = path.read_bytes()
    path.write_bytes(text.replace(b"down_proj", b"DOWN_proj", 1))


CHANGES = {
    "its header changed": (change_header, "changed", "the file changed during the conversion"),
    "it became shorter": (lambda path: os.truncate(path, path.stat().st_size - 1), "changed", "the file changed"),
    "it became longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "changed", "the file changed"),
    "it went away": (lambda path: path.unlink(), "not-found", "no such file"),
}


@pytest.mark.parametrize(("change", "code", "message"), CHANGES.values(), ids=CHANGES)
def test_a_shard_that_changes_after_planning_is_refused_by_name(
    source, run, tmp_path, monkeypatch, change, code, message
):
    copy, out = shutil.copytree(source, tmp_path / "copy"), tmp_path / "out"
    planned = conversion.plan_conversion

    def plan_and_change(*arguments):
        plan = planned(*arguments)
        assert plan.digest  # what the plan reads of the source, it has read
        change(copy / SHARD)
        return plan

    monkeypatch.setattr(conversion, "plan_conversion", plan_and_change)
    error = refused(run("convert", copy, out))
    assert (error["code"], error["file"]) == (code, SHARD)
    assert message in error["message"]
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_shard_cut_while_it_is_read_is_refused_by_name(run, tmp_path, monkeypatch, workers):
    source, out = make_source(tmp_path / "source", size_k=1024, size_n=4096, shards=1), tmp_path / "out"
    name = "model.safetensors"
    rewrite = Repack.rewrite_rows

    def rewrite_and_cut(self, first, last, given, made):
        rewrite(self, first, last, given, made)
        os.truncate(source / name, 1 << 20)

    monkeypatch.setattr(Repack, "rewrite_rows", rewrite_and_cut)
    error = refused(run("convert", source, out, "--workers", workers))
    assert (error["code"], error["file"]) == ("truncated", name)
    assert "became shorter while it was read" in error["message"]
    assert not (out / "config.json").exists()
    assert not (out / name).exists()
