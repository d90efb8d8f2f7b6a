"""Skips tests of formats that the package does not know yet, and makes them live the day it does."""

import pytest

from awq2marlin import CheckpointError
from awq2marlin.formats import registry
from tests.formats import peers


def require_target(name):
    """Skips the test where a format cannot be written yet."""
    try:
        registry.target_named(name)
    except ValueError:
        pytest.skip(f"This version does not write {name} yet.")


def require_source(folder):
    """Skips the test where the format of a checkpoint cannot be read yet."""
    config = peers.read_config(folder)["quantization_config"]
    try:
        registry.recognise(config, "config.json")
    except CheckpointError:
        pytest.skip(f"This version does not read {config['quant_method']} yet.")
