"""Where a conversion may write, and what it may remove."""

import json
import os
import shutil
import subprocess

import pytest

from tests.skips import NO_MOUNT

from .helpers import MANIFEST, WORK, contents, digests, make_source, refused

#: Each writes OUTPUT as a path for a source in ``tmp_path/models/source``; all are refused.
OVERLAPS = {
    "equal": lambda source: source,
    "equal, through ..": lambda source: source / "code" / "..",
    "equal, relative": lambda source: os.path.relpath(source),
    "equal, through a link": lambda source: link(source.parent / "link", source),
    "inside": lambda source: source / "out",
    "inside, an existing folder": lambda source: source / "code",
    "inside, through a link": lambda source: link(source.parent / "link", source) / "out",
    "inside, through a link to a subfolder": lambda source: link(source.parent / "link", source / "code") / "a" / "b",
    "inside, through a link to nothing yet": lambda source: link(source.parent / "link", source / "new"),
    "above": lambda source: source.parent,
    "above, relative": lambda source: os.path.relpath(source.parent),
    "above, through a link": lambda source: link(source.parent.parent / "link", source.parent),
}


def link(path, target):
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("place", OVERLAPS.values(), ids=OVERLAPS)
def test_an_output_that_overlaps_the_source_is_refused(source, run, tmp_path, place, overwrite):
    copy = shutil.copytree(source, tmp_path / "models" / "source")
    out = place(copy)
    before = digests(tmp_path)
    error = refused(run("convert", copy, out, *overwrite))
    assert (error["code"], error["file"]) == ("overlap", str(out))
    assert digests(tmp_path) == before
    assert not (copy / "out").exists()
    assert not (copy / "new").exists()


def test_a_source_given_by_a_link_is_protected_as_well(source, run, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    assert refused(run("convert", link(tmp_path / "link", copy), copy / "out"))["code"] == "overlap"


def test_a_second_mount_of_the_source_is_the_source(source, run, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "--bind", str(copy), str(mount)], capture_output=True, check=False).returncode:
        pytest.skip(NO_MOUNT)
    try:
        for out in (mount, mount / "out", mount / "code"):
            assert refused(run("convert", copy, out))["code"] == "overlap"
        assert contents(copy) == contents(source)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("place", ["", "blobs/out", "snapshots/other", "snapshots/0123/out", "out"])
def test_an_output_in_the_hub_cache_of_the_source_is_refused(source, run, tmp_path, place):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(source, snapshot)
    (repository / "blobs").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (snapshot / name).rename(repository / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    before = digests(tmp_path)
    assert refused(run("convert", snapshot, repository / place))["code"] == "overlap"
    assert digests(tmp_path) == before
    assert run("convert", snapshot, tmp_path / "hub" / "out").code == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["mine.txt", "config.json", ".hidden", "folder/mine.txt", "model.safetensors"])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(source, run, tmp_path, name, overwrite):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    before, changed = digests(out), out.stat().st_mtime_ns
    error = refused(run("convert", source, out, *overwrite))
    assert (error["code"], error["file"]) == ("not-empty", str(out))
    assert f"the folder is not empty ({name.split('/')[0]})" in error["message"]
    assert (digests(out), out.stat().st_mtime_ns) == (before, changed)


@pytest.mark.parametrize("command", ["convert", "revert"])
def test_an_empty_folder_is_taken(made, run, tmp_path, command):
    given, wanted = (made / "source", made / "marlin") if command == "convert" else (made / "marlin", made / "source")
    (tmp_path / "out").mkdir()
    assert run(command, given, tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == contents(wanted)


def test_a_finished_conversion_is_refused_without_overwrite(source, expected, run, tmp_path):
    out = tmp_path / "out"
    run("convert", source, out)
    before = digests(out)
    error = refused(run("convert", source, out))
    assert (error["code"], error["file"]) == ("not-empty", str(out))
    assert "the folder holds a finished conversion; use --overwrite to replace it" in error["message"]
    assert digests(out) == before
    assert contents(out) == expected


def test_overwrite_replaces_a_conversion_and_leaves_foreign_files(source, run, tmp_path):
    out = tmp_path / "out"
    other = make_source(tmp_path / "other", shards=3)
    (other / "vocab.txt").write_text("of the other model")
    run("convert", other, out)
    (out / "mine.txt").write_text("mine")
    (out / "code" / "mine.py").write_text("mine")
    assert run("convert", source, tmp_path / "undisturbed").code == 0
    assert run("convert", source, out, "--overwrite").code == 0
    mine = {"mine.txt": b"mine", "code/mine.py": b"mine"}
    assert contents(out) == contents(tmp_path / "undisturbed") | mine


def test_overwrite_knows_every_file_of_a_padded_conversion(run, tmp_path):
    """Its index is not the source's, yet the conversion wrote it."""
    unaligned = make_source(tmp_path / "unaligned", size_n=96)
    out = tmp_path / "out"
    assert run("convert", unaligned, out, "--unaligned", "pad").code == 0
    padded = contents(out)
    assert run("convert", unaligned, out, "--unaligned", "pad", "--overwrite").code == 0
    assert contents(out) == padded


def test_a_foreign_file_of_a_name_that_we_need_is_refused_before_anything_is_removed(source, run, tmp_path):
    out = tmp_path / "out"
    run("convert", source, out)
    (out / "vocab.txt").write_text("mine")
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "vocab.txt").write_text("the model's")
    before = digests(out)
    error = refused(run("convert", copy, out, "--overwrite"))
    assert error["code"] == "not-empty"
    assert "it holds vocab.txt, which awq2marlin did not write; choose another folder" in error["message"]
    assert digests(out) == before
    assert not (out / WORK).exists()


def test_a_foreign_file_where_we_need_a_folder_is_refused_before_anything_is_removed(source, run, tmp_path):
    out = tmp_path / "out"
    run("convert", source, out)
    (out / "assets").write_text("mine")
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "assets").mkdir()
    (copy / "assets" / "logo.svg").write_text("the model's")
    before = digests(out)
    assert (
        "it holds assets, which awq2marlin did not write"
        in refused(run("convert", copy, out, "--overwrite"))["message"]
    )
    assert digests(out) == before


def victims(tmp_path):
    """Makes what a hostile manifest would like to see removed."""
    outside = tmp_path / "outside"
    (outside / "empty").mkdir(parents=True)
    (outside / "precious.txt").write_text("precious")
    return outside


def edit_manifest(out, change):
    document = json.loads((out / MANIFEST).read_text())
    change(document["files"])
    (out / MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["../outside/precious.txt", "/etc/passwd", "a/../../outside/precious.txt", "C:\\x"])
def test_a_manifest_that_names_files_outside_is_refused(source, run, tmp_path, name):
    outside, out = victims(tmp_path), tmp_path / "out"
    run("convert", source, out)
    edit_manifest(out, lambda files: files.update({name: files["generation_config.json"]}))
    before = digests(tmp_path)
    error = refused(run("convert", source, out, "--overwrite"))
    assert (error["code"], error["file"]) == ("unsafe-name", MANIFEST)
    assert digests(tmp_path) == before
    assert (outside / "empty").is_dir()


@pytest.mark.parametrize("name", ["link/precious.txt", "link/empty/x", "link/empty", "loop/x", "loop"])
def test_a_manifest_that_names_files_through_a_link_removes_nothing_outside(source, expected, run, tmp_path, name):
    outside, out = victims(tmp_path), tmp_path / "out"
    run("convert", source, out)
    link(out / "link", outside)
    link(out / "loop", "loop")
    edit_manifest(out, lambda files: files.update({name: files["generation_config.json"]}))
    assert run("convert", source, out, "--overwrite").code == 0
    assert (outside / "precious.txt").read_text() == "precious"
    assert (outside / "empty").is_dir()
    assert {key: (out / key).read_bytes() for key in expected} == expected


def test_a_subfolder_that_is_a_link_out_of_the_output_is_not_written_through(source, run, tmp_path):
    outside, out = victims(tmp_path), tmp_path / "out"
    run("convert", source, out)
    shutil.rmtree(out / "code")
    link(out / "code", outside)
    before = digests(outside)
    error = refused(run("convert", source, out, "--overwrite"))
    assert error["code"] in ("unsafe-link", "not-empty")
    assert digests(outside) == before
    assert not (outside / "deep").exists()


def test_a_work_folder_that_is_a_link_is_refused(source, run, tmp_path):
    outside, out = victims(tmp_path), tmp_path / "out"
    (outside / "their.partial").write_text("precious")
    out.mkdir()
    link(out / WORK, outside)
    before = digests(outside)
    error = refused(run("convert", source, out))
    assert (error["code"], error["file"]) == ("unsafe-link", str(out / WORK))
    assert digests(outside) == before


@pytest.mark.parametrize("name", ["journal.json.new", "lock"])
def test_links_inside_the_work_folder_are_not_written_through(source, run, tmp_path, name):
    outside, out = victims(tmp_path), tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    link(out / WORK / name, outside / "precious.txt")
    run("convert", source, out)
    assert (outside / "precious.txt").read_text() == "precious"


def test_a_reversion_into_a_finished_one_is_refused(made, run, tmp_path):
    out = tmp_path / "out"
    run("revert", made / "marlin", out)
    before = digests(out)
    assert refused(run("revert", made / "marlin", out))["code"] == "not-empty"
    assert digests(out) == before


@pytest.mark.parametrize("place", ["", "out", ".."])
def test_a_reversion_that_overlaps_the_conversion_is_refused(made, run, tmp_path, place):
    copy = shutil.copytree(made / "marlin", tmp_path / "models" / "marlin")
    before = digests(tmp_path)
    assert refused(run("revert", copy, copy / place))["code"] == "overlap"
    assert digests(tmp_path) == before


def test_a_dry_run_writes_nothing(source, run, tmp_path):
    outcome = run("convert", source, tmp_path / "out", "--dry-run")
    assert outcome.report["details"]["dry_run"] is True
    assert list(tmp_path.iterdir()) == []
