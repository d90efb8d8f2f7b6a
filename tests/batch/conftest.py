"""Twenty small checkpoints, three of them broken in different ways, and how the others look converted."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from awq2marlin import convert
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint

from ..faults.helpers import contents

MODELS = 20
BROKEN = {"model-03": "truncated", "model-08": "foreign-format", "model-15": "not-found"}


@dataclass
class Models:
    """Where the checkpoints lie.

    Attributes:
        folder: of all of them, in ``model-00`` to ``model-19``.
        expected: the files of each sound one's conversion.
    """

    folder: Path
    expected: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def sources(self) -> list[Path]:
        """Every source, the missing one too."""
        return [self.folder / f"model-{number:02}" for number in range(MODELS)]


def recipe(seed: int, shards: int = 2) -> Recipe:
    modules = {f"model.layers.0.mlp.{name}": (128, 64) for name in ("gate_proj", "up_proj", "down_proj")}
    return Recipe(modules, {"model.norm.weight": (128,)}, group_size=64, shards=shards, seed=seed)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Twenty models: one with a cut shard, one of another format, one that is not there."""
    made = Models(tmp_path_factory.mktemp("models"))
    outputs = tmp_path_factory.mktemp("expected")
    for number, source in enumerate(made.sources):
        write_checkpoint(source, recipe(number))
        if source.name not in BROKEN:
            convert(source, outputs / source.name)
            made.expected[source.name] = contents(outputs / source.name)
    shard = made.folder / "model-03" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    config = made.folder / "model-08" / "config.json"
    document = json.loads(config.read_text())
    document["quantization_config"]["quant_method"] = "fp8"
    config.write_text(json.dumps(document))
    shutil.rmtree(made.folder / "model-15")
    return made


@pytest.fixture
def listed(models, tmp_path, monkeypatch):
    """A list of the twenty models, in the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "models.txt"
    file.write_text("# twenty models\n\n" + "".join(f"{source}\n" for source in models.sources))
    return file
