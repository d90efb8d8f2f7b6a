"""Repositories in a batch: fetched once, asked for again only where something is left, recognised by their commit."""

from pathlib import Path

import pytest

from awq2marlin import BatchError, convert_many

from ..faults.helpers import contents
from .conftest import REPO
from .test_source import weights

pytestmark = pytest.mark.usefixtures("no_waiting", "repository", "run")


def test_repositories_and_folders_in_one_list(hub, run, repository, source):
    Path("list.jsonl").write_text(f'{{"source": "{REPO}", "output": "from-hub"}}\n"{source}"\n"org/not-there"\n')
    outcome = run("batch", "list.jsonl", "--out-dir", "out")
    assert outcome.code == 1
    (problem,) = outcome.report["errors"]
    assert (problem["code"], problem["file"]) == ("hub-not-found", "org/not-there")
    items = outcome.report["details"]["items"]
    assert [item["source"] for item in items] == [f"hf://{REPO}", str(source), "hf://org/not-there"]
    assert repository.commit().oid in Path("out/from-hub/marlin_manifest.json").read_text()
    hub.forget_requests()
    assert run("batch", "list.jsonl", "--out-dir", "out").code == 1
    assert hub.requests() == [], "what has ended is not asked for again"


def test_a_lost_record_is_made_up_for_by_the_commit_where_disk_is_scarce(hub, repository):
    entries = [{"source": f"hf://{REPO}", "low_disk": True}]
    assert convert_many(entries).exit_code == 0
    whole = contents(Path("model-awq-marlin"))
    hub.forget_requests()
    (item,) = convert_many(entries).items
    assert (item.status, item.earlier, item.verified) == ("done", False, 0)
    assert weights(hub) == []

    shard = next(Path("model-awq-marlin").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (item,) = convert_many(entries).items
    assert (item.status, item.errors[0].code) == ("failed", "not-empty")
    assert "the file differs from the one that was written" in item.errors[0].message
    (item,) = convert_many(entries, overwrite=True).items
    assert item.status == "done"
    assert contents(Path("model-awq-marlin")) == whole

    repository.add({"LICENSE": b"another\n"})
    (item,) = convert_many(entries).items
    assert (item.status, item.errors[0].code) == ("failed", "not-empty")


def test_a_lost_record_is_made_up_for_from_the_cache(hub):
    assert convert_many([REPO]).exit_code == 0
    hub.forget_requests()
    (item,) = convert_many([REPO]).items
    assert (item.status, item.verified) == ("done", 28)
    assert weights(hub) == []


def test_names_that_cannot_be_are_refused_before_anything_starts(hub):
    with pytest.raises(BatchError) as caught:
        convert_many(["hf://x", REPO, {"source": "a", "device": "cpu", "low_disk": True}])
    assert [problem.message.split(":")[0] for problem in caught.value.problems] == ["item 1", "item 3"]
    assert hub.requests() == []


def uploads(hub):
    return hub.requests("POST", "/*commit/*")


def test_results_go_to_repositories_named_as_the_outputs(hub, run, source):
    Path("list.jsonl").write_text(f'"{source}"\n{{"source": "hf://{REPO}", "output": "b", "push_to": "org/c"}}\n')
    command = ("batch", "list.jsonl", "--out-dir", "out", "--push-to", "ada")
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    items = outcome.report["details"]["items"]
    assert [item["pushed"].split("//")[1].partition("/")[2] for item in items] == ["ada/model-awq-marlin", "org/c"]
    for repo_id, output in (("ada/model-awq-marlin", "model-awq-marlin"), ("org/c", "b")):
        for name, data in contents(Path("out", output)).items():
            if name != "README.md":  # it says there how it is called there
                assert hub.repository(repo_id).file(name).read() == data
    hub.forget_requests()
    assert [item["earlier"] for item in run(*command).report["details"]["items"]] == [True, True]
    assert hub.requests() == []


def test_what_is_converted_already_is_only_sent(hub, source):
    assert convert_many([source], record="record").exit_code == 0
    before = {path: path.stat().st_ino for path in Path("model-awq-marlin").iterdir()}
    (item,) = convert_many([source], record="record", push_to="ada").items
    assert (item.status, item.earlier) == ("done", False)
    assert {path: path.stat().st_ino for path in Path("model-awq-marlin").iterdir()} == before
    assert hub.repository("ada/model-awq-marlin").file("config.json")
    assert convert_many([source], record="record").items[0].earlier, "less is asked"


def test_what_passes_through_is_known_by_record_or_repository(hub):
    entries = [{"source": f"hf://{REPO}", "low_disk": True}]
    (item,) = convert_many(entries, record="record", push_to="ada").items
    assert (item.status, item.manifest, Path("model-awq-marlin").exists()) == ("done", None, False)
    hub.forget_requests()
    assert convert_many(entries, record="record", push_to="ada").items[0].earlier
    assert hub.requests() == []
    (item,) = convert_many(entries, record="another", push_to="ada").items
    assert (item.status, item.earlier, item.pushed) == ("done", False, "hf://ada/model-awq-marlin")
    assert weights(hub) == []
    assert uploads(hub) == []
    (item,) = convert_many(entries, record="record").items
    assert (item.status, item.earlier, item.pushed) == ("done", False, None), "now it shall be here"
    assert Path("model-awq-marlin/config.json").is_file()
