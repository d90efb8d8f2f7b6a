"""The real model goes to the hub and comes back."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from awq2marlin import convert, push, revert, verify


@pytest.fixture(autouse=True)
def gone_afterwards(hub, tmp_path):
    """114 MB each: pytest would keep three runs of them."""
    yield
    for path in (*tmp_path.rglob("*.safetensors"), *hub.objects.folder.iterdir()):
        path.unlink()


@pytest.fixture
def model(shared_dir):
    """The folder of the real model."""
    return shared_dir / "models" / "smollm2-135m-awq-g64"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("no_waiting")
def test_the_real_model_is_pushed_fetched_verified_and_reverted(hub, model, tmp_path):
    convert(model, tmp_path / "marlin")
    pushed = push(tmp_path / "marlin", "org/smollm2-marlin", private=True)
    assert {file.name for file in pushed.files if file.uploaded} == {file.name for file in pushed.files}
    parts = hub.requests("PUT", "/lfs/part/*")
    assert len(parts) == len(hub.requests("PUT")) == 8
    assert sum(each.received for each in parts) == (tmp_path / "marlin" / "model.safetensors").stat().st_size

    fetched = Path(snapshot_download("org/smollm2-marlin", local_dir=tmp_path / "fetched"))
    for file in pushed.files:
        assert sha256(fetched / file.name) == file.sha256, file.name
    assert len(verify(model, fetched).modules) == 90
    assert json.loads((fetched / "marlin_manifest.json").read_text())["source_card"]["name"] == "README.md"
    card = (fetched / "README.md").read_text("utf-8")
    assert "vllm serve org/smollm2-marlin\n" in card
    assert "| quantized layers | 210 |" in card
    assert card.endswith((model / "README.md").read_text("utf-8"))

    restored = revert(fetched, tmp_path / "back")
    assert {file.name: file.sha256 for file in restored.files} == {path.name: sha256(path) for path in model.iterdir()}
    assert push(fetched, "org/smollm2-marlin").commit is None, "what was fetched is what is there"
