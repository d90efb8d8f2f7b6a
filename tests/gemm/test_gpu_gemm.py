"""The kernels on a GPU: every kernel, not only the one that would be picked, on every alignment."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import jit, ops
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.families.base import HOPPER, GemmProblem
from awq2marlin.gemm.families.wide import WideConfig
from awq2marlin.gemm.launch import launch_gemm
from awq2marlin.gemm.select import all_configs, pick_config
from tests.gemm.gemm_cases import (
    DTYPES,
    SMALL_SHAPES,
    Layer,
    assert_product,
    from_both_devices,
    random_layer,
    random_tokens,
)
from tests.gemm.stand_in import forget_prepared_calls
from tests.gemm.test_cpu_gemm import CASES, golden
from tests.gemm.test_linear import loaded_layer
from tests.skips import ONE_GPU

pytestmark = pytest.mark.gpu

GROUPS = [(32, True), (32, False), (64, True), (64, False), (128, True), (-1, True), (-1, False)]  # size, zero points
KINDS = [("fp16", 4), ("fp16", 8), ("bf16", 4), ("bf16", 8)]


def gpu_layer(size_k, size_n, group_size, **options):
    return random_layer(size_k, size_n, group_size, device="cuda", **options)


def problem_of(size_m, layer):
    groups = layer.scales.shape[0]
    capability = torch.cuda.get_device_capability()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    dtype = {torch.float16: "fp16", torch.bfloat16: "bf16"}[layer.scales.dtype]
    return GemmProblem(
        size_m, layer.size_n, layer.size_k, layer.size_k // groups, layer.num_bits, dtype, capability, multiprocessors
    )


def run(config, a, layer, problem=None):
    """Runs a config into poisoned memory: what no block writes stays NaN."""
    out = torch.full((a.shape[0], layer.size_n), float("nan"), dtype=a.dtype, device=a.device)
    tensors = GemmTensors(a, layer.qweight, layer.scales, layer.qzeros, layer.bias, layer.num_bits)
    return launch_gemm(config, problem or problem_of(a.shape[0], layer), tensors, out)


def variants(problem):
    """Every kernel that serves a problem, whole and split, with every way to sum the splits."""
    for config in all_configs(problem):
        yield config.with_splits(1)
        yield config.with_splits(3, "workspace")
        if problem.has_clusters:
            yield config.with_splits(2, "cluster")
            yield config.with_splits(8, "cluster")
        yield from (launch for launch in config.launches(problem) if launch.reduction == "runs")


def groups_that_divide(size_k):
    return [(group_size, has_zeros) for group_size, has_zeros in GROUPS if size_k % group_size == 0]


@pytest.mark.parametrize(("dtype", "num_bits"), KINDS)
@pytest.mark.parametrize(("size_k", "size_n"), SMALL_SHAPES)
def test_every_kernel_gives_the_product(size_k, size_n, dtype, num_bits):
    for group_size, has_zeros in groups_that_divide(size_k):
        layer = gpu_layer(
            size_k, size_n, group_size, num_bits=num_bits, dtype=DTYPES[dtype], has_zeros=has_zeros, has_bias=has_zeros
        )
        for size_m in (1, 3, 8, 9, 16, 17, 27, 65, 130):
            a = random_tokens(size_m, layer)
            for config in variants(problem_of(size_m, layer)):
                assert_product(run(config, a, layer), a, layer)


@pytest.mark.parametrize("size_m", [*range(1, 18), 24, 25, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 255, 257, 1000])
def test_every_number_of_tokens(size_m):
    layer = gpu_layer(512, 320, 128, has_bias=True)
    a = random_tokens(size_m, layer)
    for config in variants(problem_of(size_m, layer)):
        assert_product(run(config, a, layer), a, layer)
    assert_product(layer(a), a, layer)


@pytest.mark.parametrize(("dtype", "num_bits"), KINDS)
@pytest.mark.parametrize(("group_size", "has_zeros"), GROUPS)
def test_identity_returns_the_decoded_weight_bit_for_bit(group_size, has_zeros, dtype, num_bits):
    layer = gpu_layer(512, 320, group_size, num_bits=num_bits, dtype=DTYPES[dtype], has_zeros=has_zeros)
    eye = torch.eye(layer.size_k, dtype=DTYPES[dtype], device="cuda")
    decoded = layer.weight.to(DTYPES[dtype])
    for size_m in (8, 16, 32, 64, 512):
        configs = list(variants(problem_of(size_m, layer)))
        for config in configs:
            rows = [run(config, eye[start : start + size_m], layer) for start in range(0, layer.size_k, size_m)]
            assert torch.equal(torch.cat(rows), decoded), config


def walks(size_m, layer, multiprocessors):
    """Every kernel whose blocks walk over tiles, with few blocks, and its last wave split in every way."""
    problem = replace(problem_of(size_m, layer), multiprocessors=multiprocessors)
    for config in all_configs(problem):
        if isinstance(config, WideConfig):
            for num_splits, reduction in ((1, "workspace"), (2, "cluster"), (2, "workspace"), (5, "workspace")):
                yield problem, config.with_splits(num_splits, reduction)


@pytest.mark.parametrize("multiprocessors", [2, 5, 8])
@pytest.mark.parametrize(("dtype", "num_bits"), KINDS)
def test_a_last_wave_of_tiles_is_split(dtype, num_bits, multiprocessors):
    split = set()
    for size_k, size_n, group_size in ((384, 1088, 64), (128, 448, -1)):
        layer = gpu_layer(size_k, size_n, group_size, num_bits=num_bits, dtype=DTYPES[dtype], has_bias=True)
        for size_m in (130, 257, 999):
            a = random_tokens(size_m, layer)
            for problem, config in walks(size_m, layer, multiprocessors):
                out = run(config, a, layer, problem)
                assert_product(out, a, layer)
                for _ in range(3):
                    assert torch.equal(run(config, a, layer, problem), out), config
                if config.split_tiles(problem):
                    split.add((config.num_splits, config.reduction))
    if problem_of(130, layer).capability == HOPPER:
        assert split == {(2, "cluster"), (2, "workspace"), (5, "workspace")}


def test_split_tiles_return_the_decoded_weight_bit_for_bit():
    layer = gpu_layer(512, 448, 128)
    eye = torch.eye(512, dtype=torch.float16, device="cuda")
    for problem, config in walks(512, layer, 6):
        assert torch.equal(run(config, eye, layer, problem), layer.weight.half()), config


def test_split_tiles_survive_a_captured_graph():
    layer = gpu_layer(1024, 448, 128)
    a = random_tokens(700, layer)
    for problem, config in walks(700, layer, 4):
        expected = run(config, a, layer, problem)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [run(config, a, layer, problem) for _ in range(2)]
        for _ in range(3):
            graph.replay()
        assert all(torch.equal(out, expected) for out in outs), config


@pytest.mark.parametrize("size_k", [64, 128])
def test_one_group_as_large_as_k(size_k):
    layer = gpu_layer(size_k, 128, size_k)
    a = random_tokens(5, layer)
    for config in variants(problem_of(5, layer)):
        assert_product(run(config, a, layer), a, layer)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_runs_end_within_tiles_and_cover_several(group_size):
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for size_k, tiles in ((512, multiprocessors // 2 + 3), (384, 2 * multiprocessors + 5), (256, multiprocessors)):
        layer = gpu_layer(size_k, 256 * tiles - 64, group_size, has_bias=True)
        for size_m in (17, 40, 64, 96):
            a = random_tokens(size_m, layer)
            for config in all_configs(problem_of(size_m, layer)):
                for launch in config.launches(problem_of(size_m, layer)):
                    if launch.reduction == "runs":
                        assert_product(run(launch, a, layer), a, layer)


@pytest.mark.parametrize("case", CASES)
def test_golden_layers_give_the_product(case):
    qweight, scales, qzeros = (golden(case, name) for name in ("marlin_qweight", "marlin_scales", "marlin_qzeros"))
    on_gpu = (tensor if tensor is None else tensor.cuda() for tensor in (qweight, scales, qzeros, None))
    layer = Layer(qweight.shape[0] * 16, scales.shape[1], int(case[1]), *on_gpu)
    for size_m in (1, 33):
        a = random_tokens(size_m, layer)
        assert_product(layer(a), a, layer)


@pytest.mark.parametrize("group_size", [32, 128])
def test_two_runs_give_the_same_bits(group_size):
    layer = gpu_layer(4096, 1024, group_size, has_bias=True)
    for size_m in (1, 16, 24, 32, 64, 300):
        a = random_tokens(size_m, layer)
        for config in variants(problem_of(size_m, layer)):
            first = run(config, a, layer)
            for _ in range(5):
                assert torch.equal(run(config, a, layer), first), config


@pytest.mark.parametrize(("size_m", "group_size"), [(16, 64), (33, 128), (100, 32), (128, 128)])
def test_both_ways_to_sum_splits_give_the_same_bits(size_m, group_size):
    layer = gpu_layer(2048, 320, group_size, has_bias=True)
    problem = problem_of(size_m, layer)
    if not problem.has_clusters:
        pytest.skip("This GPU has no clusters, so there is one way only.")
    a = random_tokens(size_m, layer)
    for config in all_configs(problem):
        outs = [run(config.with_splits(5, reduction), a, layer) for reduction in ("cluster", "workspace")]
        assert torch.equal(*outs), config


@pytest.mark.parametrize("num_bits", [4, 8])
def test_slices_need_no_copy(num_bits):
    layer = gpu_layer(256, 640, 64, num_bits=num_bits, has_bias=True)
    factor = 32 // num_bits
    cut = Layer(
        256,
        384,
        num_bits,
        layer.qweight[:, 128 * 16 // factor : 512 * 16 // factor],
        layer.scales[:, 128:512],
        layer.qzeros[:, 128 // factor : 512 // factor],
        layer.bias[128:512],
    )
    tokens = random_tokens(200, layer)
    wide = torch.zeros(200, 1024, dtype=torch.float16, device="cuda")
    wide[:, 256:512] = tokens
    for size_m in (1, 16, 40, 200):
        for config in variants(problem_of(size_m, cut)):
            assert_product(run(config, wide[:size_m, 256:512], cut), tokens[:size_m], cut)
        rows = ops.marlin_gemm(  # rows 64 .. 192: whole groups
            wide[:size_m, 320:448], layer.qweight[4:12], layer.scales[1:3], layer.qzeros[1:3], num_bits=num_bits
        )
        expected = tokens[:size_m, 64:192].double() @ layer.weight[64:192]
        torch.testing.assert_close(rows.double(), expected, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("stride", [0, 8])
def test_rows_may_share_memory(stride):
    layer = gpu_layer(256, 384, 64)
    tokens = random_tokens(16, layer).flatten().as_strided((400, 256), (stride, 1))
    assert_product(layer(tokens), tokens.contiguous(), layer)


def test_no_tokens_give_an_empty_result():
    layer = gpu_layer(128, 64, 32)
    assert layer(torch.empty(0, 128, dtype=torch.float16, device="cuda")).shape == (0, 64)


@pytest.mark.parametrize("group_size", [32, 128])
def test_works_in_a_captured_graph_on_another_stream(group_size):
    layer = gpu_layer(1024, 512, group_size, has_bias=True)
    assert ops.warm_up(layer.qweight, layer.scales, layer.qzeros, max_tokens=256) >= 2
    for size_m in (1, 16, 48, 200):
        a = random_tokens(size_m, layer)
        expected = layer(a)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            outs = [layer(a) for _ in range(3)]
        for _ in range(3):
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(out, expected) for out in outs)


def test_split_sums_survive_a_captured_graph():
    layer = gpu_layer(1024, 512, 128)
    a = random_tokens(16, layer)
    config = all_configs(problem_of(16, layer))[0].with_splits(4, "workspace")
    expected = run(config, a, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(config, a, layer)
    for _ in range(3):
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_first_use_in_a_capture_names_the_warm_up(monkeypatch):
    layer = gpu_layer(128, 64, 32)
    a = random_tokens(1, layer)
    monkeypatch.setattr(jit, "_loaded", {})
    forget_prepared_calls(monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(KernelUnavailableError, match="warm_up"), torch.cuda.graph(graph):
        layer(a)
    assert_product(layer(a), a, layer)


def test_streams_run_side_by_side():
    layer = gpu_layer(2048, 1024, 128)
    tokens = [random_tokens(size_m, layer, seed=size_m) for size_m in (1, 7, 16, 33, 100)]
    expected = [layer(a) for a in tokens]
    streams = [torch.cuda.Stream() for _ in tokens]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for a, stream in zip(tokens, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(layer(a))
        torch.cuda.synchronize()
        assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))


def test_a_fresh_thread_can_launch():
    layer = gpu_layer(256, 128, 64)
    a = random_tokens(4, layer)
    outs = []
    thread = threading.Thread(target=lambda: outs.append(layer(a)))
    thread.start()
    thread.join()
    assert_product(outs[0], a, layer)


def test_a_launch_sees_what_the_kernel_before_it_wrote():
    """Launches may overlap; what they read must not."""
    layer = gpu_layer(2048, 2048, 128)
    square = [gpu_layer(2048, 2048, 128, seed=seed) for seed in range(4)]
    for size_m in (1, 16, 64, 200):
        x = expected = random_tokens(size_m, layer) * 0.01
        for step in square:
            x = step(x)
        for step in square:
            expected = step(expected)
            torch.cuda.synchronize()
        assert torch.equal(x, expected)
        fresh = ops.repack_awq(layer.qweight.reshape(2048, -1))  # weights written by the kernel right before
        assert torch.equal(
            ops.marlin_gemm(x, fresh, layer.scales, layer.qzeros),
            ops.marlin_gemm(x, fresh.clone(), layer.scales, layer.qzeros),
        )


def test_results_beyond_two_to_the_31():
    layer = gpu_layer(128, 65536, 128)
    size_m = 33_000
    a = random_tokens(size_m, layer)
    out = layer(a)
    assert out.numel() > 2**31
    assert_product(out[-70:], a[-70:], layer)
    assert_product(out[:3], a[:3], layer)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("size_k", "size_n"), [*SMALL_SHAPES, (16, 64), (4096, 1024)])
def test_repack_gives_the_cpus_bytes(size_k, size_n, num_bits):
    packed = torch.randint(-(2**31), 2**31, (size_k, size_n * num_bits // 32), dtype=torch.int32)
    assert torch.equal(
        ops.repack_awq(packed.cuda(), num_bits=num_bits).cpu(), ops.repack_awq(packed, num_bits=num_bits)
    )
    wide = torch.zeros(size_k, 2 * packed.shape[1], dtype=torch.int32)
    wide[:, packed.shape[1] :] = packed
    part = wide.cuda()[:, packed.shape[1] :]
    assert torch.equal(ops.repack_awq(part, num_bits=num_bits).cpu(), ops.repack_awq(packed, num_bits=num_bits))


@pytest.mark.parametrize("case", CASES)
def test_linear_layer_on_the_gpu_agrees_with_the_cpu(case):
    method, layer = loaded_layer(case)
    gpu_method, on_gpu = loaded_layer(case, "cuda")
    method.process_weights_after_loading(layer)
    gpu_method.process_weights_after_loading(on_gpu)
    for name, parameter in layer.named_parameters():
        assert torch.equal(getattr(on_gpu, name).cpu(), parameter)
    as_layer = Layer(
        layer.input_size_per_partition,
        layer.output_size_per_partition,
        int(case[1]),
        on_gpu.qweight,
        on_gpu.scales,
        getattr(on_gpu, "qzeros", None),
        None,
    )
    x = random_tokens(7, as_layer)
    assert_product(gpu_method.apply(on_gpu, x), x, as_layer)


def test_works_under_torch_compile():
    layer = gpu_layer(256, 128, 64)
    a = random_tokens(5, layer)
    compiled = torch.compile(lambda x: torch.relu(layer(x)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(a), torch.relu(layer(a)))


def test_gradients_are_those_of_the_decoded_weight():
    layer = gpu_layer(256, 192, 64, has_bias=True)
    a, bias = random_tokens(5, layer).requires_grad_(), layer.bias.requires_grad_()
    grad = torch.randn(5, 192, device="cuda").half()
    out = layer(a)
    assert torch.equal(out, layer(a.detach()))
    with torch.no_grad():
        assert not layer(a).requires_grad
    out.backward(grad)
    torch.testing.assert_close(a.grad.double(), grad.double() @ layer.weight.t(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=2e-3, atol=2e-3)
    compiled = torch.compile(layer.__call__, backend="aot_eager", fullgraph=True)
    again = a.detach().requires_grad_()
    compiled(again).backward(grad)
    assert torch.equal(again.grad, a.grad)
    scales = layer.scales.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="scales must need no gradient"):
        ops.marlin_gemm(a, layer.qweight, scales, layer.qzeros)


def test_a_mode_sees_the_calls_and_may_change_them():
    layer = gpu_layer(256, 192, 64)
    a, seen = random_tokens(5, layer), []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    with Mode():
        layer(a)
    assert seen == ["awq2marlin.marlin_gemm.default"]
    negated = torch._neg_view(-a)  # its memory holds the negative, as that of a conjugate's imaginary part does
    assert torch.equal(layer(negated), layer(a))


def test_refusals_leave_the_process_working():
    layer = gpu_layer(256, 128, 64)
    a = random_tokens(5, layer)
    with pytest.raises(ValueError, match="qweight must be on the device of a, cuda:0, found cpu"):
        ops.marlin_gemm(a, layer.qweight.cpu(), layer.scales, layer.qzeros)
    with pytest.raises(TypeError, match="scales must be"):
        ops.marlin_gemm(a, layer.qweight, layer.scales.bfloat16(), layer.qzeros)
    wide = gpu_layer(64, 1 << 20, 64)
    many = random_tokens(1 << 20, wide)
    with pytest.raises(torch.OutOfMemoryError):
        wide(many)
    torch.cuda.empty_cache()
    assert_product(layer(a), a, layer)


def test_every_device_has_its_own_kernels():
    if torch.cuda.device_count() < 2:
        pytest.skip(ONE_GPU)
    layer = gpu_layer(512, 256, 128)
    a = random_tokens(20, layer)
    moved = [tensor.to("cuda:1") for tensor in (a, layer.qweight, layer.scales, layer.qzeros)]
    outs = from_both_devices(lambda: ops.marlin_gemm(*moved), lambda: layer(a))
    assert sorted(out.device.index for out in outs) == [0] * 4 + [1] * 9
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(out.cpu(), layer(a).cpu()) for out in outs)


def test_the_everyday_call_takes_the_picked_config():
    layer = gpu_layer(4096, 4096, 128)
    for size_m in (1, 16, 64, 256):
        a = random_tokens(size_m, layer)
        assert torch.equal(layer(a), run(pick_config(problem_of(size_m, layer)), a, layer))
