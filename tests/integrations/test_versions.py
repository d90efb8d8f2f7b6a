"""The versions that continuous integration tests are those that the loaders say they were tried with."""

import re
from pathlib import Path

import pytest

from awq2marlin.integrations.serving.needs import numbers
from awq2marlin.integrations.sglang.needs import TRIED as SGLANG_TRIED
from awq2marlin.integrations.vllm.needs import TRIED as VLLM_TRIED

ROOT = Path(__file__).resolve().parents[2]


def listed(engine: str, count: int) -> list[tuple[int, ...] | None]:
    """Returns the first numbers of each version of an engine in ``.ci/tried``."""
    found = re.search(rf"^{engine}=\((.+)\)$", (ROOT / ".ci" / "tried").read_text("utf-8"), re.MULTILINE)
    assert found
    return [numbers(version, count) for version in found[1].split()]


def test_serving_engines_are_tested_on_what_was_tried() -> None:
    assert listed("vllm", 2) == list(VLLM_TRIED)
    assert listed("sglang", 3) == list(SGLANG_TRIED)


def test_transformers_is_tested_on_the_oldest_and_the_newest_that_was_tried() -> None:
    pytest.importorskip("transformers")
    from awq2marlin.integrations.transformers.versions import FIRST_TRIED, LAST_TRIED

    assert listed("transformers", 2) == [FIRST_TRIED, LAST_TRIED]


@pytest.mark.parametrize(("engine", "count"), [("vllm", 2), ("sglang", 3), ("transformers", 2)])
def test_the_table_of_versions_names_what_is_tested(engine: str, count: int) -> None:
    text = (ROOT / "docs" / f"{engine}.md").read_text("utf-8").partition("\n## Versions\n")[2]
    rows = re.findall(r"^\| ([\d.]+) \| \1[\d.]*, \d{4}-\d{2}-\d{2} \|", text, re.MULTILINE)
    assert {numbers(row, count) for row in rows} >= set(listed(engine, count))
