"""Object files as images: what the kernels' compiler writes becomes one; what refers to something outside does not."""

import platform
import struct
import sys

import pytest

from awq2marlin.layout.elf import NotAnImageError, image_of
from awq2marlin.layout.machine_code import _cache, _key, kernel

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="Images are of x86-64 Linux."
)


@pytest.fixture(scope="module")
def compiled():
    from awq2marlin.layout.cpu_kernels import compile_kernel

    return compile_kernel("gather_columns", position_independent=True)


def test_every_kernel_is_an_image_and_needs_no_linker():
    from awq2marlin.layout.cpu_kernels import KERNELS

    for name in KERNELS:
        kernel(name)
        content = _cache().get(_key(name))
        assert content is not None, name
        assert b'"entry"' in content.partition(b"\n")[0], f"{name} refers to something outside"


def test_only_distances_are_filled_in(compiled):
    image, entry = image_of(compiled.code, compiled.symbol)
    assert len(image) == len(compiled.code)
    assert 0 < entry < len(image)
    changed = [at for at, (old, new) in enumerate(zip(compiled.code, image, strict=True)) if old != new]
    assert changed
    assert len(changed) <= 4 * compiled.code.count(compiled.symbol.encode()) + 64


def test_what_is_no_object_file_of_this_machine_is_refused(compiled):
    code, symbol = compiled.code, compiled.symbol
    for damaged in (b"", b"\x7fELF", code[:200], b"MZ" + code[2:], code[:18] + struct.pack("<H", 183) + code[20:]):
        with pytest.raises(NotAnImageError):
            image_of(damaged, symbol)
    with pytest.raises(NotAnImageError, match="it has no other_name"):
        image_of(code, "other_name")


def sections_of(code):
    table, count = struct.unpack_from("<Q", code, 40)[0], struct.unpack_from("<H", code, 60)[0]
    return [struct.unpack_from("<IIQQQQIIQQ", code, table + 64 * index) for index in range(count)]


def test_references_outside_and_of_unknown_kinds_are_refused(compiled):
    symbols = next(section for section in sections_of(compiled.code) if section[1] == 2)
    outside = bytearray(compiled.code)
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        struct.pack_into("<H", outside, at + 6, 0)  # of no section: to be found elsewhere
    with pytest.raises(NotAnImageError, match="something outside"):
        image_of(bytes(outside), compiled.symbol)
    relocations = next(section for section in sections_of(compiled.code) if section[1] == 4)
    absolute = bytearray(compiled.code)
    struct.pack_into("<I", absolute, relocations[4] + 8, 1)  # R_X86_64_64
    with pytest.raises(NotAnImageError, match="of kind 1"):
        image_of(bytes(absolute), compiled.symbol)
