"""A checkpoint of several shards as a repository of the loopback hub."""

from dataclasses import replace

import pytest

from awq2marlin.synthetic import llama_recipe, write_checkpoint

from ..faults.helpers import run_here

SHARDS = 4
REPO = "org/model-awq"


def shard_names(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A checkpoint of four shards of a few hundred kilobytes, with its licence."""
    folder = tmp_path_factory.mktemp("source") / "model-awq"
    write_checkpoint(folder, replace(llama_recipe(256, 512, 4, 64, 512, group_size=64), shards=SHARDS))
    (folder / "LICENSE").write_text("a licence\n")
    return folder


@pytest.fixture
def repository(hub, source):
    """The same as a repository of the loopback hub."""
    return hub.add_repository(REPO, source)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command line in an empty folder, with ``--json``."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_here(capsys, *arguments, "--json")
