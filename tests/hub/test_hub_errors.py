"""What people read when the Hub refuses."""

import socket

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download

from awq2marlin import HubError
from awq2marlin.hub.errors import as_hub_errors, hub_url, without_token

pytestmark = pytest.mark.usefixtures("hub", "no_waiting")


@pytest.fixture(autouse=True)
def repositories(hub):
    hub.add_repository("org/open", {"config.json": b"{}\n", "a.safetensors": bytes(1000)})
    hub.add_repository("org/private", {"config.json": b"{}\n"}, private=True)
    hub.add_repository("org/gated", {"config.json": b"{}\n"}, gated=True)


def refusal(work, repo_id="org/open", revision=None):
    """Returns the one problem that ``work`` is refused with."""
    with pytest.raises(HubError) as refused, as_hub_errors(repo_id, revision):
        work()
    (problem,) = refused.value.problems
    return problem


def read(repo_id="org/open", revision=None):
    return refusal(lambda: HfApi().model_info(repo_id, revision=revision), repo_id, revision)


def write():
    operations = [CommitOperationAdd("b.safetensors", bytes(2000))]
    return refusal(lambda: HfApi().create_commit("org/open", operations, commit_message="b"))


def test_no_such_repository_and_no_such_revision():
    problem = read("org/nothing")
    assert (problem.file, problem.code) == ("org/nothing", "hub-not-found")
    assert "your token may not see it" in problem.message
    assert "hf auth login" in problem.message
    problem = read("org/open", "other")
    assert (problem.file, problem.code) == ("org/open@other", "hub-no-revision")


def test_private_and_gated_repositories(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    assert read("org/private").code == "hub-not-found"
    gated = refusal(lambda: hf_hub_download("org/gated", "config.json"), "org/gated")
    assert gated.code == "hub-gated"
    assert f"{hub.endpoint}/org/gated" in gated.message
    monkeypatch.delenv("HF_TOKEN")
    assert "a caller without a token may not see it" in read("org/private").message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    assert read().code == "hub-unauthorized"


def test_tokens_that_may_not_write(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    problem = write()
    assert problem.code == "hub-forbidden"
    assert f"{hub.endpoint}/settings/tokens" in problem.message
    assert "you don't have write access to org/open" in problem.message


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "hub-refused"),
        (402, "hub-quota"),
        (409, "hub-conflict"),
        (412, "hub-conflict"),
        (413, "hub-quota"),
        (418, "hub-refused"),
        (429, "hub-rate-limit"),
        (500, "hub-unavailable"),
        (503, "hub-unavailable"),
        (507, "hub-quota"),
    ],
)
def test_answers_by_their_status(hub, status, code):
    hub.misbehave(status=status, times=None, headers={"Retry-After": "77"}, message="a certain reason.")
    problem = read()
    assert problem.code == code
    assert "a certain reason" in problem.message
    assert ("wait 77 s" in problem.message) == (status == 429)


def test_an_upload_that_fails_is_told_by_its_first_cause(hub):
    hub.misbehave("/lfs/upload/*", status=403, times=None, message="no storage left")
    problem = write()
    assert problem.code == "hub-forbidden"
    assert "no storage left" in problem.message


def test_no_connection(hub, monkeypatch):
    hub.misbehave(drop_after=-1, times=None)
    assert read().code == "hub-unreachable"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        problem = read()
    assert problem.code == "hub-unreachable"
    assert "HTTPS_PROXY" in problem.message
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    assert "no-such-host.invalid" in read().message
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")  # no address
    assert "the connection to hub.example failed" in read().message


def test_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    problem = refusal(lambda: hf_hub_download("org/open", "a.safetensors"))
    assert problem.code == "hub-offline"


def test_a_name_that_is_none():
    assert read("a/b/c").code == "hub-bad-name"


def test_something_else_at_the_endpoint(hub):
    hub.misbehave("/api/models/*", status=200, times=None)  # whose body is not what belongs there
    problem = read()
    assert problem.code == "hub-failed"
    assert f"{hub.endpoint} is not a Hugging Face Hub" in problem.message


def test_a_short_body(hub):
    hub.misbehave("/cdn/*", short_by=10, times=None)
    problem = refusal(lambda: hf_hub_download("org/open", "a.safetensors"))
    assert problem.code == "hub-failed"
    assert "should be of size 1000 but has size 990" in problem.message


def test_errors_of_the_disk_and_our_own_pass(tmp_path):
    with pytest.raises(FileNotFoundError), as_hub_errors("org/open"):
        (tmp_path / "nothing").read_bytes()
    with pytest.raises(OSError, match="No space left"), as_hub_errors("org/open"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), as_hub_errors("org/open"):
        _ = 1 // 0


def test_a_token_is_never_repeated(hub, monkeypatch):
    hub.misbehave(status=403, times=None, message=f"the token {hub.token} is bad, so is hf_otherTOKEN123")
    problem = read()
    assert hub.token not in str(problem)
    assert "hf_otherTOKEN123" not in str(problem)
    assert "the token hf_*** is bad, so is hf_***" in str(problem)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    assert without_token("a-token-of-another-form!") == "hf_***!"
    monkeypatch.setattr(constants, "ENDPOINT", "https://me:secret@hub.example:8443/hub")
    assert hub_url() == "https://hub.example:8443"
    monkeypatch.setattr(constants, "ENDPOINT", "me:secret@hub.example")  # no address
    assert hub_url() == "hub.example"
