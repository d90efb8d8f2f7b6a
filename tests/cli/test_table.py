"""Tables keep to a width without breaking a word."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq2marlin.cli.table import table_lines

HEADERS = ("module", "K", "N", "size", "aligned")
ROWS = [
    ("model.layers.*.self_attn.q_proj", "4096", "14336", "238.5 kB", "yes"),
    ("model.language_model.layers.*.mlp.experts.*.down_proj", "14336", "64", "7.1 GB", "no (2)"),
    ("lm_head", "64", "151936", "1.0 MB", "no (1)"),
]
NUMBERS = {"K", "N", "size"}


def test_a_table_at_its_natural_width() -> None:
    assert [*table_lines(HEADERS, ROWS[:1], numbers=NUMBERS)] == [
        "module                              K      N      size  aligned",
        "-------------------------------  ----  -----  --------  -------",
        "model.layers.*.self_attn.q_proj  4096  14336  238.5 kB  yes",
    ]


def test_a_long_name_goes_on_below_at_a_dot() -> None:
    assert [*table_lines(HEADERS, ROWS[:1], numbers=NUMBERS, width=60)] == [
        "module                        K      N      size  aligned",
        "-------------------------  ----  -----  --------  -------",
        "model.layers.*.self_attn.  4096  14336  238.5 kB  yes",
        "q_proj",
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 160, None])
def test_no_part_of_a_name_and_no_number_is_broken(width: int | None) -> None:
    lines = [*table_lines(HEADERS, ROWS, numbers=NUMBERS, width=width)]
    assert max(map(len, lines)) <= (width or 1000)
    words = {*" ".join(lines).split()}
    pieces = {piece for row in ROWS for cell in row for piece in re.split(r"(?<=\.)(?=\D)|(?<=\*\.)| ", cell)}
    assert [piece for piece in pieces if not any(piece in word for word in words)] == []


CELL = st.text("ab.0 /界", max_size=30).map(lambda text: " ".join(text.split()))


@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=5), st.integers(1, 90))
def test_nothing_is_lost_and_columns_do_not_touch(rows: list[tuple[str, str, str]], width: int) -> None:
    lines = [*table_lines(("a", "b", "c"), rows, numbers={"b"}, width=width)]
    for at in range(3):
        told = "".join(row[at] for row in rows).replace(" ", "")
        assert [char for char in told if char not in "".join(lines)] == []
    rule = lines[1]
    assert [len(part) > 0 for part in rule.split("  ")] == [True] * 3
    assert sum(line.count("界") for line in lines) == sum(cell.count("界") for row in rows for cell in row)


@given(st.lists(st.tuples(CELL), min_size=1, max_size=5), st.integers(1, 90), st.integers(0, 40))
def test_more_room_takes_no_more_lines(rows: list[tuple[str]], width: int, more: int) -> None:
    counts = [len([*table_lines(("a",), rows, width=each)]) for each in (width, width + more)]
    assert all(wide <= narrow for narrow, wide in pairwise(counts))


def test_a_size_is_never_parted_from_its_unit() -> None:
    row = ("model.layers.*.self_attn.k_proj", "14336", "1024", "awq", "32", "238.5 kB", "no (2)")
    headers = ("module", "K", "N", "layout", "modules", "size", "aligned")
    lines = [*table_lines(headers, [row], numbers=("K", "N", "modules", "size"), width=60)]
    assert sum("238.5 kB" in line for line in lines) == 1
    assert max(map(len, lines)) <= 60
    assert list(table_lines(("counts",), [("1,234 of 5,678 B tensors",)], width=8))[2:] == [
        "1,234 of",
        "5,678 B",
        "tensors",
    ]
