"""SmolLM2-135M-Instruct, quantized by AutoAWQ itself: 30 layers whose attention is 576 wide, in one shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awq2marlin import convert, revert, verify
from tests.e2e import oracle
from tests.skips import NO_REAL_MODEL

MODEL = Path(__file__).parents[3] / "shared" / "models" / "smollm2-135m-awq-g64"
SHARD = "model.safetensors"
pytestmark = pytest.mark.skipif(not (MODEL / SHARD).exists(), reason=NO_REAL_MODEL)
SAMPLED = ("0.mlp.gate_proj", "14.mlp.down_proj", "29.mlp.up_proj", "7.self_attn.q_proj", "29.self_attn.v_proj")


@pytest.fixture(scope="module", params=["keep", "pad"])
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Any]]:
    output = tmp_path_factory.mktemp(request.param) / "output"
    result = convert(MODEL, output, unaligned=request.param, verify="none")
    yield request.param, output, result
    for path in output.iterdir():  # 114 MB each: pytest would keep three runs of them
        path.unlink()


def test_90_modules_are_converted_and_120_kept_or_all_padded(converted: tuple[str, Path, Any]) -> None:
    unaligned, output, result = converted
    assert (len(result.converted), len(result.kept)) == {"keep": (90, 120), "pad": (210, 0)}[unaligned]
    assert {module.name.split(".")[3] for module in result.kept} == ({"self_attn"} if unaligned == "keep" else set())
    document = json.loads((output / "config.json").read_text("utf-8"))["quantization_config"]
    assert len(document["awq_modules"]) == len(result.kept)
    assert document["unquantized_modules"] == ["model.embed_tokens"]
    sizes = {"q_proj": [576, 576], "k_proj": [576, 192], "v_proj": [576, 192], "o_proj": [576, 576]}
    padded = {f"model.layers.{n}.self_attn.{name}": size for n in range(30) for name, size in sizes.items()}
    assert document.get("padded_modules", {}) == ({} if unaligned == "keep" else padded)


def test_tied_embeddings_stay_named_in_the_header(converted: tuple[str, Path, Any]) -> None:
    _, old = oracle.read_header(MODEL / SHARD)
    _, new = oracle.read_header(converted[1] / SHARD)
    assert new["__metadata__"] == old["__metadata__"]
    assert new["__metadata__"]["lm_head.weight"] == "model.embed_tokens.weight"


def test_verifies_and_reverts_to_the_same_sha256(converted: tuple[str, Path, Any], tmp_path: Path) -> None:
    unaligned, output, _ = converted
    compared = verify(MODEL, output)
    assert len(compared.modules) == {"keep": 90, "pad": 210}[unaligned]
    reverted = revert(output, tmp_path / "back")
    before = oracle.file_hashes(MODEL)
    assert oracle.file_hashes(tmp_path / "back") == before
    assert {file.name: file.sha256 for file in reverted.files} == before
    (tmp_path / "back" / SHARD).unlink()


def test_dequantized_weights_are_equal(converted: tuple[str, Path, Any]) -> None:
    unaligned, output, result = converted
    old, new = oracle.read_shard(MODEL / SHARD), oracle.read_shard(output / SHARD)
    plans = {module.name: module for module in result.modules}
    for name in SAMPLED:
        module = f"model.layers.{name}"
        q, z, s = (old[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        weight = dequantize_awq(q, z, s)
        plan = plans[module]
        assert plan.converted == (unaligned == "pad" or "mlp" in name)
        q, z, s = (new[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        got = dequantize_marlin(q, z, s) if plan.converted else dequantize_awq(q, z, s)
        assert got.shape == (plan.padded_k, plan.padded_n)
        np.testing.assert_array_equal(got[: plan.size_k, : plan.size_n], weight, err_msg=module)
        assert not got[plan.size_k :].any()
        assert not got[:, plan.size_n :].any()


def dequantize_awq(q: oracle.Entry, z: oracle.Entry, s: oracle.Entry) -> np.ndarray:
    """w[k, n] = (q[k, n] - z[k // g, n]) * s[k // g, n], groups of 64."""
    weights, zeros = oracle.unpack_awq(q.data, q.shape[0], 4), oracle.unpack_awq(z.data, z.shape[0], 4)
    scales = np.frombuffer(s.data, "<f2").reshape(s.shape)
    return combine(weights, zeros, scales)


def dequantize_marlin(q: oracle.Entry, z: oracle.Entry, s: oracle.Entry) -> np.ndarray:
    """The same, with every value read from where the specification puts it."""
    size_k, size_n = q.shape[0] * 16, s.shape[1]
    fields = split(q.data, (size_k // 16, size_n // 64, 1024))
    weights = np.zeros((size_k // 16, size_n // 64, 16, 64), np.uint32)
    for at, (row, column) in enumerate(oracle.tile_order(4)):
        weights[:, :, row, column] = fields[:, :, at]
    weights = weights.transpose(0, 2, 1, 3).reshape(size_k, size_n)
    zero_fields, scales = split(z.data, (z.shape[0], size_n)), np.frombuffer(s.data, "<f2").reshape(s.shape)
    zeros, plain = np.zeros_like(zero_fields), np.zeros_like(scales)
    for n in range(size_n):
        block, position = n // 64 * 64, n % 64
        source = block + position // 8 + 8 * (position % 8)  # position 8 i + m takes source column i + 8 m
        plain[:, source] = scales[:, n]
        field = n // 8 * 8 + oracle.ORDER[4].index(n % 8)  # position p of a word stands in the field i of order[i] = p
        zeros[:, source] = zero_fields[:, field]
    return combine(weights, zeros, plain)


def split(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    words = np.frombuffer(data, "<u4")
    return np.stack([(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)], axis=-1).reshape(shape)


def combine(weights: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    groups = np.repeat(np.arange(len(zeros)), 64)
    difference = weights.astype(np.int32) - zeros.astype(np.int32)[groups]
    return difference.astype(np.float32) * scales.astype(np.float32)[groups]
