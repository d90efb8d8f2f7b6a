"""The table of two formats' tensors: every repack knows what it reads, so that what it refuses has a name."""

from awq2marlin.checkpoint.counterparts import Counterparts, inverse_row
from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.formats.registry import AWQ_GEMM, MARLIN_NATIVE
from awq2marlin.layout.modules import QUANTIZED_PARTS, ModulePlan
from awq2marlin.layout.repack import Repack
from awq2marlin.layout.scheme import Scheme


def test_a_repack_names_the_tensor_that_it_reads_in_both_directions(tmp_path):
    write_checkpoint(tmp_path, Recipe({"m": (128, 64)}, {"n.weight": (8,)}, group_size=64))
    ((file, header),) = open_checkpoint(tmp_path).shards.items()
    module = ModulePlan("m", 128, 64, 128, 64, QUANTIZED_PARTS, converted=True)
    counterparts = Counterparts(AWQ_GEMM, MARLIN_NATIVE, Scheme(4, 64, True), {"m": module})
    rows = counterparts.rows(file, header)
    names = {f"m.{part}" for part in QUANTIZED_PARTS}
    for each in (rows, [inverse_row(row, file) for row in rows]):
        repacks = [row for row in each if isinstance(row.rewrite, Repack)]
        assert {row.source.name for row in repacks} == names
        assert all((row.rewrite.file, row.rewrite.name) == (file, row.source.name) for row in repacks)
