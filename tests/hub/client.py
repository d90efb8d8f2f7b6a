"""Points the ``huggingface_hub`` client at a hub: of this process, and of those that it starts."""

import time
from types import SimpleNamespace

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import _http


def environment(hub, home):
    """Returns the variables that make the client use a hub, with its caches in ``home``."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def point_client_at(hub, home, monkeypatch):
    """Makes the client use a hub, here and in processes started from here, until the test ends."""
    for name, value in environment(hub, home).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    read_at_import = {  # the client read them when it was imported
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in read_at_import.items():
        monkeypatch.setattr(constants, name, value)
    huggingface_hub.close_session()


def let_client_not_wait(monkeypatch):
    """Makes the client's waits between two tries short; those that a server asks for, too."""
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr("huggingface_hub.file_download.time", clock)
