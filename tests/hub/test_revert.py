"""`revert` takes a converted checkpoint from the Hub, as its model card says."""

import re
import shlex

import pytest

from awq2marlin import convert, revert

from ..faults.helpers import contents
from .conftest import REPO
from .test_low_disk import fetches

TARGET = "ada/model-marlin"
pytestmark = pytest.mark.usefixtures("no_waiting", "repository")


def hub_files(hub):
    """The files of the target, by name."""
    return {name: file.read() for name, file in hub.repository(TARGET).files("main").items()}


@pytest.fixture
def pushed(hub, tmp_path):
    """A conversion of the source, from the Hub to the Hub."""
    convert(REPO, tmp_path / "model-marlin", low_disk=True, push_to=TARGET)
    hub.forget_requests()
    return TARGET


def test_the_command_of_the_card_gives_the_source_back(hub, pushed, run, source, tmp_path):
    card = hub_files(hub)["README.md"].decode()
    (command,) = re.findall(r"^awq2marlin (revert .*)$", card, re.MULTILINE)
    outcome = run(*(word.replace("OUTPUT", "back") for word in shlex.split(command)))
    assert outcome.code == 0, outcome.err
    assert contents(tmp_path / "back") == contents(source)
    assert outcome.report["source"] == f"{pushed}@{hub.repository(TARGET).commit().oid}"


def test_a_revision_of_a_repository_is_taken_back_and_a_rerun_fetches_nothing_twice(hub, pushed, source, tmp_path):
    commit = hub.repository(TARGET).commit().oid
    hub.repository(TARGET).add({"config.json": b"{}"})
    hub.misbehave("/cdn/*00003-of*", method="GET", after=1, times=None, status=403)
    with pytest.raises(Exception, match="may not do this"):
        revert(f"hf://{pushed}@{commit}", tmp_path / "back")
    hub.behave()
    hub.forget_requests()
    restored = revert(f"{pushed}@{commit}", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert restored.source == f"{pushed}@{commit}"
    assert fetches(hub).keys() == {3, 4}, "what had come is in the cache"


def test_a_folder_of_that_name_is_taken(hub, run, tmp_path):
    (tmp_path / "ada").mkdir()
    convert(REPO, tmp_path / TARGET)
    hub.forget_requests()
    outcome = run("revert", TARGET, "back")
    assert outcome.code == 0, outcome.err
    assert not hub.requests()


def test_with_low_disk_no_more_than_two_shards_are_here_and_the_cache_gets_none(hub, pushed, source, tmp_path):
    fetched, cache = set(), tmp_path / "back" / ".awq2marlin" / "source"

    class Watch:
        def start(self, what, total):
            assert (what, total > 0) == ("fetch and revert", True)

        def advance(self, _count):
            here = {path.name for path in cache.glob("*.safetensors")}
            assert len(here) <= 2
            fetched.update(here)

        def finish(self):
            pass

        def note(self, text):
            raise AssertionError(text)

    revert(pushed, tmp_path / "back", low_disk=True, progress=Watch())
    assert contents(tmp_path / "back") == contents(source)
    assert len(fetched) > 2
    assert fetches(hub).keys() == {1, 2, 3, 4}
