"""Checkpoints that the tests push, made once."""

import shutil

import pytest

from awq2marlin import convert
from awq2marlin.synthetic import llama_recipe, write_checkpoint


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
