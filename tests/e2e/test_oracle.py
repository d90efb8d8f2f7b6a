"""The oracle itself is held to the golden layers, which another implementation computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e import oracle


def all_cases() -> list[str]:
    path = Path(__file__).parents[1] / "golden" / "marlin_layout.npz"
    with np.load(path) as arrays:
        return sorted({name.partition("/")[0] for name in arrays.files})


@pytest.mark.parametrize("case", all_cases())
def test_the_oracle_gives_the_golden_tensors(case: str, golden: dict[str, np.ndarray]) -> None:
    bits, group = int(case[1]), int(case.split("_g")[1].split("_")[0])
    found = {name.partition("/")[2]: array for name, array in golden.items() if name.startswith(f"{case}/")}
    size_k, size_n = found["q"].shape
    np.testing.assert_array_equal(oracle.unpack_awq(found["awq_qweight"].tobytes(), size_k, bits), found["q"])
    for part in ("qweight", "qzeros", "scales"):
        if f"awq_{part}" not in found:
            continue
        source, target = found[f"awq_{part}"], found[f"marlin_{part}"]
        entry = oracle.Entry("", source.shape, 0, source.nbytes, source.tobytes())
        made = oracle.marlin_part(part, entry, (size_k, size_n), (size_k, size_n), bits, group)
        assert made.shape == target.shape
        assert made.data == target.tobytes(), f"{case}: {part}"
