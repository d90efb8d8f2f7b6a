"""`push` with the real client: what goes up, what does not, what is refused, and what a rerun does."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled

from awq2marlin import (
    CheckpointError,
    DifferenceError,
    HubError,
    OutputError,
    PushedFile,
    PushResult,
    convert,
    push,
    revert,
    verify,
)
from awq2marlin.cli.app import main
from tests.hostile.hostile_files import write_awq

pytestmark = pytest.mark.usefixtures("hub", "no_waiting")

CARD, CONFIG, MANIFEST = "README.md", "config.json", "marlin_manifest.json"
SHARD = "model-00001-of-00003.safetensors"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held(hub, repo_id="org/new", revision="main"):
    """Returns the bytes of every file in a repository, but what the Hub itself put there."""
    files = hub.repository(repo_id).files(revision)
    return {name: file.read() for name, file in files.items() if name != ".gitattributes"}


def as_pushed(folder, repo_id="org/new"):
    """Returns what a repository holds after a push: the folder, with its own name in the card's commands."""
    files = contents(folder)
    card = files[CARD].replace(b"(`THIS_MODEL` is this folder's path, or the repository's name.)\n\n", b"")
    return {**files, CARD: card.replace(b"THIS_MODEL", repo_id.encode())}


def refused(code, *arguments, **options):
    """Returns the message of the one problem that a push is refused with."""
    with pytest.raises((HubError, CheckpointError, OutputError, DifferenceError)) as error:
        push(*arguments, **options)
    (problem,) = error.value.problems
    assert problem.code == code, problem
    return str(problem)


REPORT = "awq2marlin-report.html"


# --- what goes up -------------------------------------------------------------------------------------------------


def test_everything_goes_up_in_one_commit(hub, marlin):
    result = push(marlin, "org/new", commit_message="Our model")
    assert held(hub) == as_pushed(marlin)
    (commit,) = hub.repository("org/new").history()
    assert (commit.title, commit.oid, commit.deleted) == ("Our model", result.commit, ())
    assert isinstance(result, PushResult)
    assert (result.repo_id, result.revision, result.url) == ("org/new", "main", f"{hub.endpoint}/org/new")
    assert (result.created, result.dry_run, result.pull_request, result.removed) == (True, False, None, ())
    expected = [
        PushedFile(name, len(data), hashlib.sha256(data).hexdigest(), True)
        for name, data in sorted(as_pushed(marlin).items())
    ]
    assert list(result.files) == expected
    assert result.uploaded_bytes == sum(file.size for file in expected)
    assert hub.repository("org/new").private is False


def test_the_card_names_the_repository(hub, marlin):
    push(marlin, "org/new")
    card = held(hub)[CARD].decode()
    assert "vllm serve org/new\n" in card
    assert "THIS_MODEL" not in card
    assert "THIS_MODEL" in (marlin / CARD).read_text()


def test_what_was_pushed_is_fetched_verified_and_reverted(hub, marlin, checkpoints, tmp_path):
    push(marlin, "org/new", private=True)
    assert hub.repository("org/new").private
    fetched = Path(snapshot_download("org/new", local_dir=tmp_path / "fetched"))
    verify(checkpoints / "one-awq", fetched)
    revert(fetched, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(checkpoints / "one-awq")


def reported(marlin, checkpoints, tmp_path):
    """Returns the report of a verification."""
    report = tmp_path / "report.html"
    assert main(["verify", str(checkpoints / "one-awq"), str(marlin), "--report", str(report), "--quiet"]) == 0
    return report


def test_a_report_goes_along_and_revert_and_verify_leave_it_alone(hub, marlin, checkpoints, tmp_path):
    report = reported(marlin, checkpoints, tmp_path)
    assert main(["push", str(marlin), "org/new", "--report", str(report), "--quiet"]) == 0
    assert held(hub) == {**as_pushed(marlin), REPORT: report.read_bytes()}
    fetched = Path(snapshot_download("org/new", local_dir=tmp_path / "fetched"))
    verify(checkpoints / "one-awq", fetched)
    revert(fetched, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(checkpoints / "one-awq")
    push(marlin, "org/new")  # the same conversion: what the report says is still so
    assert held(hub)[REPORT] == report.read_bytes()


def test_a_report_goes_with_the_checkpoint_that_it_speaks_of(hub, marlin, other, checkpoints, tmp_path):
    push(marlin, "org/new", report=reported(marlin, checkpoints, tmp_path))
    assert REPORT in push(other, "org/new", overwrite=True).removed
    assert held(hub) == as_pushed(other)


@pytest.mark.parametrize("text", ["", "<!doctype html>\n<p>my diary</p>", "<html>"])
def test_what_is_no_report_is_not_published(hub, marlin, tmp_path, text):
    (tmp_path / "page.html").write_text(text)
    message = refused("unknown-report", marlin, "org/new", report=tmp_path / "page.html")
    assert "verify ... --report" in message
    assert hub.requests("POST") == []


def test_a_rerun_sends_nothing_and_commits_nothing(hub, marlin):
    first = push(marlin, "org/new")
    hub.forget_requests()
    again = push(marlin, "org/new")
    assert (again.commit, again.created, again.uploaded_bytes) == (None, False, 0)
    assert [file.sha256 for file in again.files] == [file.sha256 for file in first.files]
    assert not any(file.uploaded for file in again.files)
    assert hub.requests("PUT") == []
    assert hub.requests("POST") == []


def test_a_rerun_sends_only_what_is_missing(hub, marlin):
    push(marlin, "org/new")
    repository = hub.repository("org/new")
    shard = as_pushed(marlin)[SHARD]
    hub.objects.path(hashlib.sha256(shard).hexdigest()).unlink()
    other = repository.objects.stored(repository.objects.add(bytes(len(shard))), True)  # of the same size
    repository.write("refs/heads/main", {SHARD: other}, (CONFIG, "code/one.py"), "damage")
    hub.forget_requests()
    result = push(marlin, "org/new")
    assert [file.name for file in result.files if file.uploaded] == ["code/one.py", CONFIG, SHARD]
    assert [each.received for each in hub.requests("PUT")] == [len(shard)]
    assert held(hub) == as_pushed(marlin)
    assert repository.history()[-1].added == ("code/one.py", CONFIG, SHARD)


def test_files_of_the_repository_s_owner_stay(hub, marlin):
    hub.add_repository("org/new", {"LICENSE": b"mine", "images/a.txt": b"mine too"})
    push(marlin, "org/new")
    assert held(hub) == {**as_pushed(marlin), "LICENSE": b"mine", "images/a.txt": b"mine too"}


def test_files_that_a_conversion_carried_over_go_up_and_come_back(hub, tmp_path):
    source = write_awq(tmp_path / "awq")
    ours = {
        "pytorch_model.bin": b"1",
        "spk.pt": b"2",
        "adapter_model.safetensors": b"3",
        "2_Dense/model.safetensors": b"4",
    }
    for name, data in ours.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    convert(source, tmp_path / "out", carry=["pytorch_model.bin"])
    push(tmp_path / "out", "org/new")
    assert held(hub) == as_pushed(tmp_path / "out")
    assert {*ours, "model.safetensors.index.json"} < held(hub).keys()
    revert("org/new", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_hidden_and_pickled_files_do_not_go_up(hub, marlin):
    (marlin / ".env").write_text("SECRET=1")
    (marlin / ".git").mkdir()
    (marlin / ".git" / "config").write_text("x")
    (marlin / "pytorch_model.bin").write_bytes(b"pickle")
    (marlin / "stray.safetensors").write_bytes(b"x")
    result = push(marlin, "org/new")
    assert not {".env", ".git/config", "pytorch_model.bin", "stray.safetensors"} & held(hub).keys()
    assert dict(result.left_behind) == {
        ".env": "hidden",
        ".git": "hidden",
        "pytorch_model.bin": "pickled weights",
        "stray.safetensors": "not named by the index",
    }


def test_branches_are_made_and_used(hub, marlin):
    hub.add_repository("org/new", {"notes.txt": b"x"})
    result = push(marlin, "org/new", revision="marlin")
    assert (result.revision, result.url) == ("marlin", f"{hub.endpoint}/org/new/tree/marlin")
    assert held(hub, revision="marlin") == {**as_pushed(marlin), "notes.txt": b"x"}
    assert held(hub) == {"notes.txt": b"x"}
    assert push(marlin, "org/new", revision="marlin").commit is None
    push(marlin, "org/another", revision="v2/marlin")
    assert held(hub, "org/another", "v2/marlin") == as_pushed(marlin, "org/another")


def test_a_renamed_repository_receives_under_its_new_name(hub, marlin):
    hub.add_repository("org/new")
    hub.moved["org/old"] = "org/new"
    result = push(marlin, "org/old")
    assert result.repo_id == "org/new"
    assert set(held(hub)) == set(contents(marlin))


def test_uploads_in_parts(hub, marlin):
    hub.multipart_from, hub.part_size = 1, 10_000
    push(marlin, "org/new")
    assert held(hub) == as_pushed(marlin)
    assert len(hub.requests("PUT", "/lfs/part/*")) > 10


# --- what is there already ----------------------------------------------------------------------------------------


def test_another_checkpoint_is_refused_and_untouched(hub, marlin, other):
    push(other, "org/new")
    before = held(hub)
    message = refused("target-taken", marlin, "org/new")
    assert "--overwrite" in message
    assert "--create-pr" in message
    hub.add_repository("org/plain", {CONFIG: b"{}", "model.safetensors": b"x"})
    refused("target-taken", marlin, "org/plain")
    assert held(hub) == before
    assert held(hub, "org/plain") == {CONFIG: b"{}", "model.safetensors": b"x"}


def test_another_run_of_the_same_model_is_refused(marlin):
    push(marlin, "org/new")
    manifest = json.loads((marlin / MANIFEST).read_text())
    manifest["source"]["revision"] = "another"
    (marlin / MANIFEST).write_text(json.dumps(manifest))
    refused("target-taken", marlin, "org/new")


def test_weights_of_another_checkpoint_without_a_config_are_refused(hub, marlin):
    hub.add_repository("org/new", {"model-00009-of-00009.safetensors": b"x"})
    assert "model-00009-of-00009.safetensors" in refused("target-taken", marlin, "org/new")
    push(marlin, "org/new", overwrite=True)
    assert held(hub) == as_pushed(marlin)


def test_overwriting_removes_what_the_earlier_one_left_and_nothing_else(hub, marlin, other):
    push(other, "org/new")
    repository = hub.repository("org/new")
    repository.add({"notes.txt": b"mine", "extra/old.safetensors": b"mine", "stray.safetensors": b"?"})
    result = push(marlin, "org/new", overwrite=True)
    assert held(hub) == {**as_pushed(marlin), "notes.txt": b"mine", "extra/old.safetensors": b"mine"}
    gone = (
        "code/other.py",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "stray.safetensors",
    )
    assert result.removed == gone
    assert repository.history()[-1].deleted == gone
    assert len(repository.history()) == 3


def test_overwriting_a_repository_with_a_hostile_manifest_removes_weights_only(hub, marlin):
    hostile = {"format_version": 1, "files": {"../notes.txt": {}, "notes.txt": {}}}
    files = {CONFIG: b"{}", MANIFEST: json.dumps(hostile).encode(), "notes.txt": b"mine", "old.safetensors": b"x"}
    hub.add_repository("org/new", files)
    assert push(marlin, "org/new", overwrite=True).removed == ("old.safetensors",)
    assert held(hub) == {**as_pushed(marlin), "notes.txt": b"mine"}


def test_a_pull_request_proposes_the_change(hub, marlin, other, monkeypatch):
    push(other, "org/new")
    before = held(hub)
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    result = push(marlin, "org/new", create_pr=True)
    assert (result.revision, result.pull_request) == ("refs/pr/1", f"{hub.endpoint}/org/new/discussions/1")
    assert result.url == result.pull_request
    assert held(hub) == before
    assert held(hub, revision="refs/pr/1") == as_pushed(marlin)
    message = refused("hub-not-found", marlin, "org/nothing", create_pr=True)
    assert message.endswith("check the name, or drop --create-pr to create the repository")


def test_a_public_repository_is_no_private_one(hub, marlin):
    hub.add_repository("org/new")
    assert "--private" in refused("target-public", marlin, "org/new", private=True)
    assert held(hub) == {}


def test_a_dry_run_writes_nothing(hub, marlin, other):
    result = push(marlin, "org/new", dry_run=True)
    assert (result.created, result.dry_run, result.commit) == (True, True, None)
    assert all(file.uploaded for file in result.files)
    assert hub.repositories() == []
    push(other, "org/new")
    hub.forget_requests()
    assert len(push(marlin, "org/new", dry_run=True, overwrite=True).removed) == 3
    assert {each.method for each in hub.requests()} == {"GET", "HEAD"}


def test_arguments_that_make_no_sense(marlin):
    for repo_id in ("name", "a/b/c", "org/", "/name", "org/na me", "datasets/org/name", "org/a..b", "-/x", "org/ü"):
        with pytest.raises(ValueError, match="is not a repository name"):
            push(marlin, repo_id)
    for options in ({"revision": "a" * 40}, {"revision": ""}, {"revision": "x", "create_pr": True}):
        with pytest.raises(ValueError, match="revision"):
            push(marlin, "org/new", **options)


# --- the folder must be sound -------------------------------------------------------------------------------------


def damage(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [SHARD, "generation_config.json", "code/one.py"])
def test_a_damaged_file_is_not_published(hub, marlin, name):
    damage(marlin / name)
    assert f"{name}: it differs from the file that the conversion wrote" in refused("wrong-digest", marlin, "org/new")
    assert hub.repositories() == []
    assert {each.method for each in hub.requests()} == {"GET"}


def test_every_damaged_file_is_named(marlin):
    damage(marlin / SHARD)
    (marlin / "generation_config.json").write_text("{}")
    with pytest.raises(DifferenceError) as error:
        push(marlin, "org/new")
    assert [problem.file for problem in error.value.problems] == ["generation_config.json", SHARD]


def test_unfinished_folders_and_other_checkpoints_are_refused_before_the_hub_is_asked(hub, marlin, checkpoints):
    (marlin / ".awq2marlin").mkdir()
    journal = {"version": 1, "plan": "p", "names": [], "finished": {}}
    (marlin / ".awq2marlin" / "journal.json").write_text(json.dumps(journal))
    assert "run the same 'awq2marlin convert' again" in refused("unfinished", marlin, "org/new")
    shutil.rmtree(marlin / ".awq2marlin")
    (marlin / CONFIG).rename(marlin / "config.bak")
    refused("no-config", marlin, "org/new")
    (marlin / "config.bak").rename(marlin / CONFIG)
    assert "convert it first" in refused("not-converted", checkpoints / "one-awq", "org/new")
    (marlin / "generation_config.json").unlink()
    refused("missing-file", marlin, "org/new")
    refused("not-found", marlin / "nothing", "org/new")
    assert hub.requests() == []


def test_a_config_that_is_not_the_source_s_is_not_published(hub, marlin):
    config = json.loads((marlin / CONFIG).read_text())
    (marlin / CONFIG).write_text(json.dumps({**config, "hidden_size": 5}))
    refused("config", marlin, "org/new")
    config["quantization_config"]["awq_modules"] = []
    (marlin / CONFIG).write_text(json.dumps(config))
    refused("unaligned", marlin, "org/new")
    assert hub.requests() == []


def test_a_card_may_be_edited_or_missing(hub, marlin):
    (marlin / CARD).write_text("---\nlicense: mit\n---\n# Ours\n")
    push(marlin, "org/new")
    assert held(hub)[CARD] == b"---\nlicense: mit\n---\n# Ours\n"
    (marlin / CARD).unlink()
    push(marlin, "org/other")
    assert CARD not in held(hub, "org/other")


def test_a_card_that_is_not_utf_8_is_refused_before_the_hub_is_asked(hub, marlin):
    (marlin / CARD).write_bytes(b"# Mod\xe8le\n")
    assert "is not UTF-8 (byte 5)" in refused("hub-bad-card", marlin, "org/new")
    assert hub.requests() == []


def test_a_card_that_the_hub_refuses_is_told(hub, marlin):
    (marlin / CARD).write_text("---\ntags: {a: b}\n---\n")
    assert '"tags" must be a string or a list of strings' in refused("hub-bad-card", marlin, "org/new")
    assert held(hub) == {}


# --- what the Hub refuses -----------------------------------------------------------------------------------------


def test_without_a_token_nothing_is_asked(hub, marlin, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused("hub-unauthorized", marlin, "org/new")
    assert hub.requests() == []


def test_tokens_that_do_not_suffice(hub, marlin, monkeypatch):
    hub.add_repository("org/there")
    for token in (hub.read_token, hub.stranger_token):
        monkeypatch.setenv("HF_TOKEN", token)
        assert "/settings/tokens" in refused("hub-forbidden", marlin, "org/new")
        assert "write access" in refused("hub-forbidden", marlin, "org/there")
    monkeypatch.setenv("HF_TOKEN", "hf_notATokenAtAll")
    assert "notATokenAtAll" not in refused("hub-unauthorized", marlin, "org/new")
    assert hub.requests("PUT") == []


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/models/org/new", 429, "hub-rate-limit"),
        ("*/tree/*", 500, "hub-unavailable"),
        ("/api/repos/create", 403, "hub-forbidden"),
        ("*/preupload/*", 503, "hub-unavailable"),
        ("*/objects/batch", 403, "hub-forbidden"),
        ("/lfs/upload/*", 500, "hub-unavailable"),
        ("/lfs/verify", 404, "hub-refused"),
        ("*/commit/*", 409, "hub-conflict"),
        ("*/commit/*", 413, "hub-quota"),
        ("*/commit/*", 429, "hub-rate-limit"),
    ],
)
def test_a_refusal_on_the_way_is_told_and_a_rerun_completes(hub, marlin, path, status, code):
    if "create" not in path:
        hub.add_repository("org/new")
    hub.misbehave(path, status=status, times=None)
    refused(code, marlin, "org/new")
    hub.behave()
    assert "org/new" not in hub.repositories() or CONFIG not in held(hub)
    push(marlin, "org/new")
    assert held(hub) == as_pushed(marlin)


def test_failures_that_pass_are_not_even_noticed(hub, marlin):
    hub.misbehave("/lfs/upload/*", status=500, times=1)
    hub.misbehave("/lfs/upload/*", drop_after=1000, times=1, after=2)
    hub.misbehave("*/preupload/*", status=429, headers={"Retry-After": "1"}, times=1)
    push(marlin, "org/new")
    assert held(hub) == as_pushed(marlin)


def test_an_interrupted_upload_goes_on_with_what_is_missing(hub, marlin):
    hub.misbehave("/lfs/upload/*", status=403, times=None, after=2)
    refused("hub-forbidden", marlin, "org/new")
    assert hub.repository("org/new").history() == []
    hub.behave()
    sent = {each.path for each in hub.requests("PUT") if each.status == 200}
    assert len(sent) == 2
    hub.forget_requests()
    push(marlin, "org/new")
    again = [each.path for each in hub.requests("PUT")]
    assert len(again) == 1
    assert not sent & set(again)
    assert held(hub) == as_pushed(marlin)


def test_an_answer_that_is_lost_after_the_commit_costs_nothing(hub, marlin):
    hub.misbehave("*/commit/*", drop_after=-1)
    refused("hub-unreachable", marlin, "org/new")
    assert push(marlin, "org/new").commit is None
    assert held(hub) == as_pushed(marlin)
    assert len(hub.repository("org/new").history()) == 1


def test_somebody_else_s_commit_in_between_is_a_conflict(hub, marlin):
    hub.add_repository("org/new")
    hold = threading.Event()
    hub.misbehave("*/commit/*", hold=hold)
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(refused("hub-conflict", marlin, "org/new")))
    thread.start()
    while not hub.requests("POST", "*/commit/*"):
        assert thread.is_alive()
        time.sleep(0.005)
    hub.repository("org/new").add({"theirs.txt": b"x"})
    hold.set()
    thread.join()
    assert "run the command again" in outcome[0]
    assert held(hub) == {"theirs.txt": b"x"}
    push(marlin, "org/new")
    assert held(hub) == {**as_pushed(marlin), "theirs.txt": b"x"}


def test_what_the_hub_does_not_hold_afterwards_is_told(hub, marlin, monkeypatch):
    repository = hub.add_repository("org/new")
    write = repository.write

    def lose(ref, added, *rest, **more):
        return write(ref, {name: file for name, file in added.items() if name != SHARD}, *rest, **more)

    monkeypatch.setattr(repository, "write", lose)
    assert SHARD in refused("hub-incomplete", marlin, "org/new")


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_tells_what_it_did(hub, marlin, capsys):
    assert main(["push", str(marlin), "org/new"]) == 0
    out, _ = capsys.readouterr()
    assert "checked    9 files; all are as the conversion wrote them\n" in out
    assert f"committed  {hub.repository('org/new').commit().oid} in " in out
    assert f"see        {hub.endpoint}/org/new\n" in out
    assert main(["push", str(marlin), "org/new"]) == 0
    assert "nothing to commit\n" in capsys.readouterr().out
    assert main(["push", str(marlin), "org/dry", "--dry-run"]) == 0
    assert "would upload 9 files" in capsys.readouterr().out
    assert main(["push", str(marlin), "org/new", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_json(hub, marlin, capsys):
    assert main(["push", str(marlin), "org/new", "--json", "--quiet", "--private", "--commit-message", "Hello"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert (document["command"], document["status"], document["output"]) == ("push", "done", "org/new")
    assert document["source"] == str(marlin)
    names = sorted(contents(marlin))
    assert document["files"] == [
        {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(as_pushed(marlin).items())
    ]
    assert document["details"] == {
        "dry_run": False,
        "revision": "main",
        "url": f"{hub.endpoint}/org/new",
        "commit": hub.repository("org/new").commit().oid,
        "pull_request": None,
        "created": True,
        "uploaded": names,
        "removed": [],
    }
    assert hub.repository("org/new").history()[0].title == "Hello"


def test_errors_of_the_command(hub, marlin, capsys, monkeypatch):
    assert main(["push", str(marlin), "no-slash", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["errors"][0]["code"] == "usage"
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert main(["push", str(marlin), "org/new", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["errors"][0]["code"] == "hub-forbidden"
    assert err.startswith("error: org/new: your token may not do this")
    assert "Traceback" not in err


def test_the_client_s_progress_bars_are_as_they_were(marlin):
    before = are_progress_bars_disabled()
    push(marlin, "org/new")
    assert are_progress_bars_disabled() == before


def test_an_interrupted_command_says_that_it_resumes(hub, marlin):
    hub.misbehave("/lfs/upload/*", bytes_per_second=300_000, times=None)
    process = subprocess.Popen(
        [sys.executable, "-m", "awq2marlin", "push", str(marlin), "org/new"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, where tests run in the background
    )
    while not hub.requests("PUT"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted; run the same command again to continue" in err
    assert "Traceback" not in out + err
    assert hub.token not in out + err
    assert hub.repository("org/new").history() == []
    hub.behave()
    push(marlin, "org/new")
    assert held(hub) == as_pushed(marlin)


@pytest.mark.parametrize("fault", ["none", "500", "drop", "403"])
def test_the_token_is_in_no_output(hub, marlin, tmp_path, fault):
    if fault == "500":
        hub.misbehave("/lfs/upload/*", status=500, times=1, message=f"token {hub.token}")
    elif fault == "drop":
        hub.misbehave("*/commit/*", drop_after=-1)
    elif fault == "403":
        hub.misbehave("*/commit/*", status=403, message=f"bad token {hub.token}", times=None)
    done = subprocess.run(
        [sys.executable, "-m", "awq2marlin", "push", str(marlin), "org/new", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == (0 if fault in ("none", "500") else 1)
    assert hub.token not in done.stdout + done.stderr
    assert not any(hub.token.encode() in data for data in contents(marlin).values())
    assert not any(hub.token.encode() in file.read() for file in hub.repository("org/new").files().values())
