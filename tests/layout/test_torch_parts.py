"""Parts of modules between AWQ and Marlin layout, as torch functions."""

import pytest
import torch

from awq2marlin.layout import torch_parts
from awq2marlin.layout.torch_functions import awq_marlin_repack


@pytest.mark.parametrize("bits", [4, 8])
def test_repacking_in_bands_gives_the_same_words(monkeypatch, bits):
    """Seven rows of tiles, two at once: the last band is not full."""
    monkeypatch.setattr(torch_parts, "_CODES_AT_ONCE", 2 * 16 * 128)
    codes = torch.randint(-(2**31), 2**31, (112, 128 * bits // 32), dtype=torch.int32)
    made = torch_parts.repack_in_bands(codes, 112, 128, bits)
    assert torch.equal(made, awq_marlin_repack(codes, 112, 128, bits))
