"""From the Hub to the Hub: in one commit, or shard by shard through little disk."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from awq2marlin import DifferenceError, HubError, OutputError, PushTarget, convert, revert, verify
from awq2marlin.pipeline import run as pipeline

from ..faults.helpers import WORK, contents, finished_shards, start, stop_when
from ..hostile.hostile_files import pack_tensors, write_awq, zeros
from .conftest import REPO, SHARDS, shard_names
from .test_low_disk import NOTES, Steps, Watch, bytes_below, fetches, spoiling, wait_for

pytestmark = pytest.mark.usefixtures("no_waiting", "repository")

TARGET = "ada/model-marlin"
REST = ["LICENSE", "README.md", "generation_config.json", "marlin_manifest.json", "model.safetensors.index.json"]


@pytest.fixture
def expected(tmp_path, hub):
    """The files of a conversion from the Hub, before they are pushed."""
    out = tmp_path / "expected"
    convert(REPO, out)
    shutil.rmtree(os.environ["HF_HOME"])
    hub.forget_requests()
    return contents(out)


def on_the_hub(hub, revision="main", repo_id=TARGET):
    """The files of the target, by name."""
    files = {name: file.read() for name, file in hub.repository(repo_id).files(revision).items()}
    del files[".gitattributes"]
    return files


def same_but_for_the_card(found, expected):
    """The card on the Hub names the repository in its commands."""
    found, expected = dict(found), dict(expected)
    assert TARGET in found.pop("README.md").decode()
    del expected["README.md"]
    return found == expected


def added(hub):
    """What each commit of the target adds, oldest first."""
    return [sorted(commit.added) for commit in hub.repository(TARGET).history()]


# --- what goes up, and when -------------------------------------------------------------------------------


def test_without_little_disk_all_goes_up_in_one_commit(hub, run, expected, tmp_path):
    outcome = run("convert", REPO, "out", "--push-to", TARGET, "--commit-message", "Here it is")
    assert outcome.code == 0, outcome.err
    assert contents(tmp_path / "out") == expected
    assert same_but_for_the_card(on_the_hub(hub), expected)
    (commit,) = hub.repository(TARGET).history()
    assert commit.title == "Here it is"
    pushed = outcome.report["details"]["pushed"]
    assert (pushed["commit"], pushed["url"]) == (commit.oid, f"{hub.endpoint}/{TARGET}")
    assert sorted(pushed["uploaded"]) == sorted(expected)


def test_with_little_disk_every_shard_has_its_commit_and_the_config_the_last(hub, run, expected, source, tmp_path):
    outcome = run("convert", REPO, "--low-disk", "--push-to", TARGET)
    assert outcome.code == 0, outcome.err
    shards = [[name] for name in shard_names(source)]
    assert added(hub) == [*shards, REST, ["config.json"]]
    assert same_but_for_the_card(on_the_hub(hub), expected)
    assert sorted(outcome.report["details"]["pushed"]["uploaded"]) == sorted(expected)
    assert not (tmp_path / "model-awq-marlin").exists(), "nothing is left"
    titles = [commit.title for commit in hub.repository(TARGET).history()]
    assert titles[0] == "Add Marlin-native checkpoint: model-00001-of-00004.safetensors"
    assert titles[-1] == "Add Marlin-native checkpoint: config.json"


def test_what_went_from_hub_to_hub_verifies_and_reverts_to_the_source(tmp_path, source):
    convert(REPO, tmp_path / "out", low_disk=True, push_to=TARGET, verify="all")
    fetched = snapshot_download(TARGET, local_dir=tmp_path / "fetched")
    shutil.rmtree(tmp_path / "fetched" / ".cache")
    assert verify(REPO, fetched).modules_total == 28
    assert verify(f"hf://{REPO}", f"hf://{TARGET}").modules_total == 28
    back = {file.name: file.sha256 for file in revert(fetched, tmp_path / "back").files}
    assert back == {name: hashlib.sha256(data).hexdigest() for name, data in contents(source).items()}


def test_a_local_source_passes_through_little_disk_too_and_stays(hub, tmp_path, source):
    before = contents(source)
    result = convert(source, tmp_path / "out", low_disk=True, push_to=TARGET)
    assert contents(source) == before
    assert not (tmp_path / "out").exists()
    assert result.serving[0].command == f"vllm serve {TARGET}"  # nothing else is left to be served
    assert result.pushed.created
    assert "config.json" in on_the_hub(hub)


def test_a_shard_is_on_the_hub_before_it_is_removed_and_while_others_convert(hub, tmp_path, monkeypatch, source):
    """Every conversion but the first two waits for the upload of the one two before; nothing is lost meanwhile."""
    out, names = tmp_path / "out", shard_names(source)

    def look(number):
        there = {name for name in names if (out / name).exists()}
        sent = set(on_the_hub(hub))
        assert {*names[: number - 1]} <= there | sent
        assert len(there) <= 2
        if number < SHARDS:
            wait_for(lambda: number + 1 in fetches(hub))
        if number > 1:
            wait_for(lambda: names[number - 2] in on_the_hub(hub))

    Steps(monkeypatch, look)
    convert(REPO, out, low_disk=True, push_to=TARGET)


def test_from_hub_to_hub_needs_a_few_shards_of_disk(tmp_path, monkeypatch, source):
    out, home = tmp_path / "out", Path(os.environ["HF_HOME"])
    with Watch(out, home) as watch:
        Steps(monkeypatch, lambda _: watch.look())
        convert(REPO, out, low_disk=True, push_to=TARGET)
    sizes = sorted((source / name).stat().st_size for name in shard_names(source))
    side_files = 40_000  # config, index, tokenizer, manifest
    assert sizes[0] < watch.peak <= 2 * sum(sizes[-2:]) + side_files + NOTES
    assert bytes_below(home) < NOTES


def test_a_module_that_differs_is_not_sent(hub, tmp_path, monkeypatch, source):
    name = shard_names(source)[1]
    monkeypatch.setattr(pipeline, "rewrite_shard", spoiling(name))
    with pytest.raises(DifferenceError):
        convert(REPO, tmp_path / "out", low_disk=True, push_to=TARGET, verify="all")
    assert name not in on_the_hub(hub)
    assert "config.json" not in on_the_hub(hub)


# --- what is there already --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_a_target_with_another_checkpoint_is_refused_before_any_work(hub, run, other, options):
    hub.add_repository(TARGET, other)
    before = on_the_hub(hub)
    hub.forget_requests()
    outcome = run("convert", REPO, "out", "--push-to", TARGET, *options)
    assert (outcome.code, outcome.error["code"]) == (1, "target-taken")
    assert on_the_hub(hub) == before
    assert not Path("out").exists()
    assert all(each.range for each in hub.requests("GET", f"/cdn/{REPO}/*"))


def test_a_dry_run_looks_at_the_target_too(hub, run, other):
    hub.add_repository(TARGET, other)
    assert run("convert", REPO, "--dry-run", "--push-to", TARGET).error["code"] == "target-taken"
    assert run("convert", REPO, "--dry-run", "--push-to", "ada/new").code == 0
    assert "ada/new" not in hub.repositories()


def test_overwrite_removes_the_config_in_the_first_commit(hub, run, other, expected):
    hub.add_repository(TARGET, other)
    assert run("convert", REPO, "out", "--push-to", TARGET, "--low-disk", "--overwrite").code == 0
    first, *rest = hub.repository(TARGET).history()[1:]
    assert "config.json" in first.deleted
    assert not first.added
    assert all("config.json" not in commit.files for commit in rest[:-1])
    assert same_but_for_the_card(on_the_hub(hub), expected)


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_a_pull_request_leaves_the_branch_alone(hub, run, other, expected, options):
    hub.add_repository(TARGET, other)
    before = on_the_hub(hub)
    outcome = run("convert", REPO, "out", "--push-to", TARGET, "--create-pr", *options)
    assert outcome.code == 0, outcome.err
    assert on_the_hub(hub) == before
    assert same_but_for_the_card({name: on_the_hub(hub, "refs/pr/1")[name] for name in expected}, expected)
    assert outcome.report["details"]["pushed"]["pull_request"].endswith("/discussions/1")


def test_an_interrupted_run_goes_on_in_its_pull_request(hub, run, other, expected):
    hub.add_repository(TARGET, other)
    command = ("convert", REPO, "out", "--push-to", TARGET, "--create-pr", "--low-disk")
    hub.misbehave("/cdn/*00004-of*", method="GET", after=1, times=None, status=403)
    assert run(*command).code == 1
    hub.behave()
    assert run(*command).code == 0
    assert hub.repository(TARGET).pull_requests == 1
    assert same_but_for_the_card({name: on_the_hub(hub, "refs/pr/1")[name] for name in expected}, expected)


def test_a_branch_and_a_private_repository(hub, run, expected):
    options = ("--private", "--revision", "marlin")
    assert run("convert", f"{REPO}@main", "out", "--push-to", TARGET, *options, "--low-disk").code == 0
    assert hub.repository(TARGET).private
    assert same_but_for_the_card(on_the_hub(hub, "marlin"), expected)
    assert on_the_hub(hub) == {}


def test_what_is_there_already_is_not_done_again(hub, run):
    command = ("convert", REPO, "out", "--push-to", TARGET, "--low-disk")
    assert run(*command).code == 0
    hub.forget_requests()
    assert run(*command).error["code"] == "target-finished"
    assert all(each.range for each in hub.requests("GET", "/cdn/*"))
    assert run(*command, "--overwrite").code == 0


@pytest.mark.parametrize("options", [["--private"], ["--revision", "x"], ["--create-pr"], ["--commit-message", "x"]])
def test_options_of_the_push_need_it(run, options):
    outcome = run("convert", REPO, *options)
    assert outcome.code == 2
    assert "--push-to" in json.loads(outcome.out)["errors"][0]["message"]
    assert run("convert", REPO, "--push-to", "no-name").code == 2


def test_python_takes_a_target(hub, tmp_path):
    result = convert(REPO, tmp_path / "out", push_to=PushTarget(TARGET, private=True), commit_message="x")
    assert hub.repository(TARGET).private
    assert (result.pushed.repo_id, result.pushed.url) == (TARGET, f"{hub.endpoint}/{TARGET}")
    with pytest.raises(ValueError, match="is not a repository name"):
        convert(REPO, tmp_path / "out2", push_to="x")


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"path": "/lfs/*", "method": "PUT", "after": 2, "status": 403},
        {"path": f"/api/models/{TARGET}/commit/*", "method": "POST", "after": 2, "status": 429},
        {"path": f"/api/models/{TARGET}/commit/*", "method": "POST", "after": 2, "drop_after": -1},
        {"path": f"/api/models/{TARGET}/commit/*", "method": "POST", "after": 4, "status": 403},
        {"path": f"/api/models/{TARGET}/commit/*", "method": "POST", "after": 5, "status": 403},
    ],
    ids=["upload", "commit", "commit without an answer", "side files", "config"],
)
def test_a_failed_upload_is_told_and_the_rerun_sends_only_what_is_missing(hub, run, expected, fault):
    hub.misbehave(times=None, **fault)
    command = ("convert", REPO, "out", "--push-to", TARGET, "--low-disk")
    outcome = run(*command)
    assert outcome.code == 1, outcome.err
    assert hub.token not in outcome.err + outcome.out
    assert "Traceback" not in outcome.err
    assert not Path("out", "config.json").exists()
    there = set(on_the_hub(hub))
    assert "config.json" not in there
    hub.behave()
    hub.forget_requests()
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    assert same_but_for_the_card(on_the_hub(hub), expected)
    sent = [name for commit in added(hub) for name in commit]
    assert sorted(sent) == sorted(expected), "nothing was committed twice"
    assert not Path("out").exists()


def test_without_little_disk_a_failed_upload_is_taken_up_by_the_same_command(hub, run, expected):
    hub.misbehave(f"/api/models/{TARGET}/commit/*", method="POST", status=403, times=None)
    command = ("convert", REPO, "out", "--push-to", TARGET)
    assert run(*command).error["code"] == "hub-forbidden"
    hub.behave()
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    assert len(outcome.report["details"]["resumed"]) == SHARDS
    assert contents(Path("out")) == expected
    assert same_but_for_the_card(on_the_hub(hub), expected)


def test_what_the_hub_lost_is_made_and_sent_again(hub, run, expected, source):
    """The journal says that a shard was sent; the Hub has it no more, or another."""
    command = ("convert", REPO, "out", "--push-to", TARGET, "--low-disk")
    hub.misbehave("/cdn/*00004-of*", method="GET", after=1, times=None, status=403)
    assert run(*command).code == 1
    hub.behave()
    first, second, *_ = shard_names(source)
    repository = hub.repository(TARGET)
    repository.write("refs/heads/main", {}, [first], "lose one")
    repository.add({second: b"another"})
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    assert same_but_for_the_card(on_the_hub(hub), expected)


def test_killed_between_any_two_commits_the_same_command_completes_it(hub, run, tmp_path, expected):
    """kill -9 while a commit is being made, for every commit in turn."""
    command = ("convert", REPO, tmp_path / "out", "--push-to", TARGET, "--low-disk")
    for number in range(SHARDS + 2):
        hub._repositories.pop(("model", TARGET), None)
        held = hub.misbehave(f"/api/models/{TARGET}/commit/*", method="POST", after=number, drop_after=-1, times=1)
        stopped = stop_when(start(*command), lambda held=held: held.struck, signal.SIGKILL)
        assert stopped.code == -9, stopped.err
        hub.behave()
        outcome = run(*command)
        if outcome.code:  # it was finished but for its last breath
            assert outcome.error["code"] == "target-finished"
        assert same_but_for_the_card(on_the_hub(hub), expected)
        assert [name for commit in added(hub) for name in commit].count("config.json") == 1
        assert not (tmp_path / "out").exists()


def test_a_run_that_pushed_can_be_finished_by_one_that_does_not(hub, run, expected):
    hub.misbehave("/cdn/*00004-of*", method="GET", after=1, times=None, status=403)
    assert run("convert", REPO, "out", "--push-to", TARGET, "--low-disk").code == 1
    hub.behave()
    assert len(finished_shards(Path("out"))) == 3
    assert run("convert", REPO, "out").code == 0
    assert contents(Path("out")) == expected
    assert not Path("out", WORK).exists()


def test_without_a_token_nothing_is_done(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert run("convert", REPO, "out", "--push-to", TARGET).error["code"] == "hub-unauthorized"
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    outcome = run("convert", REPO, "out", "--push-to", TARGET, "--low-disk")
    assert outcome.error["code"] == "hub-forbidden"
    assert hub.read_token not in outcome.err
    assert not Path("out", "config.json").exists()


def test_errors_are_of_the_package(tmp_path):
    convert(REPO, tmp_path / "out")
    with pytest.raises(OutputError):
        convert(REPO, tmp_path / "out", push_to=TARGET)
    with pytest.raises(HubError):
        convert(REPO, tmp_path / "out2", push_to="eve/x")


def test_an_index_that_the_output_needs_and_carried_files_are_passed_on_too(hub, tmp_path):
    source = write_awq(tmp_path / "awq")
    (source / "mtp.safetensors").write_bytes(pack_tensors({"mtp.weight": zeros("F16", 8, 8)}))
    (source / "spk.pt").write_bytes(b"bytes")
    convert(source, tmp_path / "out", low_disk=True, push_to="org/new")
    assert {"mtp.safetensors", "spk.pt", "model.safetensors.index.json"} < {*hub.repository("org/new").files()}
    assert verify(source, "org/new").kind == "conversion"
    revert("org/new", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
