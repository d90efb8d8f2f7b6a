"""A short run of the fuzzer on every target; ``python tests/fuzz.py`` runs it for as long as you like."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.hostile.fuzzing import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_random_files_are_read_or_refused(target: str) -> None:
    strategy, check = TARGETS[target]

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy())
    def run(drawn: object) -> None:
        check(drawn)

    run()
