"""Checkpoints that the tests fetch and push, made once; one of them as a repository of the loopback hub."""

import shutil

import pytest

from awq2marlin import convert
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint

from ..faults.helpers import run_here

SHARDS = 4
REPO = "org/model-awq"


def shard_names(folder):
    """Returns the names of a folder's shards, sorted."""
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A checkpoint of four shards of a few hundred kilobytes, with its licence."""
    folder = tmp_path_factory.mktemp("source") / "model-awq"
    write_checkpoint(folder, llama_recipe(256, 512, 4, 64, 512, group_size=64, shards=SHARDS))
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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with an AWQ checkpoint of three shards, its conversion, and those of another one of two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, shards, seed in (("one", 3, 0), ("other", 2, 1)):
        write_checkpoint(
            folder / f"{name}-awq", llama_recipe(192, 512, 1, 64, 256, group_size=64, shards=shards, seed=seed)
        )
        (folder / f"{name}-awq" / "code").mkdir()
        (folder / f"{name}-awq" / "code" / f"{name}.py").write_text("# code of the model\n")
        convert(folder / f"{name}-awq", folder / name)
    return folder


@pytest.fixture
def marlin(checkpoints, tmp_path):
    """A converted checkpoint, to be damaged at will."""
    return shutil.copytree(checkpoints / "one", tmp_path / "marlin")


@pytest.fixture
def other(checkpoints, tmp_path):
    """Another converted checkpoint, with fewer shards."""
    return shutil.copytree(checkpoints / "other", tmp_path / "other")
