"""What all tests share: the golden layers, the folder of real inputs, the loopback hub, hypothesis' settings."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from tests.skips import NO_REAL_MODEL, summary

TESTS = Path(__file__).resolve().parent

# The workers of a parallel run are told to be a terminal of 80 columns; output that is caught has no width.
os.environ.pop("COLUMNS", None)


def pytest_terminal_summary(terminalreporter):
    """Tells what was skipped: a line for each reason, not one for each place."""
    lines = [*summary(terminalreporter.stats.get("skipped", ()))]
    if lines:
        terminalreporter.section("skipped tests")
        for line in lines:
            terminalreporter.line(line)


# The first call of a compiled kernel takes a second or more: a deadline would fail it, and nothing else.
settings.register_profile("awq2marlin", deadline=None, print_blob=True)
settings.load_profile("awq2marlin")


@pytest.fixture(scope="session")
def shared_dir():
    """The folder of real inputs that may lie beside a checkout."""
    folder = TESTS.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip(NO_REAL_MODEL)
    return folder


@pytest.fixture(scope="session")
def golden():
    """Small layers computed with vLLM 0.25's own functions: every array by its name, ``CASE/ARRAY``."""
    with np.load(TESTS / "golden" / "marlin_layout.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A model hub on 127.0.0.1 that the client talks to, here and in processes started from here; see tests/hub."""
    import huggingface_hub

    from tests.hub.client import point_client_at
    from tests.hub.server import LoopbackHub

    with LoopbackHub(tmp_path_factory.mktemp("hub")) as running:
        point_client_at(running, tmp_path_factory.mktemp("hf_home"), monkeypatch)
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def no_waiting(monkeypatch):
    """The client waits no longer than 0.01 s between two tries."""
    from tests.hub.client import let_client_not_wait

    let_client_not_wait(monkeypatch)
