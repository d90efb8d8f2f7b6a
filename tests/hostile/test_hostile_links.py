"""Links: followed inside the checkpoint and from a snapshot of the Hub cache into its blobs, never elsewhere."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from awq2marlin import OutputError, convert, revert, verify
from tests.hostile.hostile_files import INDEX, MANIFEST, SHARD, tree, write_awq

SECRET = "the private key of somebody"


@pytest.fixture
def private(tmp_path) -> Path:
    path = tmp_path / "home" / "id_ed25519"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def unlink_and_link(path: Path, target: object) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)  # type: ignore[arg-type]


def nowhere(folder: Path) -> bool:
    """Returns whether no file of a folder holds the secret, nor any link leads to it."""
    return not any(
        path.is_symlink() or (path.is_file() and SECRET.encode() in path.read_bytes()) for path in folder.rglob("*")
    )


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "sub/tokenizer.json", SHARD, "config.json", INDEX, "quant_config.json", "README.md"]
)
@pytest.mark.parametrize("how", ["absolute", "relative", "through a link", "through a folder"])
def test_a_link_out_of_the_checkpoint_is_refused(awq, private, tmp_path, run, name: str, how: str) -> None:
    if how == "absolute":
        unlink_and_link(awq / name, private)
    elif how == "relative":
        unlink_and_link(awq / name, Path(os.path.relpath(private, (awq / name).parent)))
    elif how == "through a link":
        (awq / "z.txt").symlink_to(private)
        unlink_and_link(awq / name, awq / "z.txt")
    else:
        (awq / "z").symlink_to(private.parent)
        unlink_and_link(awq / name, awq / "z" / private.name)
    before = tree(tmp_path)
    for command in (["convert", awq, tmp_path / "out"], ["inspect", awq]):
        outcome = run(*command)
        outcome.refused("unsafe-link", "leads out of the checkpoint's folder", "copy the file there")
        assert outcome.report["errors"][0]["file"] in (name, "README.md", "sub/tokenizer.json", "z", "z.txt")
        assert SECRET not in outcome.out + outcome.err
    assert tree(tmp_path) == before


def test_a_link_to_a_folder_is_refused(awq, private, tmp_path, run) -> None:
    (awq / "docs").symlink_to(private.parent)
    run("convert", awq, tmp_path / "out").refused("unsafe-link", file="docs")
    (awq / "docs").unlink()
    (awq / "real").mkdir()
    (awq / "real/x.txt").write_text("x")
    (awq / "docs").symlink_to("real")
    run("convert", awq, tmp_path / "out").refused("not-a-file", file="docs")
    (awq / "docs").unlink()
    (awq / "docs").symlink_to("..")
    run("convert", awq, tmp_path / "out").refused("unsafe-link", file="docs")
    (awq / "docs").unlink()
    (awq / "docs").symlink_to(".")
    run("convert", awq, tmp_path / "out").refused("not-a-file", file="docs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", SHARD, "config.json", INDEX])
def test_loops_and_broken_links_are_refused(awq, tmp_path, run, name: str) -> None:
    unlink_and_link(awq / name, "loop")
    (awq / "loop").symlink_to(name)
    outcome = run("convert", awq, tmp_path / "out")
    outcome.refused("unsafe-link", "link")
    (awq / "loop").unlink()
    run("convert", awq, tmp_path / "out").refused("not-found", file=name)
    unlink_and_link(awq / name, name)
    run("convert", awq, tmp_path / "out").refused("unsafe-link", file=name)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_a_loop_or_a_file_is_refused(awq, tmp_path, run) -> None:
    (tmp_path / "loop").symlink_to("loop")
    run("inspect", tmp_path / "loop").refused("not-found", "loop")
    run("inspect", tmp_path / "gone").refused("not-found")
    run("inspect", awq / SHARD).refused("not-a-folder", "pass the folder")


def test_a_hidden_or_stray_link_is_not_even_followed(awq, private, tmp_path) -> None:
    (awq / ".netrc").symlink_to(private)
    (awq / "pytorch_model.bin").symlink_to(private)
    (awq / ".git").symlink_to(private.parent)
    os.mkfifo(awq / ".pipe")
    result = convert(awq, tmp_path / "out", workers=1)
    assert set(result.left_behind) == {".netrc", "pytorch_model.bin", ".git", ".pipe"}
    assert nowhere(tmp_path / "out")


def test_links_inside_the_checkpoint_are_followed_and_become_files(awq, tmp_path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(awq, plain)
    (plain / "tokenizer.json").write_text("{}")
    (awq / "store").mkdir()
    for name, target in ((SHARD, "store/weights"), ("config.json", "store/config")):
        (awq / name).rename(awq / target)
        (awq / name).symlink_to(target)
    (awq / "store/tokenizer").write_text("{}")
    (awq / "tokenizer.json").symlink_to(awq / "store/tokenizer")
    convert(awq, tmp_path / "out", workers=1)
    convert(plain, tmp_path / "expected", workers=1)
    assert nowhere(tmp_path / "out")
    for name in (SHARD, "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_the_source_itself_may_be_a_link(awq, tmp_path) -> None:
    (tmp_path / "link").symlink_to(awq)
    assert convert(tmp_path / "link", tmp_path / "out", workers=1).source == awq


# --- Snapshots of the Hub cache ---------------------------------------------------------------------------------------

REVISION = "3f9a1c0de5b84a7798c2f7a0c6d1e2b3a4f50617"


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """A snapshot as huggingface_hub lays it out: every file a relative link to a blob named by its digest."""
    return make_snapshot(tmp_path / "hub" / "models--org--tiny-awq")


def make_snapshot(repository: Path) -> Path:
    folder = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    write_awq(folder, shards=2)
    (folder / "sub").mkdir()
    (folder / "sub/tokenizer.json").write_text("{}")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.replace(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return folder


def test_a_snapshot_converts_verifies_and_comes_back(snapshot, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path / "hub")
    result = convert(snapshot, workers=1)
    assert result.output == Path("tiny-awq-marlin")
    assert nowhere(tmp_path / "tiny-awq-marlin")
    verify(snapshot, "tiny-awq-marlin", workers=1)
    revert("tiny-awq-marlin", "back", workers=1)
    assert tree(tmp_path / "back") == {
        path.relative_to(snapshot).as_posix(): path.read_bytes() if path.is_file() else "folder"
        for path in snapshot.rglob("*")
    }
    assert tree(tmp_path / "hub") == before


def test_blobs_in_the_store_that_all_repositories_of_the_cache_share_are_taken(snapshot, tmp_path, run) -> None:
    """The client keeps large files there, and links a repository's blob to them."""
    name = "model-00001-of-00002.safetensors"
    blob, shared = (snapshot / name).resolve(), tmp_path / "hub/blobs/ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.replace(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    convert(snapshot, tmp_path / "out", workers=1)
    assert nowhere(tmp_path / "out")
    other = shared.with_name("token")
    shared.replace(other)
    unlink_and_link(blob, os.path.relpath(other, blob.parent))
    run("convert", snapshot, tmp_path / "out2").refused("unsafe-link", "leads out", file=name)


DIGEST = "ab" * 32


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize(
    "where",
    [f"cd/{DIGEST}", f"ab/{DIGEST}.refs", f"ab/{DIGEST[1:]}", DIGEST, f"ab/cd/{DIGEST}", f"AB/{DIGEST.upper()}"],
)
def test_of_the_shared_store_only_what_the_client_names_is_taken(
    snapshot, tmp_path, run, where: str, name: str
) -> None:
    other = tmp_path / "hub/blobs" / where
    other.parent.mkdir(parents=True)
    other.write_text("private")
    unlink_and_link(snapshot / name, os.path.relpath(other, snapshot))
    run("convert", snapshot, tmp_path / "out").refused("unsafe-link", "leads out", file=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", ["file", "folder", "store"])
def test_no_link_in_the_shared_store_leads_out_of_it(snapshot, private, tmp_path, run, link: str) -> None:
    blob = tmp_path / "hub/blobs/ab" / DIGEST
    elsewhere = tmp_path / "home/blobs/ab" / DIGEST
    elsewhere.parent.mkdir(parents=True)
    private.replace(elsewhere)
    here = {"file": blob, "folder": blob.parent, "store": blob.parent.parent}[link]
    there = {"file": elsewhere, "folder": elsewhere.parent, "store": elsewhere.parent.parent}[link]
    here.parent.mkdir(parents=True, exist_ok=True)
    here.symlink_to(there)
    unlink_and_link(snapshot / "tokenizer.json", os.path.relpath(blob, snapshot))
    run("convert", snapshot, tmp_path / "out").refused("unsafe-link", "leads out", file="tokenizer.json")
    assert not (tmp_path / "out").exists()


def test_the_shared_store_is_closed_to_a_folder_that_is_no_snapshot(awq, tmp_path, run) -> None:
    blob = tmp_path / "blobs/ab" / DIGEST
    blob.parent.mkdir(parents=True)
    blob.write_text("private")
    (awq / "tokenizer.json").symlink_to(blob)
    run("convert", awq, tmp_path / "out").refused("unsafe-link", "leads out", file="tokenizer.json")
    (tmp_path / "models--org--name/blobs").mkdir(parents=True)
    other = tmp_path / "models--org--name/blobs" / DIGEST.replace("a", "c")  # leads there, but is called otherwise
    other.symlink_to(blob)
    unlink_and_link(awq / "tokenizer.json", other)
    run("convert", awq, tmp_path / "out").refused("unsafe-link", "leads out", file="tokenizer.json")


@pytest.mark.parametrize("where", ["another snapshot", "refs", "the cache", "home"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model-00001-of-00002.safetensors"])
def test_a_snapshots_link_elsewhere_is_refused(snapshot, private, tmp_path, run, where: str, name: str) -> None:
    repository = snapshot.parent.parent
    target = {
        "another snapshot": repository / "snapshots" / "other" / "file",
        "refs": repository / "refs/main",
        "the cache": tmp_path / "hub" / "token",
        "home": private,
    }[where]
    target.parent.mkdir(exist_ok=True)
    target.touch()
    unlink_and_link(snapshot / name, os.path.relpath(target, snapshot))
    run("convert", snapshot, tmp_path / "out").refused("unsafe-link", "leads out", file=name)
    assert not (tmp_path / "out").exists()


def test_blobs_that_are_links_themselves_are_refused(snapshot, private, tmp_path, run) -> None:
    repository = snapshot.parent.parent
    (repository / "blobs/evil").symlink_to(private)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/evil")
    run("convert", snapshot, tmp_path / "out").refused("unsafe-link", file="tokenizer.json")
    (snapshot / "tokenizer.json").unlink()
    (repository / "blobs").rename(tmp_path / "home/blobs")
    (repository / "blobs").symlink_to(tmp_path / "home/blobs")
    run("convert", snapshot, tmp_path / "out").refused("unsafe-link", file="config.json")
    (repository / "blobs").unlink()
    (repository / "blobs").symlink_to("/")
    unlink_and_link(snapshot / "config.json", f"../../blobs/{private}")
    run("convert", snapshot, tmp_path / "out").refused("unsafe-link", file="config.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["other/snapshots/rev", "models--a/snapshots/rev/sub"])
def test_blobs_that_are_no_repository_s_are_refused(snapshot, tmp_path, run, layout: str) -> None:
    folder = tmp_path / layout
    shutil.copytree(snapshot.parent.parent / "blobs", folder.parent.parent / "blobs")
    shutil.copytree(snapshot, folder, symlinks=True)
    run("inspect", folder).refused("unsafe-link", file="config.json")


# --- Folders of links into a cache, and links on the user's word ------------------------------------------------------


def linked(awq: Path, blobs: Path, name: str, digest: str = "") -> Path:
    """Moves a file of a checkpoint among the blobs of a repository, and leaves a link; returns where it lies now."""
    digest = digest or hashlib.sha256((awq / name).read_bytes()).hexdigest()
    blobs.mkdir(parents=True, exist_ok=True)
    (awq / name).replace(blobs / digest)
    (awq / name).symlink_to(blobs / digest)
    return blobs / digest


@pytest.fixture
def farm(tmp_path) -> Path:
    """A folder of links into a cache elsewhere, as `local_dir` of older clients of the Hub."""
    awq = write_awq(tmp_path / "farm", shards=2)
    (awq / "tokenizer.json").write_text("{}")
    shutil.copytree(awq, tmp_path / "plain")
    blobs = tmp_path / "disk2/hub/models--org--name/blobs"
    for name in [path.name for path in awq.iterdir()]:
        small = name.endswith("json")
        linked(awq, blobs, name, hashlib.sha1((awq / name).read_bytes()).hexdigest() if small else "")
    return awq


def test_a_folder_of_links_into_a_cache_converts_verifies_and_comes_back(farm, tmp_path, run) -> None:
    assert run("inspect", farm).code == 0
    assert run("convert", farm, tmp_path / "out").code == 0
    assert run("verify", farm, tmp_path / "out").code == 0
    assert run("revert", tmp_path / "out", tmp_path / "back").code == 0
    assert tree(tmp_path / "back") == tree(tmp_path / "plain")
    assert nowhere(tmp_path / "out")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json", "README.md"])
def test_a_blob_must_be_what_its_name_says(farm, tmp_path, run, name: str) -> None:
    """Whoever lays a link to another's blob knows its digest; what only bears such a name is not taken."""
    data = (
        (tmp_path / "plain/config.json").read_bytes()
        if name == "README.md"
        else (tmp_path / "plain" / name).read_bytes()
    )
    other = tmp_path / "models--org--other/blobs" / ("ab" * 32)
    other.parent.mkdir(parents=True)
    other.write_bytes(data)
    unlink_and_link(farm / name, other)
    outcome = run("convert", farm, tmp_path / "out")
    outcome.refused("wrong-digest", "its SHA-256 is", "its name in the Hub's cache", file=name)
    assert not (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out" / name).exists()


def test_a_blob_that_the_cache_shares_among_repositories_is_taken(farm, tmp_path, run) -> None:
    name = "model-00001-of-00002.safetensors"
    blob = (farm / name).resolve()
    shared = tmp_path / "disk2/hub/blobs" / blob.name[:2] / blob.name
    shared.parent.mkdir(parents=True)
    blob.replace(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert run("convert", farm, tmp_path / "out").code == 0
    shared.write_bytes(shared.read_bytes()[:-1] + b"x")
    run("convert", farm, tmp_path / "out2").refused("wrong-digest", file=name)


@pytest.mark.parametrize("where", ["datasets--a/blobs", "models--a/blob", "models--a/blobs/x", "models--/blobs"])
def test_what_only_looks_like_a_blob_is_refused(awq, tmp_path, run, where: str) -> None:
    linked(awq, tmp_path / where, "config.json")
    run("inspect", awq).refused("unsafe-link", "leads out", file="config.json")


@pytest.mark.parametrize("digest", ["ab" * 19, "ab" * 31, "AB" * 32, "ab" * 32 + ".incomplete", "token", "ab" * 33])
def test_of_a_repository_s_blobs_only_digests_are_taken(awq, tmp_path, run, digest: str) -> None:
    linked(awq, tmp_path / "models--a/blobs", "config.json", digest)
    run("inspect", awq).refused("unsafe-link", "leads out", file="config.json")


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json"])
def test_a_dangling_link_is_called_one(awq, tmp_path, run, name: str) -> None:
    unlink_and_link(awq / name, tmp_path / "gone" / name)
    outcome = run("convert", awq, tmp_path / "out")
    outcome.refused(
        "not-found", "a dangling link", f"it leads to {tmp_path}/gone/{name}", "download the file again", file=name
    )


@pytest.mark.parametrize("command", ["convert", "dry run", "verify", "revert"])
def test_links_are_followed_on_the_user_s_word_and_each_is_told_first(awq, marlin, tmp_path, run, command: str) -> None:
    given = marlin if command == "revert" else awq
    names = [SHARD, "config.json", "generation_config.json"]
    (tmp_path / "disk2").mkdir()
    for name in names:
        (given / name).replace(tmp_path / "disk2" / name)
        (given / name).symlink_to(tmp_path / "disk2" / name)
    arguments = {
        "convert": ["convert", given, tmp_path / "out"],
        "dry run": ["convert", given, tmp_path / "out", "--dry-run"],
        "verify": ["verify", given, marlin],
        "revert": ["revert", given, tmp_path / "out"],
    }[command]
    run(*arguments).refused("unsafe-link", "leads out", "--follow-links")
    outcome = run(*arguments, "--follow-links")
    assert outcome.code == 0, outcome.err
    lines = [f"following {name} to {tmp_path}/disk2/{name}" for name in sorted(names)]
    assert outcome.err.splitlines()[: len(lines)] == lines
    if command in ("convert", "revert"):
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert "disk2" not in (tmp_path / "out/README.md").read_text() if command == "convert" else True


def test_on_the_user_s_word_too_only_regular_files_are_taken(awq, tmp_path, run) -> None:
    (tmp_path / "folder").mkdir()
    (awq / "docs").symlink_to(tmp_path / "folder")
    run("convert", awq, tmp_path / "out", "--follow-links").refused("not-a-file", file="docs")
    unlink_and_link(awq / "docs", "/dev/zero")
    run("convert", awq, tmp_path / "out", "--follow-links").refused("not-a-file", file="docs")
    unlink_and_link(awq / "docs", tmp_path / "gone")
    run("convert", awq, tmp_path / "out", "--follow-links").refused("not-found", "a dangling link", file="docs")
    assert not (tmp_path / "out").exists()


def test_links_on_the_user_s_word_do_not_go_with_a_push(awq, private, tmp_path, run) -> None:
    (awq / "tokenizer.json").symlink_to(private)
    outcome = run("convert", awq, tmp_path / "out", "--follow-links", "--push-to", "org/name")
    assert outcome.code == 2
    assert (
        "--follow-links may read files from anywhere on this machine, so it cannot be used with "
        "--push-to" in outcome.err
    )
    with pytest.raises(ValueError, match="follow_links may read files from anywhere"):
        convert(awq, tmp_path / "out", follow_links=True, push_to="org/name")
    assert not (tmp_path / "out").exists()


# --- Converted checkpoints and outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, "config.json", MANIFEST, "README.md"])
def test_a_converted_checkpoint_with_a_link_out_is_refused(
    sound_awq, marlin, private, tmp_path, run, name: str
) -> None:
    unlink_and_link(marlin / name, private)
    outcome = run("revert", marlin, tmp_path / "back")
    outcome.refused("unsafe-link", "leads out", file=name)
    assert not (tmp_path / "back").exists()
    if name != MANIFEST:  # `verify` compares with the source itself and needs no manifest
        run("verify", sound_awq, marlin).refused("unsafe-link", "leads out", file=name)


def test_a_link_in_the_output_is_replaced_not_followed(awq, private, tmp_path) -> None:
    out = tmp_path / "out"
    convert(awq, out, workers=1)
    for name in (SHARD, "config.json", "README.md"):
        unlink_and_link(out / name, private)
    convert(awq, out, workers=1, overwrite=True)
    assert private.read_text() == SECRET
    assert nowhere(out)


def test_a_linked_folder_in_the_output_is_not_written_through(awq, private, tmp_path) -> None:
    (awq / "home").mkdir()
    (awq / "home" / private.name).write_text("another")
    out = tmp_path / "out"
    convert(awq, out, workers=1)
    shutil.rmtree(out / "home")
    (out / "home").symlink_to(private.parent)
    with pytest.raises(OutputError, match=r"leads out of the output folder|not ours"):
        convert(awq, out, workers=1, overwrite=True)
    assert private.read_text() == SECRET
    assert not (out / "config.json").exists()


def _work_folder_is_a_link(out: Path, home: Path) -> None:
    (home / "thesis.partial").write_text(SECRET)
    (out / ".awq2marlin").symlink_to(home)


def _lock_is_a_link(out: Path, home: Path) -> None:
    (out / ".awq2marlin").mkdir()
    (out / ".awq2marlin/lock").symlink_to(home / "id_ed25519")


def _next_journal_is_a_link(out: Path, home: Path) -> None:
    (out / ".awq2marlin").mkdir()
    (out / ".awq2marlin/journal.json.new").symlink_to(home / "id_ed25519")


@pytest.mark.parametrize("trap", [_work_folder_is_a_link, _lock_is_a_link, _next_journal_is_a_link])
@pytest.mark.parametrize("command", ["convert", "convert --overwrite", "revert"])
def test_a_prepared_output_folder_leads_nobody_out(awq, marlin, private, tmp_path, run, trap, command: str) -> None:
    """A stranger's folder may hold `.awq2marlin` as he likes; nothing outside it is written, emptied or removed."""
    out = tmp_path / "out"
    if command == "convert --overwrite":
        shutil.copytree(marlin, out)
    else:
        out.mkdir()
    trap(out, private.parent)
    before = tree(private.parent)
    run(*(["revert", marlin, out] if command == "revert" else ["convert", awq, out, *command.split()[1:]]))
    assert tree(private.parent) == before
