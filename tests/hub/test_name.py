"""What a user means by a source: links, names, the cache's folders, paths with a typo, and what is near."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from awq2marlin import CheckpointError, OutputError, PushTarget, convert, inspect, push, revert, verify
from awq2marlin.batch.jobs import plan_jobs
from awq2marlin.hub.name import HubName, parse_source
from awq2marlin.io.folder import Folder
from awq2marlin.pipeline.preflight import default_output

from ..faults.helpers import contents
from .conftest import REPO, SHARDS, shard_names

SHA = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.usefixtures("no_waiting", "repository")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "revision"),
    [
        ("https://huggingface.co/org/name", None),
        ("http://huggingface.co/org/name/", None),
        ("HTTPS://HuggingFace.co/org/name?library=vllm#readme", None),
        ("https://hf.co/org/name", None),
        ("huggingface.co/org/name", None),
        ("https://huggingface.co/org/name.git", None),
        ("hf.co/org/name/tree/v1", "v1"),
        ("https://www.huggingface.co/org/name/tree/main", "main"),
        ("https://huggingface.co/org/name/tree/v1.0", "v1.0"),
        ("https://huggingface.co/org/name/tree/a%2Fbranch", "a/branch"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", "refs/pr/3"),
        ("https://huggingface.co/org/name/tree/refs/pr/3", "refs/pr/3"),
        (f"https://huggingface.co/org/name/commit/{SHA}", SHA),
        (f"https://huggingface.co/org/name/blob/{SHA}/config.json", SHA),
        ("https://huggingface.co/org/name/resolve/main/a/b.safetensors?download=true", "main"),
        ("https://huggingface.co/org/name/raw/main/config.json", "main"),
        ("https://huggingface.co/org/name/discussions/7", None),
        ("https://me:hf_secret@huggingface.co/org/name", None),
        ("hf://org/name/", None),
    ],
)
def test_the_address_of_a_repository_is_that_repository(link, revision, empty):
    assert parse_source(link) == HubName("org/name", revision)
    (empty / "org").mkdir()  # an address means the Hub, whatever is here
    assert parse_source(link) == HubName("org/name", revision)


def test_the_endpoint_is_a_site_of_the_hub(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://me:secret@mirror.example:8443/hub")
    assert parse_source("https://mirror.example:8443/hub/org/name/tree/v1") == HubName("org/name", "v1")
    for link in ("https://mirror.example/hub/org/name", "https://mirror.example:8443/hubs/org/name"):
        with pytest.raises(CheckpointError, match="this address is not on the Hub"):
            parse_source(link)


def test_what_is_pushed_to_is_named_like_a_source():
    for named in ("org/name", "hf://org/name", "https://huggingface.co/org/name", "https://hf.co/org/name/tree/v1"):
        assert PushTarget(named, revision="v1") == PushTarget("org/name", revision="v1")
    for wrong, said in (
        ("https://huggingface.co/datasets/org/name", "this is the address of a data set"),
        ("https://example.com/org/name", "this address is not on the Hub"),
        ("https://huggingface.co/org/name/tree/v1", "names the branch v1; give it as"),
        ("hf://name", "write a Hub repository as"),
    ):
        with pytest.raises(ValueError, match=said):
            PushTarget(wrong)


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("https://huggingface.co/datasets/org/name", "the address of a data set, not of a model; write org/name"),
        ("https://huggingface.co/spaces/org/name/tree/main", "the address of a space"),
        ("hf://datasets/org/name", "the address of a data set"),
        ("hf://spaces/org/name", "the address of a space"),
        ("https://huggingface.co/collections/org/x", "the address of a collection"),
        ("https://huggingface.co/api/models/org/name", "the Hub's interface for programs"),
        ("https://huggingface.co/gpt2", "not the address of a model; write org/name or hf://org/name"),
        ("https://huggingface.co/", "not the address of a model"),
        ("https://huggingface.co/org/na%20me", "not the address of a model"),
        ("https://huggingface.co/org/name/tree/..%2f..%2fx", "not the address of a model"),
        ("https://huggingface.co/org/name/tree/main/sub/dir", "the folder sub/dir in org/name@main; only whole"),
        ("https://example.com/org/name", "this address is not on the Hub; download the checkpoint"),
        ("https://huggingface.co.example.com/org/name", "not on the Hub"),
        ("https://[::1/org/name", "not a valid address"),
        ("https://me:hf_secret@example.com/org/name", "not on the Hub"),
    ],
)
def test_other_addresses_are_refused_in_words(run, hub, link, said):
    outcome = run("inspect", link)
    assert (outcome.code, outcome.error["code"]) == (1, "hub-bad-name")
    assert said in outcome.error["message"]
    assert "secret" not in outcome.error["file"] + outcome.err
    assert hub.requests() == []


def test_a_link_of_the_endpoint_is_converted_and_named_like_the_repository(hub, run, repository, source):
    commit = repository.commit().oid
    outcome = run("convert", f"{hub.endpoint}/{REPO}/blob/{commit}/config.json")
    assert outcome.code == 0, outcome.err
    assert (outcome.report["source"], outcome.report["output"]) == (f"{REPO}@{commit}", "model-awq-marlin")
    local = convert(source, "local")
    for name in local.shards:
        assert Path("model-awq-marlin", name).read_bytes() == Path("local", name).read_bytes()


# --- a folder that is not there ---------------------------------------------------------------------------


def test_a_path_with_a_typo_is_not_sent_to_the_hub(run, hub, source, tmp_path):
    shutil.copytree(source, tmp_path / "models/llama-awq")
    for command in (["inspect", "models/lama-awq"], ["convert", "models/lama-awq"], ["verify", "models/lama-awq", "x"]):
        outcome = run(*command)
        assert (outcome.code, outcome.error["code"]) == (1, "not-found"), outcome.err
        message = outcome.error["message"]
        assert message == (
            "cannot open it as a checkpoint: no such file or folder; check the path (did you mean models/llama-awq?); "
            "it is read as a path because models is a folder here; for the Hub repository, pass hf://models/lama-awq"
        )
    assert hub.requests() == []
    batch = run("inspect", "models/nothing-like-it").error["message"]
    assert "did you mean" not in batch
    assert parse_source("hf://models/lama-awq") == HubName("models/lama-awq")


def test_a_file_is_told_from_a_folder_and_from_a_repository(run, source, tmp_path):
    shutil.copytree(source, tmp_path / "models/llama-awq")
    Path("models/llama.gguf").write_text("GGUF")
    needed = "this is a file; a checkpoint is a folder with config.json and .safetensors files; "
    for name, advice in (
        ("models/llama.gguf", "pass one"),
        ("models/llama-awq/config.json", "pass the folder models/llama-awq"),
    ):
        outcome = run("convert", name)
        assert (outcome.code, outcome.error["code"]) == (1, "not-a-folder")
        assert outcome.error["message"] == needed + advice
        assert "reading the folder" not in outcome.err


def test_every_error_of_a_bare_name_says_that_there_is_no_such_folder(run, hub, monkeypatch):
    told = "there is no such folder here, and "
    assert told in run("inspect", "org/nothing").error["message"]
    assert told in run("convert", "org/nothing").error["message"]
    assert told not in run("inspect", "hf://org/nothing").error["message"]
    assert told not in run("inspect", f"{hub.endpoint}/org/nothing").error["message"]
    assert told in run("inspect", f"{REPO}@nowhere").error["message"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert told in run("inspect", "org/nothing").error["message"]


def test_without_a_network_the_cache_is_offered_if_it_suffices(run, hub, monkeypatch):
    offer = "the cache has this repository: set HF_HUB_OFFLINE=1 to use that copy"
    assert run("inspect", REPO).code == 0  # brings the config, but no weights
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    outcome = run("inspect", REPO)
    assert outcome.error["code"] == "hub-unreachable"
    assert offer not in outcome.error["message"]
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    snapshot_download(REPO, endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    assert offer in run("convert", REPO, "out").error["message"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("convert", REPO, "out").code == 0


@pytest.mark.parametrize("command", [["inspect", ""], ["convert", ""], ["verify", "", "x"], ["revert", ""]])
def test_an_empty_name_is_refused(run, command):
    outcome = run(*command)
    assert (outcome.code, outcome.error["code"]) == (1, "not-found")
    assert outcome.error["message"].startswith("the checkpoint's name is empty")


def test_an_empty_output_is_refused(run, source, tmp_path):
    for function in (convert, revert):
        with pytest.raises(OutputError, match="the output folder's name is empty"):
            function(source, "")
    with pytest.raises(OutputError, match="the folder's name is empty"):
        push("", "org/name")
    for command in (["convert", source, ""], ["revert", source, ""], ["push", "", "org/name"]):
        outcome = run(*command)
        assert (outcome.code, outcome.error["code"]) == (2, "usage")
        assert "empty" in outcome.error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["iterdir", "resolve"])
def test_a_folder_without_permission_says_so(run, source, tmp_path, monkeypatch, broken):
    """As root, who runs this in a container, nothing is forbidden: so the system's answer is made."""
    folder = Path(shutil.copytree(source, tmp_path / "closed"))
    true = getattr(Path, broken)

    def denied(path, *arguments, **options):
        if path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return true(path, *arguments, **options)

    monkeypatch.setattr(Path, broken, denied)
    outcome = run("inspect", folder)
    assert (outcome.code, outcome.error["code"]) == (1, "no-permission")
    assert outcome.error["file"] == str(folder)
    assert "permission denied" in outcome.error["message"]


# --- the cache's folders ----------------------------------------------------------------------------------


@pytest.fixture
def cached(hub, tmp_path):
    """The cache's folder of the repository, with a snapshot."""
    return Path(snapshot_download(REPO, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)).parent.parent


def test_the_cache_s_folder_means_the_snapshot_of_its_main_branch(run, cached, repository, tmp_path):
    commit = repository.commit().oid
    for folder in (cached, cached / "snapshots", cached / "snapshots" / commit):
        assert inspect(folder).path == (cached / "snapshots" / commit).resolve()
        assert default_output(folder) == Path("model-awq-marlin")
    assert run("convert", cached).report["output"] == "model-awq-marlin"
    (tmp_path / "link").symlink_to(cached)
    assert default_output(Path("link")) == Path("link-marlin")
    assert inspect(tmp_path / "link").path == (cached / "snapshots" / commit).resolve()


@pytest.mark.parametrize("text", [None, "", "../../../x", SHA, "main", "\xff"])
def test_without_it_the_snapshots_are_named(cached, repository, text):
    ref = cached / "refs/main"
    ref.unlink()
    if text is not None:
        ref.write_text(text, "latin-1")
    with pytest.raises(CheckpointError) as caught:
        Folder.at(cached)
    (problem,) = caught.value.problems
    assert problem.code == "not-found"
    assert f"no snapshot of the default branch (refs/main); pass one of its snapshots: {repository.commit().oid}" in (
        problem.message
    )
    shutil.rmtree(cached / "snapshots" / repository.commit().oid)
    with pytest.raises(CheckpointError, match="it is empty"):
        Folder.at(cached)


# --- what is near ------------------------------------------------------------------------------------------


def test_a_folder_of_models_says_which_are_in_it(run, source, tmp_path, cached):
    for name in ("one", "other", ".hidden"):
        shutil.copytree(source, tmp_path / "models" / name)
    (tmp_path / "models/empty").mkdir()
    error = run("convert", "models").error
    names = ", ".join(str(tmp_path / "models" / name) for name in ("one", "other"))
    assert error["code"] == "no-config"
    assert (
        error["message"]
        == f"not found in {tmp_path / 'models'}; the checkpoints are one folder deeper; pass one of {names}"
    )
    shutil.rmtree(tmp_path / "models/one")
    assert run("inspect", "models").error["message"].endswith(f"deeper; pass {tmp_path / 'models/other'}")
    assert str(cached) in run("inspect", cached.parent).error["message"]  # the cache itself
    assert "pass a complete checkpoint folder" in run("inspect", "models/empty").error["message"]


def test_weights_one_folder_further_down_are_named(run, source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "weights").mkdir()
    for name in shard_names(source):
        (folder / name).rename(folder / "weights" / name)
    (folder / "model.safetensors.index.json").unlink()
    error = run("inspect", folder).error
    assert error["code"] == "no-weights"
    assert error["message"].endswith("there are some one folder deeper, in weights; move them beside config.json")
    shutil.copy(folder / "config.json", folder / "weights")
    assert run("inspect", folder).error["message"].endswith(f"one folder deeper; pass {folder / 'weights'}")


def test_a_repository_of_models_says_so(hub, run, source, tmp_path):
    shutil.copytree(source, tmp_path / "all/int4")
    hub.add_repository("org/all", tmp_path / "all")
    error = run("inspect", "org/all").error
    assert error["code"] == "no-config"
    assert error["message"].endswith(
        "one folder deeper; only whole repositories are read, so download it and pass int4"
    )


def test_a_file_of_a_checkpoint_names_its_folder(run, source, tmp_path):
    shutil.copytree(source, tmp_path / "models/llama")
    for name in ("config.json", shard_names(source)[0]):
        error = run("inspect", f"models/llama/{name}").error
        assert error["code"] == "not-a-folder"
        assert error["message"].endswith("; pass the folder models/llama")
    shutil.copy(source / "config.json", tmp_path)
    assert run("inspect", "config.json").error["message"].endswith("; pass the folder .")


def test_an_unfinished_output_says_how_far_it_is(run, hub, source):
    hub.misbehave("/cdn/*00003-of*", method="GET", status=500, times=None, after=1)
    assert run("convert", REPO, "out", "--workers", 1).code == 1
    told = f"unfinished: 2 of {SHARDS} shards; run the same convert again"
    for command in (
        ["inspect", "out"],
        ["verify", source, "out"],
        ["revert", "out"],
        ["convert", "out"],
        ["push", "out", REPO],
    ):
        error = run(*command).error
        assert (error["code"], error["message"]) == ("unfinished", told), command
    hub.behave()
    assert run("convert", REPO, "out").code == 0
    assert run("inspect", "out").code == 0


def test_an_unfinished_way_back_says_so_too(run, source, tmp_path):
    convert(source, "marlin")
    shard = tmp_path / "marlin" / shard_names(source)[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run("revert", "marlin", "back", "--workers", 1).code == 3
    assert (
        run("inspect", "back").error["message"]
        == f"unfinished: {SHARDS - 1} of {SHARDS} shards; run the same revert again"
    )


# --- names of outputs ---------------------------------------------------------------------------------------


def test_an_output_is_named_after_what_the_user_named(source, empty):
    (empty / "my-link").symlink_to(source)
    (empty / "dot").mkdir()
    names = {
        "my-link": "my-link",
        "my-link/": "my-link",
        "./my-link": "my-link",
        str(source): source.name,
        ".": empty.name,
    }
    assert {name: default_output(Path(name), "-ct") for name in names} == {
        name: Path(f"{expected}-ct") for name, expected in names.items()
    }
    result = convert("my-link")
    assert result.output == Path("my-link-marlin")
    assert result.source == source.resolve()
    assert revert("my-link-marlin").output == Path("my-link-marlin-reverted")
    assert contents(empty / "my-link-marlin-reverted") == contents(source)
    assert verify("my-link", "my-link-marlin").kind == "conversion"
    (job,) = plan_jobs(["my-link"], None, None, {})
    assert job.output == empty / "my-link-marlin"


def test_a_batch_plans_repositories_too(run, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([REPO]))
    outcome = run("batch", "list.json", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert outcome.report["details"]["items"][0]["status"] == "planned"
