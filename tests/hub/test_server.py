"""The loopback hub, as the real client sees it."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 2000
FILES = {"config.json": b"{}\n", "model.safetensors": WEIGHTS, "sub/deep/a.txt": b"a", "sub/b.txt": b""}


pytestmark = pytest.mark.usefixtures("hub", "source", "no_waiting")


@pytest.fixture
def api():
    return HfApi()


@pytest.fixture
def source(hub):
    return hub.add_repository("org/source", FILES)


def test_the_client_is_pointed_at_the_hub(hub, api, tmp_path):
    assert api.endpoint == hub.endpoint
    assert get_token() == hub.token
    code = "from huggingface_hub import HfApi, get_token; print(HfApi().whoami()['name'], get_token())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [hub.user, hub.token]
    assert os.environ["HF_HUB_DISABLE_XET"] == "1"


def test_reading_a_repository(api, source):
    info = api.model_info("org/source", files_metadata=True)
    assert info.sha == source.commit().oid
    assert info.private is False
    sizes = {each.rfilename: each.size for each in info.siblings}
    assert sizes == {".gitattributes": sizes[".gitattributes"], **{name: len(data) for name, data in FILES.items()}}
    tree = {each.path: each for each in api.list_repo_tree("org/source", recursive=True)}
    assert set(tree) == {*FILES, ".gitattributes", "sub", "sub/deep"}
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert tree["model.safetensors"].size == len(WEIGHTS)
    assert tree["config.json"].blob_id == hashlib.sha1(b"blob 3\0{}\n").hexdigest()
    assert tree["config.json"].lfs is None
    assert {each.path for each in api.list_repo_tree("org/source")} == {
        ".gitattributes",
        "config.json",
        "model.safetensors",
        "sub",
    }
    assert [each.path for each in api.get_paths_info("org/source", ["sub/b.txt", "nothing"])] == ["sub/b.txt"]
    assert api.file_exists("org/source", "config.json")
    assert not api.file_exists("org/source", "other.json")
    assert api.list_repo_refs("org/source").branches[0].target_commit == info.sha


def test_listings_come_in_pages(hub, api):
    hub.page_size = 7
    hub.add_repository("org/many", {f"{number:03}.txt": b"%d" % number for number in range(40)})
    listed = [each.path for each in api.list_repo_tree("org/many")]
    assert listed == [".gitattributes", *(f"{number:03}.txt" for number in range(40))]
    assert len(hub.requests("GET", "/api/models/org/many/tree/main")) == 6


def test_downloads_pass_through_a_second_server_that_sees_no_token(hub, source, tmp_path):
    folder = snapshot_download("org/source", local_dir=tmp_path / "copy")
    for name, data in FILES.items():
        assert (tmp_path / "copy" / name).read_bytes() == data, folder
    (cdn,) = hub.requests("GET", "/cdn/*")
    assert cdn.host == "cdn"
    assert not cdn.authorized
    assert cdn.sent == len(WEIGHTS)
    assert all(each.authorized for each in hub.requests("HEAD", "*/resolve/*"))
    cached = hf_hub_download("org/source", "model.safetensors", revision=source.commit().oid)
    assert hashlib.sha256(WEIGHTS).hexdigest() in os.path.realpath(cached)
    hub.forget_requests()
    hf_hub_download("org/source", "model.safetensors", revision=source.commit().oid)
    assert hub.requests() == []


@pytest.mark.parametrize(("begin", "end"), [(0, 8), (8, 100), (511_990, 512_000)])
def test_ranges(hub, begin, end):
    headers = {"Range": f"bytes={begin}-{end - 1}"}
    url = hf_hub_url("org/source", "model.safetensors")
    answer = get_session().get(url, headers=headers, follow_redirects=True)
    assert (answer.status_code, answer.content) == (206, WEIGHTS[begin:end])
    assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/{len(WEIGHTS)}"
    assert hub.requests("GET", "/cdn/*")[-1].sent == end - begin


def test_a_range_beyond_the_end():
    headers = {"Range": f"bytes={len(WEIGHTS)}-"}
    answer = get_session().get(hf_hub_url("org/source", "model.safetensors"), headers=headers, follow_redirects=True)
    assert answer.status_code == 416
    answer = get_session().get(hf_hub_url("org/source", "config.json"), headers={"Range": "bytes=-2"})
    assert (answer.status_code, answer.content) == (206, b"}\n")


def test_revisions(api, source):
    first = source.commit().oid
    second = source.add({"config.json": b"[]\n"}, "second").oid
    api.create_branch("org/source", branch="old", revision=first)
    api.create_tag("org/source", tag="v1", revision=first)
    for revision, oid in (("main", second), ("old", first), ("v1", first), (second, second)):
        assert api.model_info("org/source", revision=revision).sha == oid
    assert Path(hf_hub_download("org/source", "config.json", revision="v1")).read_text() == "{}\n"
    assert [each.title for each in api.list_repo_commits("org/source")] == ["second", "add files"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/source", revision="nothing")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("org/source", branch="old")
    api.delete_branch("org/source", branch="old")
    assert [each.name for each in api.list_repo_refs("org/source").branches] == ["main"]


def test_who_may_read_what(hub, api, tmp_path):
    hub.add_repository("org/private", FILES, private=True)
    gated = hub.add_repository("org/gated", FILES, gated=True)
    assert api.model_info("org/private").private
    for token, private, is_gated in ((hub.stranger_token, 404, 403), (False, 401, 401)):
        with pytest.raises(RepositoryNotFoundError) as missing:
            api.model_info("org/private", token=token)
        assert missing.value.response.status_code == private
        assert api.model_info("org/gated", token=token).gated == "auto"
        with pytest.raises(GatedRepoError) as closed:
            api.hf_hub_download("org/gated", "config.json", token=token, local_dir=tmp_path)
        assert closed.value.response.status_code == is_gated
    gated.granted.add("eve")
    api.hf_hub_download("org/gated", "config.json", token=hub.stranger_token, local_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/nothing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/gated", "nothing.json")


def test_a_moved_repository_is_found_under_its_old_name(hub, api, tmp_path):
    hub.moved["org/before"] = "org/source"
    assert api.model_info("org/before").id == "org/source"
    path = hf_hub_download("org/before", "config.json", local_dir=tmp_path)
    assert Path(path).read_text() == "{}\n"


@pytest.mark.parametrize("multipart_from", [1, 1 << 40], ids=["in parts", "at once"])
def test_uploading_a_folder(hub, api, tmp_path, multipart_from):
    hub.multipart_from, hub.part_size = multipart_from, 100_000
    files = {**FILES, "model.safetensors": WEIGHTS[::-1]}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    api.create_repo("org/target", private=True)
    api.upload_folder(repo_id="org/target", folder_path=tmp_path, commit_message="all", commit_description="of it")
    target = hub.repository("org/target")
    assert target.private
    assert {name: file.read() for name, file in target.files().items() if name in files} == files
    assert target.files()["model.safetensors"].is_lfs
    (commit,) = target.history()
    assert (commit.title, commit.description, sorted(commit.added)) == ("all", "of it", sorted(FILES))
    uploads = hub.requests("PUT", "/lfs/*")
    assert [each.received for each in uploads] == ([100_000] * 5 + [12_000] if multipart_from == 1 else [512_000])
    assert not any(each.authorized for each in uploads)
    hub.forget_requests()
    api.upload_folder(repo_id="org/target", folder_path=tmp_path, commit_message="again")
    assert hub.requests("PUT") == []
    assert target.history() == [commit]


def test_commits_add_change_and_delete(api, source):
    head = source.commit().oid
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("sub/", is_folder=True),
    ]
    info = api.create_commit("org/source", operations, commit_message="change", parent_commit=head)
    assert info.oid == source.commit().oid
    assert set(source.files()) == {".gitattributes", "model.safetensors", "new.txt"}
    assert set(source.history()[-1].deleted) == {"config.json", "sub/b.txt", "sub/deep/a.txt"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/source", [CommitOperationAdd("b", b"b")], commit_message="late", parent_commit=head)
    with pytest.raises(EntryNotFoundError):
        api.create_commit("org/source", [CommitOperationDelete("nothing")], commit_message="none")


def test_pull_requests_leave_main_alone(hub, api, source):
    head = source.commit().oid
    info = api.create_commit(
        "org/source",
        [CommitOperationAdd("big.safetensors", WEIGHTS[::-1])],
        commit_message="propose",
        create_pr=True,
        token=hub.stranger_token,
    )
    assert info.pr_num == 1
    assert source.commit().oid == head
    assert source.commit("refs/pr/1").files["big.safetensors"].read() == WEIGHTS[::-1]
    assert api.list_repo_refs("org/source", include_pull_requests=True).pull_requests[0].ref == "refs/pr/1"


def test_who_may_write(hub, api):
    operation = [CommitOperationAdd("a.txt", b"a")]
    for token in (hub.read_token, hub.stranger_token, False):
        with pytest.raises(HfHubHTTPError) as refused:
            api.create_commit("org/source", operation, commit_message="no", token=token)
        assert refused.value.response.status_code == (401 if token is False else 403)
        with pytest.raises(HfHubHTTPError):
            api.create_repo("org/other", token=token)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/source")
    api.create_repo("org/source", exist_ok=True)
    api.create_repo("mine")
    assert hub.repositories() == ["org/source", "ada/mine"]
    api.delete_repo("ada/mine")
    assert hub.repositories() == ["org/source"]


def test_a_card_with_bad_metadata_is_refused(api):
    for text in (b"---\n a: [\n---\n", b"---\ntags: {a: 1}\n---\n", b"---\n- a\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README"):
            api.create_commit("org/source", [CommitOperationAdd("README.md", text)], commit_message="card")
    with pytest.warns(UserWarning, match="empty or missing"):
        api.create_commit("org/source", [CommitOperationAdd("README.md", b"# x\n")], commit_message="card")


# --- misbehaviour ---------------------------------------------------------------------------------------------


def download(tmp_path):
    return Path(hf_hub_download("org/source", "model.safetensors", local_dir=tmp_path)).read_bytes()


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_answers_of_failure_pass(hub, api, status):
    fault = hub.misbehave("*/tree/*", status=status, times=2, headers={"Retry-After": "1"})
    assert len(list(api.list_repo_tree("org/source"))) == 4
    assert fault.struck == 2
    assert [each.status for each in hub.requests("GET", "*/tree/*")] == [status, status, 200]


def test_answers_of_failure_stay(hub, api):
    hub.misbehave("*/tree/*", status=500, times=None)
    with pytest.raises(HfHubHTTPError, match="500"):
        list(api.list_repo_tree("org/source"))
    hub.behave()
    assert list(api.list_repo_tree("org/source"))


def test_some_requests_pass_before_it_goes_wrong(hub, api):
    hub.misbehave("/api/models/*", status=403, after=2, times=1)
    statuses = []
    for _ in range(4):
        try:
            api.model_info("org/source")
            statuses.append(200)
        except HfHubHTTPError as error:
            statuses.append(error.response.status_code)
    assert statuses == [200, 200, 403, 200]


def test_a_download_that_is_dropped_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # the client keeps whole pieces of so many bytes
    hub.misbehave("/cdn/*", drop_after=200_000)
    assert download(tmp_path) == WEIGHTS
    first, second = hub.requests("GET", "/cdn/*")
    assert first.sent == 200_000
    assert second.range == "bytes=200000-"
    assert (second.status, second.sent) == (206, len(WEIGHTS) - 200_000)


def test_a_short_body_is_noticed(hub, tmp_path):
    hub.misbehave("/cdn/*", short_by=5, times=None)
    with pytest.raises(OSError, match="Consistency check failed"):
        download(tmp_path)


def test_a_body_can_be_corrupt(hub, tmp_path):
    hub.misbehave("/cdn/*", corrupt=True)
    assert download(tmp_path) == bytes([WEIGHTS[0] ^ 0xFF]) + WEIGHTS[1:]


def test_an_etag_can_be_wrong(hub):
    hub.misbehave("*/resolve/*", method="HEAD", headers={"X-Linked-ETag": '"wrong"', "ETag": '"wrong"'})
    assert os.path.realpath(hf_hub_download("org/source", "model.safetensors")).endswith("/blobs/wrong")


def test_a_dropped_request_gets_no_answer(hub, api):
    hub.misbehave("/api/models/org/source", drop_after=-1)
    with pytest.raises(Exception, match="disconnected without sending a response"):
        api.model_info("org/source")
    assert hub.requests("GET", "/api/models/org/source")[0].status == 0
    assert api.model_info("org/source").id == "org/source"


def test_an_upload_that_is_dropped_comes_again(hub, api, source):
    fault = hub.misbehave("/lfs/upload/*", drop_after=100_000)
    api.create_commit("org/source", [CommitOperationAdd("b.safetensors", WEIGHTS[::-1])], commit_message="b")
    assert fault.struck == 1
    assert source.files()["b.safetensors"].read() == WEIGHTS[::-1]
    assert not list(hub.objects.folder.glob("*.upload"))


def test_an_answer_can_be_lost_after_the_commit_was_made(hub, api, source):
    hub.misbehave("*/commit/main", drop_after=-1)
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit("org/source", [CommitOperationAdd("a.txt", b"a")], commit_message="lost")
    assert source.history()[-1].title == "lost"


def test_a_commit_of_what_was_not_uploaded_is_refused(hub, api):
    operation = CommitOperationAdd("b.safetensors", WEIGHTS[::-1])
    api.preupload_lfs_files("org/source", [operation])
    hub.objects.path(hashlib.sha256(WEIGHTS[::-1]).hexdigest()).unlink()
    with pytest.raises(BadRequestError, match="was not uploaded"):
        api.create_commit("org/source", [operation], commit_message="b")


def test_a_slow_link_is_shared(hub, source, tmp_path):
    hub.misbehave("/cdn/*", bytes_per_second=2_000_000, times=None)
    source.add({"other.safetensors": WEIGHTS[::-1]})
    begun = time.monotonic()
    snapshot_download("org/source", local_dir=tmp_path, max_workers=2)
    taken = time.monotonic() - begun
    assert taken >= 2 * len(WEIGHTS) / 2_000_000
    hub.wait_until_idle()
    one, other = hub.requests("GET", "/cdn/*")
    assert one.begun < other.ended
    assert other.begun < one.ended
    assert one.ended - one.begun > 0.25


def test_a_request_can_be_held(hub, api):
    hold = threading.Event()
    hub.misbehave("/api/models/org/source", hold=hold)
    thread = threading.Thread(target=api.model_info, args=("org/source",))
    thread.start()
    while not hub.requests("GET", "/api/models/org/source"):
        time.sleep(0.001)
    assert hub.requests("GET", "/api/models/org/source")[0].ended is None
    hold.set()
    thread.join()
    hub.wait_until_idle()
    assert hub.requests("GET", "/api/models/org/source")[0].status == 200
