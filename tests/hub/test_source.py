"""A repository of the Hub as source: what is fetched and when, and what comes out."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from awq2marlin import convert, inspect, revert, verify
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from awq2marlin.hub.repository import HubName, open_hub, parse_source
from awq2marlin.io.folder import Folder
from awq2marlin.progress import Silence

from ..faults.helpers import contents
from .conftest import REPO, SHARDS, shard_names
from .server import LoopbackHub

pytestmark = pytest.mark.usefixtures("no_waiting", "repository")


def weights(hub):
    """The requests for data of shards; header requests ask for a range from 0, short of the whole."""
    return [each for each in hub.requests("GET", "/cdn/*") if not each.range]


class TestConverted:
    def test_a_repository_converts_to_its_default_folder_and_reverts_to_the_same_files(
        self, run, repository, source, tmp_path
    ):
        outcome = run("convert", REPO)
        assert outcome.code == 0, outcome.err
        commit = repository.commit().oid
        assert outcome.report["source"] == f"{REPO}@{commit}"
        assert outcome.report["output"] == "model-awq-marlin"
        manifest = json.loads((tmp_path / "model-awq-marlin" / "marlin_manifest.json").read_text())
        assert manifest["source"] == {"repo_id": REPO, "revision": commit}
        for name in shard_names(source):
            known = hashlib.sha256((source / name).read_bytes()).hexdigest()
            assert manifest["shards"][name]["source"]["digests"][1] == f"sha256:{known}"
        revert("model-awq-marlin", "back")
        assert contents(tmp_path / "back") == contents(source)
        assert outcome.report["left_behind"] == {".gitattributes": "hidden"}

    @pytest.mark.parametrize("options", [(), ("--low-disk",), ("--low-disk", "--workers", "1"), ("--workers", "3")])
    def test_all_ways_give_the_same_bytes(self, run, repository, source, tmp_path, options):
        convert(REPO, tmp_path / "expected")
        assert run("convert", f"hf://{REPO}@{repository.commit().oid}", "out", *options).code == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
        local = convert(source, tmp_path / "local")
        for name in local.shards:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()

    @pytest.mark.parametrize("options", [(), ("--low-disk",)])
    def test_files_of_unusual_names_are_fetched_pushed_and_given_back(self, hub, run, source, tmp_path, options):
        odd = shutil.copytree(source, tmp_path / "odd")
        names = ["at 10.11\u202fPM.png", "fig: 1.png", "\U0001f468\u200d\U0001f467.txt", "license", "a b#c?d%20.txt"]
        for name in names:
            (odd / name).write_text(name)
        hub.add_repository("org/odd-awq", odd)
        assert run("convert", "org/odd-awq", "out", "--push-to", "org/odd-marlin", *options).code == 0
        assert {*names} <= hub.repository("org/odd-marlin").files().keys()
        assert run("verify", "org/odd-awq", "org/odd-marlin").code == 0
        assert run("revert", "org/odd-marlin", "back", *options).code == 0
        assert contents(tmp_path / "back") == contents(odd)

    def test_an_executor_of_the_caller_gets_each_shard_when_it_is_there(self, tmp_path):
        with ThreadPoolExecutor(2) as pool:
            convert(REPO, tmp_path / "out", executor=pool, low_disk=True)
        convert(REPO, tmp_path / "expected")
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")

    def test_progress_counts_what_is_fetched_and_what_is_converted(self, source, tmp_path):
        class Told(Silence):
            total, done = 0, 0

            def start(self, what, total):
                if what == "fetch and convert":
                    self.total = total

            def advance(self, count):
                self.done += count

        told = Told()
        convert(REPO, tmp_path / "out", verify="none", progress=told)
        data = [header.data_size for header in Folder.at(source).read_headers(shard_names(source)).values()]
        assert told.total == told.done == sum(data), "as many as there are, though each is fetched and converted"

    def test_the_cache_is_used_and_nothing_is_fetched_twice(self, hub, run):
        assert run("convert", REPO, "first").code == 0
        hub.forget_requests()
        assert run("convert", REPO, "second").code == 0
        assert weights(hub) == []
        assert contents(Path("first")) == contents(Path("second"))

    def test_verify_and_inspect_take_repositories_too(self, hub, run, repository):
        convert(REPO, "out")
        hub.add_repository("org/model-marlin", Path("out").resolve())
        assert verify(REPO, "hf://org/model-marlin").source == f"{REPO}@{repository.commit().oid}"
        assert run("verify", REPO, "out").code == 0
        assert run("inspect", "org/model-marlin").report["details"]["format"] == "marlin_native"


# --- what is read before the first shard ------------------------------------------------------------------


@pytest.mark.parametrize("command", [("convert", "--dry-run"), ("convert", "--dry-run", "--low-disk"), ("inspect",)])
def test_the_whole_plan_needs_only_kilobytes(hub, run, command, tmp_path):
    outcome = run(command[0], REPO, *command[1:])
    assert outcome.code == 0, outcome.err
    assert len(outcome.report["modules"]) == 28
    cdn = hub.requests("GET", "/cdn/*")
    assert len(cdn) == SHARDS
    assert all(each.range.startswith("bytes=0-") and each.sent <= 32_768 for each in cdn)
    assert sum(each.sent for each in hub.requests()) < 200_000
    assert list(tmp_path.iterdir()) == []


def test_a_header_longer_than_what_is_asked_for_first_is_fetched_whole(hub, tmp_path):
    write_checkpoint(tmp_path / "model", llama_recipe(64, 64, 60, 64, 32, group_size=64))
    assert len(Folder.at(tmp_path / "model").read_header("model.safetensors").text) > 32_768
    hub.add_repository("org/deep", tmp_path / "model")
    assert inspect("org/deep").modules == replace_path(inspect(tmp_path / "model")).modules
    assert len(hub.requests("GET", "/cdn/*")) == 2


def replace_path(result):
    return replace(result, path="")


def test_a_server_that_ignores_ranges_sends_no_more_than_is_read(source, monkeypatch):
    """It sends the whole file; we take what was asked for and hang up."""
    content = LoopbackHub._content

    def whole(self, request, file, headers):
        del request.headers["Range"]
        return content(self, request, file, headers)

    monkeypatch.setattr(LoopbackHub, "_content", whole)
    assert inspect(REPO).tensors == inspect(source).tensors
    folder = open_hub(HubName(REPO))
    name = shard_names(source)[0]
    assert folder._range(name, 1000, 1100) == (source / name).read_bytes()[1000:1100]


# --- who is meant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@v1", HubName("org/name", "v1")),
        ("hf://org/na.me_1-x@refs/pr/3", HubName("org/na.me_1-x", "refs/pr/3")),
        ("./org/name", None),
        ("../org", None),
        ("name", None),
        ("/org/name", None),
        ("org/name/", None),
        ("org/name@", None),
        ("org/name@a b", None),
        ("org/name@../x", None),
        ("org/name@-x", None),
        ("org\\name/x", None),
        ("org/\N{RIGHT-TO-LEFT OVERRIDE}x", None),
        ("org/" + "x" * 97, None),
    ],
)
def test_sources_are_folders_or_repositories(text, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source(text) == (name or Path(text))
    assert parse_source(Path("org/name")) == Path("org/name")


@pytest.mark.parametrize("text", ["hf://name", "hf://", "hf://org/name/file", "hf://org/name@", "hf://datasets/org/x@"])
def test_a_prefix_that_goes_on_wrongly_is_refused(run, text):
    outcome = run("convert", text)
    assert (outcome.code, outcome.error["code"]) == (1, "hub-bad-name")


def test_a_folder_of_that_name_wins_and_the_command_says_so(hub, run, source):
    shutil.copytree(source, REPO)
    outcome = run("convert", REPO, "out")
    assert outcome.code == 0
    told = f"reading the local folder {REPO}; for the Hub repository of that name, pass hf://{REPO}"
    assert told in outcome.err
    assert hub.requests() == []
    assert run("convert", f"hf://{REPO}", "out2").code == 0
    assert hub.requests() != []


def test_a_branch_that_moves_is_followed_to_where_it_was(hub, run, repository):
    """The first run is interrupted; then the branch moves. The rerun goes on with the commit that it began with."""
    expected = convert(REPO, "expected").output
    old = repository.commit().oid
    fail = hub.misbehave("/cdn/*00004-of*", method="GET", status=500, times=None, after=1)
    shutil.rmtree(os.environ["HF_HOME"])
    assert run("convert", REPO, "out", "--workers", 1).error["code"] == "hub-unavailable"
    assert fail.struck
    hub.behave()
    new = repository.add({"config.json": b"{}\n"}, "breaks it").oid
    outcome = run("convert", REPO, "out")
    assert outcome.code == 0, outcome.err
    assert f"{REPO} has moved on to {new}; this run continues with {old}" in outcome.err
    assert len(outcome.report["details"]["resumed"]) == 3
    assert contents(Path("out")) == contents(expected)
    assert run("convert", REPO, "out", "--overwrite").error["code"] == "not-quantized"
