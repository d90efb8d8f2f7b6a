"""Checkpoints made once, and how their conversions look when nothing disturbs them."""

import os

import pytest

from awq2marlin import convert, revert

from .helpers import Stepped, contents, digests, make_source, run_here


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a checkpoint of two small shards, its conversion, and the way back."""
    folder = tmp_path_factory.mktemp("made")
    make_source(folder / "source")
    convert(folder / "source", folder / "marlin")
    revert(folder / "marlin", folder / "back")
    assert contents(folder / "back") == contents(folder / "source")
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A checkpoint of three shards of several pieces each, with its conversion."""
    folder = tmp_path_factory.mktemp("large")
    make_source(folder / "source", size_k=2048, size_n=4096, layers=2, shards=3)
    convert(folder / "source", folder / "marlin")
    return folder


@pytest.fixture
def source(made):
    """The small checkpoint, which must be the same after every test."""
    before = digests(made / "source")
    yield made / "source"
    assert digests(made / "source") == before


@pytest.fixture(scope="session")
def expected(made):
    """The files of the small checkpoint's conversion."""
    return contents(made / "marlin")


@pytest.fixture(scope="session")
def stepped(tmp_path_factory):
    """Runs commands that are disturbed at a chosen step."""
    runner = Stepped(tmp_path_factory.mktemp("stepped"))
    yield runner
    runner.close()


@pytest.fixture
def run(capsys):
    """Runs the command line in this process, with ``--json``."""

    def run_with_json(*arguments):
        return run_here(capsys, *arguments, "--json")

    return run_with_json


@pytest.fixture
def without_syncs(monkeypatch):
    """Many runs in a row need no disk: only a power failure loses what is not synced."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
