"""A repository that receives a checkpoint in several commits, as a conversion with little disk makes them."""

import ast
import hashlib
import inspect
from pathlib import Path

import huggingface_hub
import pytest

import awq2marlin
from awq2marlin import HubError
from awq2marlin.hub.identity import identify
from awq2marlin.hub.publication import FileIdentity, Publication, PushTarget
from awq2marlin.io.stream import NamedPath

PACKAGE = Path(awq2marlin.__file__).parent
CONFIG, MANIFEST = "config.json", "marlin_manifest.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
NAMES = [*SHARDS, CONFIG, MANIFEST, "tokenizer.json"]


class Sink:
    """Remembers the bytes that were told."""

    def __init__(self):
        self.told = []

    def advance(self, count):
        self.told.append(count)


def content(name, salt=b""):
    return hashlib.sha256(name.encode() + salt).digest() * 1000


def send(publication, name, **options):
    publication.commit({name: content(name)}, f"Add {name}", {name: FileIdentity.of(content(name))}, **options)


@pytest.fixture
def target(hub, no_waiting):  # noqa: ARG001
    return PushTarget("org/new")


def test_shards_go_up_one_by_one_and_the_config_last(hub, target):
    publication = Publication.open(target, NAMES)
    assert not publication.exists
    publication.create()
    publication.clear("nothing to clear")
    sink = Sink()
    for name in (*SHARDS, MANIFEST, CONFIG):
        assert not publication.has(name, FileIdentity.of(content(name)))
        send(publication, name, progress=sink)
        assert publication.has(name, FileIdentity.of(content(name)))
    history = hub.repository("org/new").history()
    assert [commit.added for commit in history] == [(name,) for name in (*SHARDS, MANIFEST, CONFIG)]
    assert [commit.oid for commit in history] == publication.commits
    assert sink.told == [32_000] * 5
    assert [commit.at for commit in history] == sorted(commit.at for commit in history)


def test_a_later_run_knows_what_is_there_by_size_and_digest(hub, target):
    publication = Publication.open(target, NAMES)
    publication.create()
    send(publication, SHARDS[0])
    send(publication, "tokenizer.json")
    hub.forget_requests()
    again = Publication.open(target, NAMES)
    shard, card = FileIdentity.of(content(SHARDS[0])), FileIdentity.of(content("tokenizer.json"))
    assert again.exists
    assert again.has(SHARDS[0], shard)
    assert again.has(SHARDS[0], FileIdentity(shard.size, shard.sha256))
    assert not again.has(SHARDS[0], FileIdentity(shard.size + 1, shard.sha256))
    assert not again.has(SHARDS[0], FileIdentity.of(content(SHARDS[0], b"other")))
    assert not again.has(SHARDS[1], shard)
    assert again.has("tokenizer.json", card)
    assert not again.has("tokenizer.json", FileIdentity(card.size, card.sha256)), "git does not know SHA-256"
    again.create()
    assert {each.method for each in hub.requests()} == {"GET"}


def test_whatever_the_hub_takes_into_git_has_git_s_digest(tmp_path):
    """The Hub's bound is 10 MiB."""
    path = tmp_path / "tokenizer.json"
    for size, in_git in ((0, True), (10 << 20, True), (40 << 20, False)):
        path.write_bytes(bytes(size))
        identity, _ = identify(NamedPath(path, path.name))
        assert identity.sha256 == hashlib.sha256(bytes(size)).hexdigest()
        git = hashlib.sha1(b"blob %d\0" % size + bytes(size), usedforsecurity=False).hexdigest()
        assert identity.git_sha1 == (git if in_git else None)


def test_overwriting_removes_the_config_in_the_first_commit(hub):
    old = {CONFIG: b"{}", "model.safetensors": b"x", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    repository = hub.add_repository("org/new", old)
    with pytest.raises(HubError, match="use --overwrite"):
        Publication.open(PushTarget("org/new"), NAMES)
    publication = Publication.open(PushTarget("org/new", overwrite=True), NAMES)
    assert publication.stale == ("model.safetensors", "model.safetensors.index.json")
    publication.create()
    publication.clear("Make room")
    for name in (SHARDS[0], CONFIG):
        send(publication, name)
    removal, shard, config = repository.history()[1:]
    assert removal.deleted == (CONFIG, "model.safetensors", "model.safetensors.index.json")
    assert removal.title == "Make room"
    assert (shard.deleted, config.added) == ((), (CONFIG,))
    assert set(repository.files()) == {".gitattributes", "notes.txt", SHARDS[0], CONFIG}


def test_an_interrupted_replacement_needs_no_second_permission(hub):
    hub.add_repository("org/new", {CONFIG: b"{}", "model.safetensors": b"x"})
    publication = Publication.open(PushTarget("org/new", overwrite=True), NAMES)
    publication.create()
    publication.clear("Make room")
    send(publication, SHARDS[0])
    again = Publication.open(PushTarget("org/new"), NAMES)
    assert again.stale == ()
    assert again.has(SHARDS[0], FileIdentity.of(content(SHARDS[0])))


def test_a_finished_run_is_known_by_its_manifest(hub):
    hub.add_repository("org/new", {CONFIG: b"{}", MANIFEST: b"ours", SHARDS[0]: content(SHARDS[0])})
    publication = Publication.open(PushTarget("org/new"), NAMES, lambda manifest: manifest == b"ours")
    assert publication.stale == ()
    with pytest.raises(HubError, match="another model or run"):
        Publication.open(PushTarget("org/new"), NAMES, lambda manifest: manifest == b"theirs")


def test_a_finished_run_is_not_taken_down_by_another_one(hub):
    repository = hub.add_repository("org/new", {CONFIG: b"{}", MANIFEST: b"ours", SHARDS[0]: content(SHARDS[0])})
    publication = Publication.open(PushTarget("org/new", overwrite=True), NAMES, lambda manifest: manifest == b"ours")
    publication.create()
    publication.clear("Make room")
    assert CONFIG in repository.files()
    assert len(repository.history()) == 1


def test_what_comes_between_the_look_and_the_first_commit_is_not_overwritten(hub, target):
    repository = hub.add_repository("org/new")
    publication = Publication.open(target, NAMES)
    repository.add({CONFIG: b"theirs"})
    publication.create()
    with pytest.raises(HubError, match="somebody else committed"):
        send(publication, CONFIG)
    assert repository.files()[CONFIG].read() == b"theirs"


def test_a_repository_that_appears_between_the_look_and_its_making_is_a_conflict(hub, target):
    publication = Publication.open(target, NAMES)
    hub.add_repository("org/new", {CONFIG: b"theirs"})
    with pytest.raises(HubError, match="somebody else is changing the repository"):
        publication.create()
    assert hub.repository("org/new").files()[CONFIG].read() == b"theirs"


def test_a_new_branch_is_a_copy_of_what_was_looked_at(hub):
    repository = hub.add_repository("org/new", {"notes.txt": b"x"})
    publication = Publication.open(PushTarget("org/new", revision="marlin"), NAMES)
    repository.add({CONFIG: b"theirs"})
    publication.create()
    send(publication, CONFIG)
    assert set(repository.files("marlin")) == {".gitattributes", "notes.txt", CONFIG}
    assert repository.files("marlin")[CONFIG].read() == content(CONFIG)


def test_a_manifest_too_large_to_be_one_is_not_fetched(hub, monkeypatch):
    monkeypatch.setattr("awq2marlin.hub.publication.MAX_JSON_BYTES", 10)
    hub.add_repository("org/new", {CONFIG: b"{}", MANIFEST: b"more than ten bytes"})
    with pytest.raises(HubError, match="another model or run"):
        Publication.open(PushTarget("org/new"), NAMES, lambda _manifest: True)
    assert hub.requests("GET", "*/resolve/*") == []


def test_several_commits_make_one_pull_request(hub):
    repository = hub.add_repository("org/new", {CONFIG: b"{}", "model.safetensors": b"x"})
    head = repository.commit().oid
    publication = Publication.open(PushTarget("org/new", create_pr=True), NAMES)
    publication.create()
    publication.clear("Make room")
    for name in (*SHARDS, CONFIG):
        send(publication, name)
    assert publication.revision == "refs/pr/1"
    assert publication.pull_request == publication.url == f"{hub.endpoint}/org/new/discussions/1"
    assert repository.commit().oid == head
    assert set(repository.files("refs/pr/1")) == {".gitattributes", *SHARDS, CONFIG}
    assert repository.pull_requests == 1
    again = Publication.open(PushTarget("org/new", revision="refs/pr/1", overwrite=True), NAMES)
    assert again.has(SHARDS[2], FileIdentity.of(content(SHARDS[2])))
    with pytest.raises(HubError, match="no such branch"):
        Publication.open(PushTarget("org/new", revision="refs/pr/9"), NAMES)


def test_a_shard_is_told_to_be_there_only_when_it_is(hub, target):
    publication = Publication.open(target, NAMES)
    publication.create()
    hub.misbehave("*/commit/*", status=500, times=1)
    with pytest.raises(HubError, match="wait and run the command again"):
        send(publication, SHARDS[0])
    assert not publication.has(SHARDS[0], FileIdentity.of(content(SHARDS[0])))
    hub.forget_requests()
    send(publication, SHARDS[0])  # was uploaded, and is not sent again
    assert hub.requests("PUT") == []
    assert publication.has(SHARDS[0], FileIdentity.of(content(SHARDS[0])))


# --- nothing but what the client promises -------------------------------------------------------------------------


def client_uses(path):
    """Yields every name of ``huggingface_hub`` that a module uses, with its line: imports, and attributes of them."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "huggingface_hub":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "huggingface_hub":
                    yield node.lineno, alias.name


#: Modules of the client whose names its documents describe, beside what the package itself exports.
DOCUMENTED = {"huggingface_hub.errors", "huggingface_hub.constants", "huggingface_hub.utils"}


def test_only_public_names_of_the_client_are_imported():
    found = [(path.name, *use) for path in sorted(PACKAGE.rglob("*.py")) for use in client_uses(path)]
    assert found
    for name, line, use in found:
        module, _, imported = use.rpartition(".")
        place = f"{name}:{line} uses {use}"
        assert not any(part.startswith("_") for part in use.split(".")), place
        assert module in {"huggingface_hub", *DOCUMENTED}, place
        if module == "huggingface_hub" and imported not in ("constants", "utils", "errors"):
            assert imported in huggingface_hub.__all__, place


def api_calls(path):
    """Yields the methods that a module calls on an ``HfApi``, and private attributes of the client that it touches."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "_api":
            yield node.attr


def test_only_public_methods_of_the_client_are_called():
    methods = set(api_calls(PACKAGE / "hub" / "publication.py"))
    assert methods >= {"create_repo", "create_commit", "preupload_lfs_files", "list_repo_tree", "model_info"}
    for method in methods:
        assert not method.startswith("_")
        assert inspect.isfunction(getattr(huggingface_hub.HfApi, method)), method


def test_nothing_of_ours_speaks_http_to_the_hub_by_itself():
    for path in sorted(PACKAGE.rglob("*.py")):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not imported & {"requests", "httpx", "httpx2", "hf_xet", "http", "urllib3"}, path.name


def test_xet_serves_where_it_is_installed(hub, monkeypatch, tmp_path):
    """The files go to whatever transfer the client chooses: with xet, their paths, and no bytes of ours."""
    from huggingface_hub import _commit_api, constants

    sent = []
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(_commit_api, "is_xet_available", lambda: True)

    def upload(*, additions, **_rest):
        for each in additions:
            sent.append((each.path_in_repo, each.path_or_fileobj))
            hub.objects.add_file(Path(each.path_or_fileobj))

    monkeypatch.setattr(_commit_api, "_upload_xet_files", upload)
    path = tmp_path / "shard"
    path.write_bytes(content("big"))
    publication = Publication.open(PushTarget("org/new"), [SHARDS[0]])
    publication.create()
    publication.commit({SHARDS[0]: path}, "Add it", {SHARDS[0]: FileIdentity.of(content("big"))})
    assert sent == [(SHARDS[0], str(path))] or sent == [(SHARDS[0], path)]
    assert hub.requests("PUT") == []
    assert publication.has(SHARDS[0], FileIdentity.of(content("big")))
