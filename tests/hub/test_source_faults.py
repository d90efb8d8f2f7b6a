"""What the Hub and the network refuse or spoil while a repository is converted: words, exit 1, and a rerun resumes."""

import os
import re
import shutil
import signal
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.hf_api import BlobLfsInfo

from awq2marlin import CheckpointError, convert
from awq2marlin.hub.repository import HubName, RemoteFile, open_hub

from ..faults.helpers import WORK, check_rerun, contents, finished_shards, run_process, start, stop_when
from .conftest import REPO, SHARDS, shard_names

pytestmark = pytest.mark.usefixtures("no_waiting", "repository")


def refused(hub, outcome, code):
    """Checks one clear message without traceback or token; returns it."""
    assert outcome.code == 1, outcome.err
    for text in (outcome.out, outcome.err):
        assert "Traceback" not in text
        for token in (hub.token, hub.read_token, hub.stranger_token):
            assert token not in text
    assert outcome.error["code"] == code, outcome.error
    return outcome.error["message"]


@pytest.fixture
def converted(tmp_path_factory, hub):
    """The files of a conversion that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    convert(REPO, out)
    shutil.rmtree(os.environ["HF_HOME"])
    hub.forget_requests()
    return contents(out)


# --- who may not, and what is not there -------------------------------------------------------------------


def test_a_missing_repository(hub, run):
    assert "no such model" in refused(hub, run("convert", "org/nothing"), "hub-not-found")


def test_a_private_repository_of_others(hub, run, source, monkeypatch):
    hub.add_repository("org/private", source, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    assert "private" in refused(hub, run("convert", "org/private"), "hub-not-found")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(hub, run("convert", "org/private"), "hub-not-found")


def test_a_gated_repository_tells_where_to_ask(hub, run, source, monkeypatch):
    hub.add_repository("org/gated", source, gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    for options in ((), ("--low-disk",), ("--dry-run",)):
        message = refused(hub, run("convert", "org/gated", *options), "hub-gated")
        assert f"{hub.endpoint}/org/gated" in message
    assert list(Path().iterdir()) == []


def test_a_wrong_token(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    refused(hub, run("convert", REPO), "hub-unauthorized")


def test_a_wrong_revision(hub, run):
    message = refused(hub, run("convert", f"{REPO}@v9"), "hub-no-revision")
    assert "branch, tag or commit" in message


def test_a_repository_without_awq(hub, run):
    hub.add_repository("org/plain", {"config.json": b"{}", "model.safetensors": b"\x08\0\0\0\0\0\0\0{}      "})
    assert run("convert", "org/plain").error["code"] == "not-quantized"
    hub.add_repository("org/empty")
    outcome = run("convert", "org/empty")
    assert (outcome.code, outcome.error["code"]) == (1, "no-config")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"status": 401, "message": "Invalid credentials in Authorization header"}, "hub-unauthorized"),
        ({"status": 403}, "hub-forbidden"),
        ({"status": 404, "code": "RepoNotFound"}, "hub-not-found"),
        ({"status": 429, "headers": {"Retry-After": "7"}}, "hub-rate-limit"),
        ({"status": 500}, "hub-unavailable"),
        ({"status": 503}, "hub-unavailable"),
        ({"drop_after": 0}, "hub-unreachable"),
    ],
)
@pytest.mark.parametrize("path", ["/api/models/*", "*/resolve/*/config.json", "/cdn/*"])
def test_refusals_of_every_step_are_told(hub, run, path, fault, code):
    hub.misbehave(path, times=None, **fault)
    refused(hub, run("convert", REPO, "out"), code)
    assert not Path("out").exists()


def test_no_network(hub, run, monkeypatch):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        message = refused(hub, run("convert", REPO), "hub-unreachable")
    assert "HF_ENDPOINT" in message


# --- what comes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_a_connection_dropped_in_mid_file_goes_on_where_it_was(hub, run, converted, options, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    fault = hub.misbehave("/cdn/*00002-of*", after=1, drop_after=100_000)
    assert run("convert", REPO, "out", *options).code == 0
    assert fault.struck == 1
    assert contents(Path("out")) == converted
    again = hub.requests("GET", "/cdn/*00002-of*")[-1].range
    assert 0 < int(again.removeprefix("bytes=").rstrip("-")) <= 100_000


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_a_short_body_is_never_taken_and_the_rerun_resumes(hub, run, converted, options):
    hub.misbehave("/cdn/*00003-of*", after=1, short_by=10, times=None)
    outcome = run("convert", REPO, "out", "--workers", 1, *options)
    assert outcome.code == 1, outcome.err
    assert outcome.error["code"] in ("hub-failed", "hub-unreachable")
    assert not Path("out", "config.json").exists()
    assert finished_shards(Path("out"))
    hub.behave()
    hub.forget_requests()
    assert run("convert", REPO, "out", *options).code == 0
    assert contents(Path("out")) == converted
    fetched = {each.path.split("/")[-1] for each in hub.requests("GET", "/cdn/*") if not each.range}
    assert fetched == {f"model-0000{number}-of-0000{SHARDS}.safetensors" for number in (3, 4)}


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_wrong_contents_are_found_by_their_sha256(hub, run, converted, options, source):
    """The first byte of the data is another one; the header is not."""
    name = shard_names(source)[1]
    whole = (source / name).read_bytes()
    wrong = whole[:-1] + bytes([whole[-1] ^ 1])
    repository = hub.repository(REPO)
    file = repository.files()[name]
    file.path.write_bytes(wrong)
    outcome = run("convert", REPO, "out", "--workers", 1, *options)
    message = refused(hub, outcome, "wrong-digest")
    assert file.sha256 in message
    assert not Path("out", name).exists()
    file.path.write_bytes(whole)
    if not options:  # the cache is the user's: he is told which file to remove
        path = Path(message.split("remove ")[1].split(" and run")[0])
        assert path.is_relative_to(os.environ["HF_HOME"])
        assert refused(hub, run("convert", REPO, "out"), "wrong-digest")
        path.unlink()
    assert run("convert", REPO, "out", *options).code == 0
    assert contents(Path("out")) == converted


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_a_carried_file_of_other_contents_is_found_by_its_sha256(hub, run, options):
    repository = hub.repository(REPO)
    repository.add({"assets/table.bin": bytes(1000)})
    stored = repository.files()["assets/table.bin"]
    whole = stored.path.read_bytes()
    stored.path.write_bytes(whole[:-1] + b"x")
    outcome = run("convert", REPO, "out", *options)
    message = refused(hub, outcome, "wrong-digest")
    assert outcome.error["file"] == "assets/table.bin"
    assert not Path("out", "assets/table.bin").exists()
    stored.path.write_bytes(whole)
    if not options:
        Path(message.split("remove ")[1].split(" and run")[0]).unlink()
    assert run("convert", REPO, "out", *options).code == 0
    assert Path("out", "assets/table.bin").read_bytes() == bytes(1000)


def test_a_header_that_is_not_the_file_s_is_found(hub, run, source):
    """Range requests are answered with another header than the file has."""
    name = shard_names(source)[1]
    stored = hub.repository(REPO).files()[name]
    whole = stored.path.read_bytes()
    convert(REPO, "before", verify="none")
    length = int.from_bytes(whole[:8], "little")
    other = whole[:8] + whole[8 : 8 + length].replace(b"_proj", b"_pr0j", 1) + whole[8 + length :]
    stored.path.write_bytes(other)
    outcome = run("convert", REPO, "out")
    assert outcome.code == 1
    assert outcome.error["code"] in ("changed", "missing-tensor", "contradiction")


def test_wrong_etags_do_not_mislead(hub, run, converted):
    hub.misbehave("*/resolve/*.safetensors", times=None, headers={"X-Linked-ETag": '"' + "0" * 64 + '"'})
    outcome = run("convert", REPO, "out")
    if outcome.code == 0:
        assert contents(Path("out")) == converted
    else:
        refused(hub, outcome, outcome.error["code"])
        assert outcome.error["code"] in ("wrong-digest", "truncated")


# --- what a hostile hub says ------------------------------------------------------------------------------


class Entry:
    """An entry of a listing."""

    def __init__(self, path, size=1, sha256=None, lfs_size=None):
        self.path, self.size = path, size
        if sha256 is not None:
            self.lfs = BlobLfsInfo(size=size if lfs_size is None else lfs_size, sha256=sha256, pointer_size=1)


@pytest.mark.parametrize(
    "entries",
    [
        [Entry("a"), Entry("a")],
        [Entry(7)],
        [Entry("a", -1)],
        [Entry("a", "1")],
        [Entry("a", True)],
        [Entry("a", 1 << 51)],
        [Entry("a", 1, "0" * 63)],
        [Entry("a", 1, "A" * 64)],
        [Entry("a", 1, "0" * 64, 2)],
        (Entry(str(number)) for number in range(100_002)),
    ],
    ids=["twice", "no text", "negative", "text", "boolean", "huge", "short digest", "capitals", "two sizes", "endless"],
)
def test_impossible_listings_are_refused(monkeypatch, entries):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", lambda *_, **__: entries)
    with pytest.raises(CheckpointError) as caught:
        open_hub(HubName(REPO))
    assert caught.value.problems[0].code == "hub-bad-answer"


def test_impossible_commits_are_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: type("Info", (), {"sha": "../../x"}))
    with pytest.raises(CheckpointError, match=r"its commit would be '\.\./\.\./x'"):
        open_hub(HubName(REPO))


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil", "a\\evil", "c:evil", "evil\x1b[2J"])
@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_names_that_lead_outside_are_never_fetched(hub, run, monkeypatch, name, options):
    from awq2marlin.hub import repository as module

    listed = module._checked_listing

    def with_evil(*arguments):
        return {**listed(*arguments), name: RemoteFile(3, None)}

    monkeypatch.setattr(module, "_checked_listing", with_evil)
    outcome = run("convert", REPO, "out", *options)
    if ".." in name:
        assert outcome.code == 0
        assert outcome.report["left_behind"][".." if name.startswith(".") else name] == "hidden"
    elif name in ("a\\evil", "c:evil"):
        assert outcome.code == 0
        assert outcome.report["left_behind"][name] == "its name means something else on other systems"
    else:
        assert outcome.error["code"] == "unsafe-name"
    assert not [each for each in hub.requests("*", "*/resolve/*") if "evil" in each.path]


# --- the disk, the cache, the token -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_a_disk_that_is_too_small_is_told_before_the_first_shard_comes(hub, run, monkeypatch, options, source):
    size = sum((source / name).stat().st_size for name in shard_names(source))
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + 1000))
    message = refused(hub, run("convert", REPO, "out", *options), "disk-full")
    assert re.search(r"needs \d+\.\d [kM]B, \d+\.\d [kM]B more than the disk has free", message), message
    assert all(each.range for each in hub.requests("GET", "/cdn/*"))
    assert not Path("out").exists()


def test_offline_it_works_from_the_cache_or_says_so(hub, run, converted, monkeypatch):
    convert(REPO, "online")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget_requests()
    for name in ("marlin_manifest.json", "README.md"):  # they name what was left behind, which the cache does not have
        del converted[name]
    for out, options in (("out", ()), ("out2", ("--low-disk",))):
        assert run("convert", REPO, out, *options).code == 0
        assert contents(Path(out)).items() >= converted.items()
    assert "HF_HUB_OFFLINE" in refused(hub, run("convert", "org/other"), "hub-offline")
    assert "HF_HUB_OFFLINE" in refused(hub, run("convert", f"{REPO}@v2"), "hub-offline")
    cached = next(Path(os.environ["HF_HOME"]).glob("hub/models--*/snapshots/*/model-00002*"))
    cached.unlink()
    assert refused(hub, run("convert", REPO, "out3"), "missing-file")
    assert hub.requests() == []


def test_the_token_is_in_no_output(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.misbehave("/cdn/*00002-of*", after=1, drop_after=100_000)
    outcome = run("convert", REPO, "out")
    assert outcome.code == 0
    texts = [outcome.out, outcome.err, *(data.decode("latin-1") for data in contents(Path("out")).values())]
    assert all(hub.token not in text for text in texts)
    hub.misbehave("*", status=400, message=f"bad token {hub.token}", times=None)
    refused(hub, run("convert", REPO, "out2"), "hub-refused")


# --- kill -9 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_killed_while_a_shard_is_fetched_the_same_command_fetches_only_what_is_missing(
    hub, converted, tmp_path, options
):
    out = tmp_path / "out"
    held = hub.misbehave("/cdn/*00003-of*", after=1, times=1, drop_after=50_000, bytes_per_second=20_000)
    process = start("convert", REPO, out, *options)
    stopped = stop_when(process, lambda: held.struck and len(finished_shards(out)) == 2, signal.SIGKILL)
    assert stopped.code == -9, stopped.err
    hub.behave()
    hub.forget_requests()
    outcome = run_process("convert", REPO, out, "--json", *options)
    check_rerun(outcome, out, converted)
    assert len(outcome.report["details"]["resumed"]) == 2
    fetched = sorted(each.path.split("/")[-1] for each in hub.requests("GET", "/cdn/*") if not each.range)
    assert fetched == [f"model-0000{number}-of-0000{SHARDS}.safetensors" for number in (3, 4)]
    assert not (out / WORK).exists()
