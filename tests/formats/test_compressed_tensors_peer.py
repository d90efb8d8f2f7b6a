"""What compressed-tensors wrote is decoded by the format's sentences to what the library itself makes of it.

Needs no library: what it said is stored (see make_compressed_tensors). Nothing of the package is tested here; this
shows that the decoder of `peers`, against which the package is tested, is right.
"""

import numpy as np
import pytest

from tests.equality import assert_identical
from tests.formats import peers

each_fixture = pytest.mark.parametrize("name", peers.NAMES)


@each_fixture
def test_the_dense_weights_are_the_library_s_bit_for_bit(name):
    said = peers.library(name)
    for module, found in peers.decode_all(peers.checkpoint(name)).items():
        if f"{module}.dense" in said:
            assert_identical(found.rounded, said[f"{module}.dense"], module)
        assert peers.digest(found.rounded) == said[f"{module}.dense_sha256"], module


@each_fixture
def test_codes_and_zero_points_are_the_library_s(name):
    said = peers.library(name)
    for module, found in peers.decode_all(peers.checkpoint(name)).items():
        middle = 2 ** (found.bits - 1)
        signed = (found.codes.T.astype(np.int16) - middle).astype(np.int8)
        assert peers.digest(signed) == said[f"{module}.codes_sha256"], module
        zeros = (found.zeros.T.astype(np.int16) - middle).astype(np.int8)
        assert_identical(zeros, said.get(f"{module}.zeros", np.zeros_like(zeros)), module)


def test_every_stored_module_is_decoded():
    for name in peers.NAMES:
        modules = {key.rpartition(".")[0] for key in peers.library(name)}
        assert modules == set(peers.decode_all(peers.checkpoint(name))), name


def test_the_fixtures_are_of_all_kinds():
    kinds = set()
    for name in peers.NAMES:
        args = peers.weight_args(peers.checkpoint(name))
        kinds.add((args["num_bits"], args["symmetric"], args["group_size"]))
    assert kinds >= {(bits, symmetric, group) for bits in (4, 8) for symmetric in (True, False) for group in GROUPS}
    tensors = {name: peers.read_tensors(peers.checkpoint(name)) for name in peers.NAMES}
    scales = {dtype for each in tensors.values() for key, (dtype, _) in each.items() if key.endswith("weight_scale")}
    assert scales == {"F16", "BF16"}
    shapes = {dtype for each in tensors.values() for key, (dtype, _) in each.items() if key.endswith("weight_shape")}
    assert shapes == {"I64"}


GROUPS = (32, 64, 128, None)


def test_zero_points_differ_from_one_another_so_that_an_order_can_be_wrong():
    for name in peers.NAMES:
        if name.startswith("w") and "_asym_" in name:
            for module in peers.decode_all(peers.checkpoint(name)).values():
                assert len(np.unique(module.zeros)) > 6, name


def test_a_module_of_the_llama_is_torn_over_two_files():
    names = {"packed", "shape"}, {"scale", "zero_point"}
    for path, parts in zip(sorted(peers.checkpoint("llama").glob("*.safetensors"))[::-1], names, strict=True):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for part in ("packed", "shape", "scale", "zero_point"):
            assert (f'"model.layers.0.mlp.up_proj.weight_{part}"'.encode() in raw[8:start]) == (part in parts)


def test_old_files_lack_zero_points_that_are_all_in_the_middle():
    tensors = peers.read_tensors(peers.checkpoint("old_w4_asym_g32"))
    assert peers.weight_args(peers.checkpoint("old_w4_asym_g32"))["symmetric"] is False
    assert tensors["model.layers.0.self_attn.o_proj.weight_zero_point"][0] == "I8"
    assert "model.layers.0.mlp.down_proj.weight_packed" in tensors
    assert "model.layers.0.mlp.down_proj.weight_zero_point" not in tensors


def test_a_permutation_of_the_columns_is_one_that_matters():
    (module,) = peers.decode_all(peers.checkpoint("old_g_idx")).values()
    assert (np.diff(module.groups) < 0).any()
    (module,) = peers.decode_all(peers.checkpoint("old_g_idx_in_order")).values()
    assert module.groups.tolist() == [row // 32 for row in range(128)]


@pytest.mark.parametrize("name", [name for name in peers.NAMES if name not in peers.PERMUTED | peers.ODD_COLUMNS])
def test_the_awq_checkpoint_of_the_same_numbers_holds_them(name, tmp_path):
    folder = peers.write_awq(tmp_path / "awq", peers.checkpoint(name))
    tensors, bits = peers.read_tensors(folder), peers.weight_args(peers.checkpoint(name))["num_bits"]
    for module, expected in peers.decode_all(peers.checkpoint(name)).items():
        found = peers.decode_awq(tensors, module, bits)
        assert_identical(found.rounded, expected.rounded, module)
        assert_identical(found.zeros, expected.zeros, module)
