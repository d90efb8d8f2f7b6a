"""The CPU repack: AWQ words to Marlin words and back, and to plain weights, compiled by Numba, on flat arrays.

The map is stated in docs/marlin-native.md and pictured in kernels/README.md. What makes it fast: for 4
bits the eight values that a lane and block own are the nibbles of eight source words, and a Marlin word
is one column of that 8x8 nibble matrix, so the repack is a transpose in three rounds of mask, shift and
swap (Hacker's Delight, 2nd ed., section 7-3, "Transposing a bit matrix", on nibbles). For 8 bits it is a
4x4 byte matrix and two rounds. Sixteen matrices (4 row pairs x 4 blocks) go side by side through the
rounds, which the compiler turns into vector instructions.

This module is Numba's side: it is imported only where `machine_code` finds nothing compiled yet. The kernels
take plain pointers and allocate nothing, so that their machine code stands alone; the names of their
arguments are the same throughout.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding
from numba import cfunc, float64, njit, types, uint32, uint64


@njit(inline="always")
def _exchange(low: Any, high: Any, shift: Any, mask: Any) -> Any:
    """Swaps the fields of ``low`` above ``shift`` with those of ``high`` below it, where ``mask`` is set."""
    change = ((low >> shift) ^ high) & mask
    return low ^ (change << shift), high ^ change


@njit(inline="always")
def _transpose_nibbles(w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any) -> Any:
    """Transposes the 8x8 nibble matrix whose row i is ``wi``; its own inverse."""
    mask, shift = uint32(0x0F0F0F0F), uint32(4)
    w0, w1 = _exchange(w0, w1, shift, mask)
    w2, w3 = _exchange(w2, w3, shift, mask)
    w4, w5 = _exchange(w4, w5, shift, mask)
    w6, w7 = _exchange(w6, w7, shift, mask)
    mask, shift = uint32(0x00FF00FF), uint32(8)
    w0, w2 = _exchange(w0, w2, shift, mask)
    w1, w3 = _exchange(w1, w3, shift, mask)
    w4, w6 = _exchange(w4, w6, shift, mask)
    w5, w7 = _exchange(w5, w7, shift, mask)
    mask, shift = uint32(0x0000FFFF), uint32(16)
    w0, w4 = _exchange(w0, w4, shift, mask)
    w1, w5 = _exchange(w1, w5, shift, mask)
    w2, w6 = _exchange(w2, w6, shift, mask)
    w3, w7 = _exchange(w3, w7, shift, mask)
    return w0, w1, w2, w3, w4, w5, w6, w7


@njit(inline="always")
def _transpose_bytes(w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """Transposes the 4x4 byte matrix whose row i is ``wi``; its own inverse."""
    mask, shift = uint32(0x00FF00FF), uint32(8)
    w0, w1 = _exchange(w0, w1, shift, mask)
    w2, w3 = _exchange(w2, w3, shift, mask)
    mask, shift = uint32(0x0000FFFF), uint32(16)
    w0, w2 = _exchange(w0, w2, shift, mask)
    w1, w3 = _exchange(w1, w3, shift, mask)
    return w0, w1, w2, w3


# In a tile, row r belongs to row pair p = (r % 8) // 2 and is value v = r % 2 + 2 * (r // 8) of its lane;
# columns 8..15 of a block are values v + 4. Matrix row i is value MARLIN_INTERLEAVE[i], so value v is row
# v // 2 + 4 * (v % 2) for v < 4, and the same plus 2 for v + 4. Matrix column i of the transpose is
# column AWQ_PACK_ORDER[i] of the block: 0 2 4 6 1 3 5 7. Sixteen matrices, index 4 p + block, stand side
# by side in ``staged``: word i of matrix x is staged[16 i + x]; so a column's sixteen words are contiguous.


def repack_qweight_4bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Repacks rows of tiles from AWQ to Marlin, 4 bits.

    Args:
        source: uint32 [16 * tile_rows * row_words], AWQ words, row by row.
        target: uint32, same length, Marlin words; written.
        staged: uint32 [128], scratch.
        tile_rows: how many rows of tiles.
        row_words: words in a row, N / 8, a multiple of 8.
    """
    words = uint64(row_words)
    tiles = words // uint64(8)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        for r in range(16):
            at = (uint64(16) * tile_row + uint64(r)) * words + uint64(8) * tile_column
            to = uint64(16 * ((r >> 3) + 4 * (r & 1)) + 4 * ((r & 7) >> 1))
            for block in range(uint64(4)):
                staged[to + block] = source[at + uint64(2) * block]
                staged[to + uint64(32) + block] = source[at + uint64(2) * block + uint64(1)]
        at = uint64(128) * tile
        for x in range(uint64(16)):
            c0, c2, c4, c6, c1, c3, c5, c7 = _transpose_nibbles(
                staged[x], staged[16 + x], staged[32 + x], staged[48 + x],
                staged[64 + x], staged[80 + x], staged[96 + x], staged[112 + x],
            )  # fmt: skip
            target[at + x] = c0
            target[at + x + uint64(16)] = c1
            target[at + x + uint64(32)] = c2
            target[at + x + uint64(48)] = c3
            target[at + x + uint64(64)] = c4
            target[at + x + uint64(80)] = c5
            target[at + x + uint64(96)] = c6
            target[at + x + uint64(112)] = c7


def unpack_qweight_4bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Undoes `repack_qweight_4bit`: Marlin words in ``source``, AWQ words to ``target``, same shapes."""
    words = uint64(row_words)
    tiles = words // uint64(8)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        at = uint64(128) * tile
        for x in range(uint64(16)):
            (
                staged[x], staged[16 + x], staged[32 + x], staged[48 + x],
                staged[64 + x], staged[80 + x], staged[96 + x], staged[112 + x],
            ) = _transpose_nibbles(
                source[at + x],
                source[at + x + uint64(32)],
                source[at + x + uint64(64)],
                source[at + x + uint64(96)],
                source[at + x + uint64(16)],
                source[at + x + uint64(48)],
                source[at + x + uint64(80)],
                source[at + x + uint64(112)],
            )  # fmt: skip
        for r in range(16):
            to = (uint64(16) * tile_row + uint64(r)) * words + uint64(8) * tile_column
            at = uint64(16 * ((r >> 3) + 4 * (r & 1)) + 4 * ((r & 7) >> 1))
            for block in range(uint64(4)):
                target[to + uint64(2) * block] = staged[at + block]
                target[to + uint64(2) * block + uint64(1)] = staged[at + uint64(32) + block]


# For 8 bits a block of 16 columns is four source words; word ``part`` holds columns 4 part + order[i],
# and half = part // 2 says which of the lane's two target words they go to. Matrix row i is value
# MARLIN_INTERLEAVE[i]: 0 2 1 3, so value v is row (v >> 1) + 2 * (v & 1).


def repack_qweight_8bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Repacks rows of tiles from AWQ to Marlin, 8 bits.

    Args:
        source: uint32 [16 * tile_rows * row_words], AWQ words, row by row.
        target: uint32, same length, Marlin words; written.
        staged: uint32 [128], scratch.
        tile_rows: how many rows of tiles.
        row_words: words in a row, N / 4, a multiple of 16.
    """
    words = uint64(row_words)
    tiles = words // uint64(16)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        for part in range(4):
            for r in range(16):
                at = (uint64(16) * tile_row + uint64(r)) * words + uint64(16) * tile_column + uint64(part)
                to = uint64(16 * ((r >> 3) + 2 * (r & 1)) + 4 * ((r & 7) >> 1))
                for block in range(uint64(4)):
                    staged[to + block] = source[at + uint64(4) * block]
            at = uint64(256) * tile + uint64(128 * (part & 1) + (part >> 1))
            for x in range(uint64(16)):
                c0, c2, c1, c3 = _transpose_bytes(staged[x], staged[16 + x], staged[32 + x], staged[48 + x])
                target[at + uint64(2) * x] = c0
                target[at + uint64(2) * x + uint64(32)] = c1
                target[at + uint64(2) * x + uint64(64)] = c2
                target[at + uint64(2) * x + uint64(96)] = c3


def unpack_qweight_8bit(source: Any, target: Any, staged: Any, tile_rows: Any, row_words: Any) -> None:
    """Undoes `repack_qweight_8bit`: Marlin words in ``source``, AWQ words to ``target``, same shapes."""
    words = uint64(row_words)
    tiles = words // uint64(16)
    for tile in range(uint64(tile_rows) * tiles):
        tile_row, tile_column = tile // tiles, tile % tiles
        for part in range(4):
            at = uint64(256) * tile + uint64(128 * (part & 1) + (part >> 1))
            for x in range(uint64(16)):
                staged[x], staged[16 + x], staged[32 + x], staged[48 + x] = _transpose_bytes(
                    source[at + uint64(2) * x],
                    source[at + uint64(2) * x + uint64(64)],
                    source[at + uint64(2) * x + uint64(32)],
                    source[at + uint64(2) * x + uint64(96)],
                )
            for r in range(16):
                to = (uint64(16) * tile_row + uint64(r)) * words + uint64(16) * tile_column + uint64(part)
                at = uint64(16 * ((r >> 3) + 2 * (r & 1)) + 4 * ((r & 7) >> 1))
                for block in range(uint64(4)):
                    target[to + uint64(4) * block] = staged[at + block]


def gather_fields_4bit(source: Any, target: Any, fields: Any, blocks: Any, _unused: Any) -> None:
    """Rearranges the nibbles of every block of eight words by a table.

    Args:
        source: uint32 [8 * blocks].
        target: uint32, same length; written.
        fields: uint8 [64]; field i of a target block is field ``fields[i]`` of the source's, counted upward
            from the block's first word's lowest bits.
        blocks: how many.
    """
    for block in range(uint64(blocks)):
        for word in range(uint64(8)):
            value = uint32(0)
            for i in range(uint64(8)):
                field = uint64(fields[word * uint64(8) + i])
                found = source[block * uint64(8) + (field >> uint64(3))] >> uint32(uint64(4) * (field & uint64(7)))
                value |= (found & uint32(15)) << uint32(uint64(4) * i)
            target[block * uint64(8) + word] = value


def gather_fields_8bit(source: Any, target: Any, fields: Any, blocks: Any, _unused: Any) -> None:
    """Rearranges the bytes of every block of sixteen words by a table; as `gather_fields_4bit`."""
    for block in range(uint64(blocks)):
        for word in range(uint64(16)):
            value = uint32(0)
            for i in range(uint64(4)):
                field = uint64(fields[word * uint64(4) + i])
                found = source[block * uint64(16) + (field >> uint64(2))] >> uint32(uint64(8) * (field & uint64(3)))
                value |= (found & uint32(255)) << uint32(uint64(8) * i)
            target[block * uint64(16) + word] = value


def gather_columns(source: Any, target: Any, columns: Any, blocks: Any, width: Any) -> None:
    """Rearranges 16-bit elements within every block by a table.

    Args:
        source: uint16 [blocks * width].
        target: uint16, same length; written.
        columns: uint8 [width]; element i of a target block is ``columns[i]`` of the source's.
        blocks: how many.
        width: elements of a block.
    """
    for block in range(uint64(blocks)):
        for i in range(uint64(width)):
            target[block * uint64(width) + i] = source[block * uint64(width) + uint64(columns[i])]


# Lane l = p + 4 i of a tile owns rows 2 p + {0, 1, 8, 9} of columns i and i + 8 of each block. So the words of
# lanes p, p + 4, ... hold, each in the same field, eight neighbouring columns of one row.


def decode_qweight_4bit(source: Any, target: Any, table: Any, tiles: Any, _unused: Any) -> None:
    """Decodes one row of tiles to the weight ``(q - z) * s``, 4 bits.

    Args:
        source: uint32 [128 * tiles], Marlin words.
        target: float64 [16, N], N = 64 * tiles; written.
        table: float64 [2, N], the zero points and the scales of the rows' group, in plain order.
        tiles: how many.
    """
    size_n = uint64(64) * uint64(tiles)
    for tile in range(uint64(tiles)):
        for p in range(uint64(4)):
            for block in range(uint64(4)):
                at = uint64(128) * tile + uint64(4) * p + block
                for value in range(uint64(8)):
                    shift = uint32(uint64(4) * ((value >> uint64(1)) + uint64(4) * (value & uint64(1))))
                    row = uint64(2) * p + (value & uint64(1)) + uint64(8) * ((value >> uint64(1)) & uint64(1))
                    first = uint64(64) * tile + uint64(16) * block + uint64(8) * (value >> uint64(2))
                    for i in range(uint64(8)):
                        q = float64((source[at + uint64(16) * i] >> shift) & uint32(15))
                        n = first + i
                        target[row * size_n + n] = (q - table[n]) * table[size_n + n]


def decode_qweight_8bit(source: Any, target: Any, table: Any, tiles: Any, _unused: Any) -> None:
    """Decodes one row of tiles, 8 bits: uint32 [256 * tiles]; as `decode_qweight_4bit`."""
    size_n = uint64(64) * uint64(tiles)
    for tile in range(uint64(tiles)):
        for p in range(uint64(4)):
            for block in range(uint64(4)):
                for value in range(uint64(8)):
                    at = uint64(256) * tile + uint64(8) * p + uint64(2) * block + (value >> uint64(2))
                    low = value & uint64(3)
                    shift = uint32(uint64(8) * ((low >> uint64(1)) + uint64(2) * (low & uint64(1))))
                    row = uint64(2) * p + (value & uint64(1)) + uint64(8) * ((value >> uint64(1)) & uint64(1))
                    first = uint64(64) * tile + uint64(16) * block + uint64(8) * (value >> uint64(2))
                    for i in range(uint64(8)):
                        q = float64((source[at + uint64(32) * i] >> shift) & uint32(255))
                        n = first + i
                        target[row * size_n + n] = (q - table[n]) * table[size_n + n]


def add_product(source: Any, target: Any, table: Any, rows: Any, size_n: Any) -> None:
    """Adds the product of one token and some rows of a weight, row by row.

    Args:
        source: float64 [rows, size_n], the weight's rows.
        target: float64 [size_n]; added to.
        table: float64 [rows], the token's values.
        rows: how many.
        size_n: N.
    """
    width = uint64(size_n)
    for row in range(uint64(rows)):
        value = table[row]
        for n in range(width):
            target[n] += value * source[row * width + n]


#: Types of each kernel's source and target elements, and of its table or scratch.
_KERNELS: dict[Any, tuple[Any, Any, Any]] = {
    repack_qweight_4bit: (types.uint32, types.uint32, types.uint32),
    unpack_qweight_4bit: (types.uint32, types.uint32, types.uint32),
    repack_qweight_8bit: (types.uint32, types.uint32, types.uint32),
    unpack_qweight_8bit: (types.uint32, types.uint32, types.uint32),
    gather_fields_4bit: (types.uint32, types.uint32, types.uint8),
    gather_fields_8bit: (types.uint32, types.uint32, types.uint8),
    gather_columns: (types.uint16, types.uint16, types.uint8),
    decode_qweight_4bit: (types.uint32, types.float64, types.float64),
    decode_qweight_8bit: (types.uint32, types.float64, types.float64),
    add_product: (types.float64, types.float64, types.float64),
}


def compile_kernels() -> tuple[dict[str, str], bytes]:
    """Compiles every kernel for this processor.

    Returns:
        The symbol of each kernel, by the function's name, and one object file that holds them all.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    names, module = {}, binding.parse_assembly("")
    for function, elements in _KERNELS.items():
        pointers = [types.CPointer(each) for each in elements]  # type: ignore[no-untyped-call]
        compiled = cfunc(types.void(*pointers, types.int64, types.int64), error_model="numpy")(function)
        names[function.__name__] = compiled.native_name
        module.link_in(binding.parse_assembly(compiled.inspect_llvm()))
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )
    return names, machine.emit_object(module)
