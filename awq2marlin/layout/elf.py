"""Machine code that runs wherever it is put: object files whose references are all to themselves, resolved in place.

In an object file every section lies where its alignment wants it. So the file as a whole, put at the beginning of a
page, is an image of its code and constants, once the distances between them are filled in. Only what compilers of the
kernels write on 64-bit Linux is known: ELF for x86-64, distances of 32 bits.
"""

from __future__ import annotations

import struct

_MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
_RELOCATABLE, _X86_64 = 1, 62
_SYMBOLS, _WITH_ADDENDS = 2, 4
_ALLOCATED, _WRITABLE = 2, 1
#: Kinds of relocation that stand for the distance from the place to a symbol: R_X86_64_PC32 and R_X86_64_PLT32.
_DISTANCES = (2, 4)

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")


class NotAnImageError(ValueError):
    """The object file is of another kind, or refers to something that it does not hold."""


def image_of(code: bytes, name: str) -> tuple[bytes, int]:
    """Returns an object file with its references resolved, and where in it a function begins.

    Args:
        code: the object file.
        name: the function's.

    Raises:
        NotAnImageError: if that cannot be done.
    """
    try:
        return _Object(code).image(name)
    except (struct.error, IndexError) as error:
        raise NotAnImageError(str(error)) from None


class _Object:
    def __init__(self, code: bytes) -> None:
        header = _HEADER.unpack_from(code)
        if not code.startswith(_MAGIC) or header[1:3] != (_RELOCATABLE, _X86_64):
            raise NotAnImageError("it is not an object file for x86-64")
        self._code = bytearray(code)
        table, count = header[6], header[12]
        self._sections = [_SECTION.unpack_from(code, table + index * _SECTION.size) for index in range(count)]

    def image(self, name: str) -> tuple[bytes, int]:
        entry = None
        for section in self._sections:
            if section[1] == _SYMBOLS:
                for at in range(section[4], section[4] + section[5], _SYMBOL.size):
                    if self._name(section, at) == name.encode():
                        entry = self._place(at)
            elif section[1] == _WITH_ADDENDS and self._sections[section[7]][2] & _ALLOCATED:
                self._resolve(section)
        if entry is None:
            raise NotAnImageError(f"it has no {name}")
        return bytes(self._code), entry

    def _name(self, symbols: tuple[int, ...], at: int) -> bytes:
        begin = self._sections[symbols[6]][4] + _SYMBOL.unpack_from(self._code, at)[0]
        return bytes(self._code[begin : self._code.index(0, begin)])

    def _place(self, at: int) -> int:
        """Returns where in the file a symbol is."""
        section, value = _SYMBOL.unpack_from(self._code, at)[3:5]
        if not 0 < section < len(self._sections):
            raise NotAnImageError("it refers to something outside")
        flags, offset, alignment = (self._sections[section][index] for index in (2, 4, 8))
        if not flags & _ALLOCATED or flags & _WRITABLE or offset % max(1, alignment):
            raise NotAnImageError("it refers to a section that is not in its place")
        return int(offset + value)

    def _resolve(self, relocations: tuple[int, ...]) -> None:
        """Fills in the distances in one section."""
        symbols, offset = self._sections[relocations[6]], self._sections[relocations[7]][4]
        for at in range(relocations[4], relocations[4] + relocations[5], _RELOCATION.size):
            place, info, addend = _RELOCATION.unpack_from(self._code, at)
            if info & 0xFFFFFFFF not in _DISTANCES:
                raise NotAnImageError(f"a reference is of kind {info & 0xFFFFFFFF}")
            there = self._place(symbols[4] + (info >> 32) * _SYMBOL.size)
            struct.pack_into("<i", self._code, offset + place, there + addend - (offset + place))
