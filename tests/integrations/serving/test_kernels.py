"""The GEMM that serves a layer of an engine: ours computes the product, on a CPU too; which of the two is taken."""

from unittest import mock

import numpy as np
import pytest

from awq2marlin.errors import KernelUnavailableError

BIAS = {"mlp.down_proj.bias": (192,)}


def row_layer(harness, model, size_k=320, size_n=192, **options):
    layer = harness.build("RowParallelLinear", model, "mlp.down_proj", size_k, size_n, **options)
    harness.load(layer, model, {None: "mlp.down_proj"})
    harness.finish(layer)
    return layer


def weight_of(model, module):
    """Returns the source's weight, float64 [K, N]."""
    q, z, s = (None if each is None else each.astype(np.float64) for each in model.values(module))
    rows = len(q) // len(s)
    middle = 2 ** (model.recipe.bits - 1)
    return (q - (middle if z is None else z.repeat(rows, 0))) * s.repeat(rows, 0)


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", [(4, 64, True), (4, 64, False), (8, 64, True), (8, -1, False), (4, -1, True)], ids=str)
def test_ours_computes_the_product_of_the_source_s_weight(harness, tmp_path, monkeypatch, kind, has_bias, dtype):
    """320 rows are padded to 384; whatever bits, zero points and bias."""
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    torch = harness.torch
    bits, group_size, has_qzeros = kind
    options = {"bits": bits, "group_size": group_size, "has_qzeros": has_qzeros, "weights": BIAS if has_bias else {}}
    model = harness.Model(tmp_path, {"mlp.down_proj": (320, 192)}, unaligned="pad", **options)
    layer = row_layer(harness, model, bias=has_bias, params_dtype=getattr(torch, dtype))
    assert type(layer.quant_method.kernel).__name__ == "OwnKernel"
    x = torch.randn(2, 3, 320, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    found = layer.quant_method.apply(layer, x, layer.bias if has_bias else None)
    assert found.shape == (2, 3, 192)
    assert found.is_contiguous()
    wanted = x.double().numpy() @ weight_of(model, "mlp.down_proj")
    if has_bias:
        wanted += model.awq["mlp.down_proj.bias"].double().numpy()
    scale = np.abs(x.double().numpy()) @ np.abs(weight_of(model, "mlp.down_proj"))
    assert (np.abs(found.double().numpy() - wanted) <= torch.finfo(x.dtype).eps * (scale + np.abs(wanted) + 1)).all()


def test_ours_is_one_operator_to_the_compiler(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 192)}, weights=BIAS)
    layer = row_layer(harness, model, 256, bias=True)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    x = harness.torch.ones(3, 256, dtype=harness.torch.half)
    apply = layer.quant_method.apply
    compiled = harness.torch.compile(lambda x: apply(layer, x, layer.bias), backend=keep, fullgraph=True, dynamic=True)
    assert harness.torch.equal(compiled(x), apply(layer, x, layer.bias))
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [each for each in called if "getitem" not in each] == ["awq2marlin.marlin_gemm.default"]  # of x.shape


# --- which of the two --------------------------------------------------------------------------------------


def kernel_name(harness, model, size_k=256):
    return type(row_layer(harness, model, size_k).quant_method.kernel).__name__


def test_without_a_gpu_the_engine_s_is_taken_unless_ours_is_asked_for(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 192)})
    assert kernel_name(harness, model) == harness.ENGINE_KERNEL


def test_8_bits_with_zero_points_are_ours_whatever_is_chosen(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 192)}, bits=8)
    assert kernel_name(harness, model) == "OwnKernel"
    assert harness.kernels.CHOICE.kernel == "engine"


def test_what_only_ours_could_serve_is_refused_where_ours_cannot_be_had(harness, tmp_path):
    model = harness.Model(tmp_path, {"mlp.down_proj": (256, 192)}, bits=8)
    why = KernelUnavailableError("The run-time compiler NVRTC cannot be loaded.")
    report = mock.patch("awq2marlin.integrations.kernel_choice.KernelChoice._report", side_effect=why)
    with report, pytest.raises(KernelUnavailableError, match="NVRTC cannot be loaded"):
        row_layer(harness, model, 256)
