"""What a call hands to CUDA's driver, and what it refuses before: on any machine, as nothing is launched."""

import gc
import itertools
import re
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.gemm import dispatch, driver, ops
from awq2marlin.gemm.checks import GemmTensors
from awq2marlin.gemm.driver import Blocks, PreparedKernel
from awq2marlin.gemm.experts import ops as experts_ops
from awq2marlin.gemm.experts.checks import BlockTensors, ExpertTensors
from awq2marlin.gemm.experts.launch import plan_block
from awq2marlin.gemm.launch import launch_gemm, problem_of
from awq2marlin.gemm.select import all_configs, pick_config
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource
from tests.gemm.expert_cases import random_block, random_routing, random_rows
from tests.gemm.gemm_cases import random_layer, random_tokens
from tests.gemm.stand_in import STREAM, StandIn


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


def tensors_of(size_m, *layer, **options):
    layer = random_layer(*layer, **options)
    return GemmTensors(random_tokens(size_m, layer), layer.qweight, layer.scales, layer.qzeros, layer.bias)


def multiply(tensors):
    return ops._gemm_cuda(*tensors)


# ---- what the driver is handed ------------------------------------------------------------------------------


@pytest.mark.parametrize("size_m", [1, 20, 64, 512])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_kernel_of_the_gemm_is_handed_its_arguments(stand_in, size_m, has_bias):
    tensors = tensors_of(size_m, 512, 384, 128, has_bias=has_bias)
    a, qweight, scales, qzeros, bias, _ = tensors
    config, out = pick_config(problem_of(tensors)), multiply(tensors)
    (launched,) = stand_in.launched
    maps = {name: launched.arguments.pop(name) for name in list(launched.arguments) if name.endswith("_map")}
    assert launched == (
        config.source.name,
        config.grid(problem_of(tensors)),
        config.threads,
        config.shared_bytes,
        config.cluster,
        1,
        STREAM,
        {
            "a": a.data_ptr(),
            "qweight": qweight.data_ptr(),
            "scales": scales.data_ptr(),
            "qzeros": qzeros.data_ptr(),
            "bias": bias.data_ptr() if has_bias else 0,
            "out": out.data_ptr(),
            "workspace": 0,
            "size_m": size_m,
            "size_n": 384,
            "size_k": 512,
            "group_size": 128,
            "num_splits": config.num_splits,
            "a_stride": 512,
            "qweight_stride": 768,
            "scales_stride": 384,
            "qzeros_stride": 48,
        },
    )
    assert (out.shape, out.dtype, out.is_contiguous()) == ((size_m, 384), torch.float16, True)
    for (name, found), box in zip(maps.items(), config.boxes, strict=True):
        assert name == f"{box.tensor}_map"
        matrix = getattr(tensors, box.tensor)
        numbers = [int.from_bytes(found[8 * i : 8 * i + 8], "little") for i in range(6)]
        columns = matrix.shape[1] * matrix.itemsize // box.number_bytes
        row_bytes = matrix.stride(0) * matrix.itemsize
        assert numbers == [matrix.data_ptr(), columns, matrix.shape[0], row_bytes, box.numbers, box.rows]


def test_tensors_may_change_from_call_to_call(stand_in):
    first = tensors_of(512, 512, 384, 128)
    for tensors in (first, GemmTensors(*(each.clone() if torch.is_tensor(each) else each for each in first)), first):
        out = multiply(tensors)
        arguments = stand_in.launched[-1].arguments
        for name in ("a", "qweight", "scales", "qzeros"):
            assert arguments[name] == getattr(tensors, name).data_ptr()
        assert arguments["a_map"][:8] == tensors.a.data_ptr().to_bytes(8, "little")
        assert arguments["out"] == out.data_ptr()


def test_parts_that_go_through_a_workspace_are_summed_by_a_second_launch(stand_in):
    tensors = tensors_of(16, 512, 384, 128)
    problem = problem_of(tensors)
    launch_gemm(all_configs(problem)[0].with_splits(4, "workspace"), problem, tensors)
    first, second = stand_in.launched
    assert (first.cluster, second.cluster, second.grid, second.threads) == (1, 1, (6, 1, 1), 256)
    assert first.arguments == second.arguments
    assert first.arguments["workspace"] != 0
    assert first.arguments["num_splits"] == 4


def test_blocks_that_share_k_form_a_cluster(stand_in):
    tensors = tensors_of(1, 4096, 64, 128)
    assert pick_config(problem_of(tensors)).cluster > 1
    multiply(tensors)
    assert stand_in.launched[0].cluster == stand_in.launched[0].grid[0] == pick_config(problem_of(tensors)).num_splits


def test_older_gpus_know_no_clusters_and_no_overlap(monkeypatch):
    stand_in = StandIn(monkeypatch, capability=(8, 0), multiprocessors=108)
    multiply(tensors_of(64, 512, 384, 128))
    assert {(each.cluster, each.overlaps) for each in stand_in.launched} == {(1, 0)}


def test_a_repack_is_handed_its_arguments(stand_in):
    packed = torch.zeros(1024, 64, dtype=torch.int32)[:, :16]
    out = ops._repack_cuda(packed, 4)
    (launched,) = stand_in.launched
    assert launched.grid == (2, 1, 1)
    expected = {"awq": packed.data_ptr(), "marlin": out.data_ptr(), "size_k": 1024, "size_n": 128, "awq_stride": 64}
    assert launched.arguments == expected


def block_of(tokens, *, ids=torch.int32, shares=torch.float32, **options):
    block = random_block(8, 256, 128, (64, 128), **options)
    topk_ids, weights = random_routing(tokens, 2, 8, dtype=ids)
    hidden = random_rows(tokens, block.w13)
    return BlockTensors(
        hidden, *block.arguments, topk_ids, weights.to(shares), block.w13.bias, block.w2.bias, block.activation, 4
    )


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_the_kernels_of_a_block_of_experts_hand_on_what_they_write(stand_in, tokens, ids):
    block = block_of(tokens, ids=ids, has_bias=True)
    out = experts_ops._block_cuda(*block)
    plan, _ = plan_block(block)
    launched = list(stand_in.launched)
    routing = {"topk_ids": block.topk_ids.data_ptr(), "has_long_ids": int(ids == torch.int64)}
    work = 0
    if plan.has_list:
        listing = launched.pop(0).arguments
        work = listing["work"]
        expected = {"topk_weights": block.topk_weights.data_ptr(), "num_pairs": 2 * tokens, "num_experts": 8}
        expected |= dict.fromkeys(("tall", "middle", "low"), plan.heights[0])
        assert listing.items() >= (routing | expected).items()
    first, second, *rest = (each.arguments for each in launched)
    for product, name in ((first, "w13"), (second, "w2")):
        weights = {part: getattr(block, f"{name}_{part}") for part in ("qweight", "scales", "qzeros", "bias")}
        strides = {f"{part}_expert": each.stride(0) for part, each in weights.items()}
        strides |= {f"{part}_stride": each.stride(1) for part, each in weights.items() if part != "bias"}
        common = {"work": work, "num_pairs": 2 * tokens, "top_k": 2, "num_experts": 8}
        common["topk_weights"] = block.topk_weights.data_ptr()
        addresses = {part: each.data_ptr() for part, each in weights.items()}
        assert product.items() >= (routing | common | addresses | strides).items()
    sizes = ("a_pairs", "size_n", "size_k", "group_size", "reads_early", "a_stride")
    assert [first[each] for each in sizes] == [2, 256, 256, 64, 0, 256]
    assert [second[each] for each in sizes] == [1, 256, 128, 128, 1, 128]
    assert first["a"] == block.hidden.data_ptr()
    assert second["a"] == first["out"]
    pieces = [(first["out"], 2 * tokens * 128 * 2)]
    if rest:
        (summing,) = rest
        pieces.append((second["out"], 2 * tokens * 256 * 2))
        expected = {"rows": second["out"], "out": out.data_ptr(), "num_tokens": tokens, "top_k": 2, "size_n": 256}
        assert summing.items() >= (routing | expected).items()
    else:
        assert (tokens, second["out"]) == (1, out.data_ptr())
    if work:
        pieces.append((work, 4 * (4 + 4 * listing["max_items"] + 2 * 2 * tokens)))
    pieces.sort()
    assert all(start % 16 == 0 for start, _ in pieces)
    assert all(start + size <= later for (start, size), (later, _) in itertools.pairwise(pieces))


def test_weights_of_choices_are_handed_over_as_numbers_of_32_bits(stand_in):
    block = block_of(3, shares=torch.float16)
    experts_ops._block_cuda(*block)
    assert stand_in.launched[-2].arguments["topk_weights"] not in (0, block.topk_weights.data_ptr())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("has_weights", [False, True])
def test_a_grouped_product_is_handed_its_arguments(stand_in, tokens, has_weights):
    block = block_of(tokens)
    shares = block.topk_weights if has_weights else None
    out = experts_ops._gemm_cuda(block.hidden, *block[1:4], block.topk_ids, shares, None, 4)
    product = stand_in.launched[-1].arguments
    expected = {"a": block.hidden.data_ptr(), "qweight": block.w13_qweight.data_ptr(), "bias": 0, "bias_expert": 0}
    expected |= {"topk_weights": shares.data_ptr() if has_weights else 0, "out": out.data_ptr(), "reads_early": 0}
    assert product.items() >= expected.items()
    assert out.shape == (tokens, 2, 256)
    assert len(stand_in.launched) == 1 + (tokens == 40)


# ---- refused however often it went well ----------------------------------------------------------------------


def misplaced(tensor):
    """Returns the same numbers in memory that begins between the steps of a load, whatever the offset says."""
    from numpy import frombuffer

    memory = torch.from_numpy(frombuffer(bytearray(tensor.nbytes + 32), dtype="uint8"))
    start = -memory.data_ptr() % 16 + tensor.itemsize
    part = torch.from_dlpack(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
    assert (part.data_ptr() % 16, part.storage_offset()) == (tensor.itemsize, 0)
    return part


def wrong_calls(tensors):
    a, qweight, scales, qzeros, _, _ = tensors
    wide = torch.zeros(a.shape[0], 4 * a.shape[1], dtype=a.dtype)
    return [
        (tensors._replace(a=a.bfloat16()), TypeError, "scales must be torch.bfloat16"),
        (tensors._replace(a=a[:, :128]), ValueError, r"qweight must have the shape \[128/16, N"),
        (tensors._replace(a=wide[:, ::4]), ValueError, "a must have a last stride of 1"),
        (tensors._replace(a=wide[:, 4 : 4 + a.shape[1]]), ValueError, "a must have a row stride and an offset"),
        (tensors._replace(a=misplaced(a)), ValueError, "a must begin at a multiple of 16 bytes"),
        (tensors._replace(scales=misplaced(scales)), ValueError, "scales must begin at a multiple of 16 bytes"),
        (tensors._replace(qweight=qweight.float()), TypeError, "qweight must be torch.int32"),
        (tensors._replace(qweight=qweight.to("meta")), ValueError, "qweight must be on the device of a, cpu"),
        (tensors._replace(qweight=qweight.t()), ValueError, "qweight must have"),
        (tensors._replace(scales=scales[:, :64]), ValueError, "scales must have the shape"),
        (tensors._replace(qzeros=qzeros[:1]), ValueError, "qzeros must have the shape"),
        (tensors._replace(bias=torch.zeros(64, dtype=a.dtype)), ValueError, "bias must have the shape"),
        (tensors._replace(bias=torch.zeros(384)), TypeError, "bias must be torch.float16"),
        (tensors._replace(num_bits=8), ValueError, "must have the shape"),
        (tensors._replace(num_bits=5), ValueError, "5"),
    ]


@pytest.mark.parametrize("size_m", [3, 512])
def test_a_wrong_call_is_refused_between_right_ones(stand_in, size_m):
    tensors = tensors_of(size_m, 512, 384, 128)
    for wrong, error, message in wrong_calls(tensors):
        multiply(tensors)
        before = len(stand_in.launched)
        for _ in range(2):
            with pytest.raises(error, match=message):
                multiply(wrong)
        assert len(stand_in.launched) == before
    multiply(tensors)


def test_what_a_refusal_of_a_layout_says_to_do_helps(stand_in):
    tensors = tensors_of(3, 512, 384, 128)
    for name in ("a", "qweight", "scales", "qzeros"):
        tensor = getattr(tensors, name)
        rows, columns = tensor.shape
        wide = torch.zeros(rows, 2 * columns + 2, dtype=tensor.dtype)
        wrong = [misplaced(tensor), wide[:, :columns], wide.flatten()[2:][: rows * columns].view(rows, columns)]
        for each in (*wrong, wide[:, : 2 * columns : 2], torch.zeros(columns, rows, dtype=tensor.dtype).t()):
            with pytest.raises(ValueError, match=f"^{name} must") as refused:
                multiply(tensors._replace(**{name: each}))
            method = re.search(rf"{name}\.(clone|contiguous)\(\)", str(refused.value))[1]
            multiply(tensors._replace(**{name: getattr(each, method)()}))
            assert stand_in.launched[-1].arguments["qweight_stride"] == 768


def test_a_tensor_that_changes_under_its_name_is_looked_at_anew(stand_in):
    tensors = tensors_of(3, 512, 384, 128)
    multiply(tensors)
    qweight, right = tensors.qweight, tensors.qweight.data
    for wrong in (right[:16], right.float(), right.t(), right[:, 2:770]):
        qweight.data = wrong
        with pytest.raises((TypeError, ValueError), match="qweight must"):
            multiply(tensors)
    qweight.data = right
    tensors.scales.resize_(2, 384)
    with pytest.raises(ValueError, match="scales must have the shape"):
        multiply(tensors)
    assert len(stand_in.launched) == 1


def test_experts_are_refused_between_right_calls(stand_in):
    block = block_of(3)
    out = torch.empty_like(block.hidden)
    for change, message in (
        ({"topk_ids": block.topk_ids.float()}, "topk_ids must be"),
        ({"topk_ids": block.topk_ids[:2]}, "topk_weights must have the shape"),
        ({"hidden": misplaced(block.hidden)}, "hidden must begin at a multiple of 16 bytes"),
        ({"w2_scales": misplaced(block.w2_scales)}, "w2_scales must begin at a multiple of 16 bytes"),
        ({"w2_qzeros": block.w2_qzeros[:4]}, "w2_qzeros must have the shape"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"num_bits": 8}, "w13_scales must have the shape"),
    ):
        experts_ops._block_cuda(*block)
        experts_ops._block_into_cuda(*block, out)
        before = len(stand_in.launched)
        wrong = block._replace(**change)
        for call, arguments in ((experts_ops._block_cuda, wrong), (experts_ops._block_into_cuda, (*wrong, out))):
            with pytest.raises((TypeError, ValueError), match=f"^{message}"):
                call(*arguments)
        assert len(stand_in.launched) == before
    for wrong_out, message in ((misplaced(out), "out must begin"), (out.t(), "out must"), (out.float(), "out must be")):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            experts_ops._block_into_cuda(*block, wrong_out)
    gemm = ExpertTensors(block.hidden, *block[1:4], block.topk_ids)
    experts_ops._gemm_cuda(*gemm)
    with pytest.raises(ValueError, match=r"^a must begin at a multiple of 16 bytes"):
        experts_ops._gemm_cuda(*gemm._replace(a=misplaced(gemm.a)))
    with pytest.raises(ValueError, match=r"^qweight must have"):
        experts_ops._gemm_cuda(*gemm._replace(qweight=gemm.qweight[:, :8]))


def test_what_is_remembered_of_a_call_keeps_no_tensor_alive(stand_in):  # noqa: ARG001 - it stands in for the driver
    kept = []

    def call(function, *arguments):
        results = function(*arguments)
        kept.extend(weakref.ref(each) for each in (*arguments, results) if torch.is_tensor(each))

    def call_all():
        tensors, block = tensors_of(300, 512, 384, 128, has_bias=True), block_of(40)
        for a in (tensors.a, tensors.a[:0]):
            call(ops._gemm_cuda, a, *tensors[1:])
        call(experts_ops._block_into_cuda, *block, torch.empty_like(block.hidden))
        call(experts_ops._gemm_cuda, block.hidden, *block[1:4], block.topk_ids, block.topk_weights, None, 4)

    gc.disable()
    try:
        call_all()
        assert len(kept) > 20
        assert [each for each in kept if each() is not None] == []
    finally:
        gc.enable()


def test_autograd_knows_that_a_block_wrote_into_a_tensor(stand_in):  # noqa: ARG001 - it stands in for the driver
    block, factor = block_of(3), torch.ones(3, 256, dtype=torch.float16, requires_grad=True)
    out = torch.empty_like(block.hidden)
    product = (out * factor).sum()
    experts_ops._block_into_cuda(*block, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        experts_ops._block_into_cuda(*block, torch.empty_like(out))


def test_slices_whose_memory_begins_anywhere_they_may_are_taken(stand_in):
    layer = random_layer(512, 448, 128, has_bias=True)
    cut = slice(64, 448)
    tensors = GemmTensors(
        random_tokens(3, layer),
        layer.qweight[:, 128:],
        layer.scales[:, cut],
        layer.qzeros[:, 8:],
        layer.bias[4:388],  # 8 bytes on
    )
    assert tensors.bias.data_ptr() % 16
    multiply(tensors)
    assert stand_in.launched[0].arguments["bias"] == tensors.bias.data_ptr()


def test_no_tokens_launch_nothing(stand_in):
    tensors = tensors_of(1, 512, 384, 128)
    assert multiply(tensors._replace(a=tensors.a[:0])).shape == (0, 384)
    block = block_of(1)
    none = block._replace(hidden=block.hidden[:0], topk_ids=block.topk_ids[:0], topk_weights=block.topk_weights[:0])
    assert experts_ops._block_cuda(*none).shape == (0, 256)
    assert experts_ops._gemm_cuda(none.hidden, *none[1:4], none.topk_ids, None, None, 4).shape == (0, 2, 256)
    with pytest.raises(ValueError, match="qzeros must have the shape"):
        multiply(tensors._replace(a=tensors.a[:0], qzeros=tensors.qzeros[:1]))
    assert not stand_in.launched


# ---- launches -------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing(stand_in):  # noqa: ARG001 - it stands in for the driver
    """A kernel that does nothing."""
    source = KernelSource("nothing", f"void {ENTRY_POINT}(const u16* a, u16* b, int n, i64 stride) {{}}")
    blocks = Blocks((7, 5, 3), 96, 7, 4096, overlaps=True)
    return PreparedKernel(source, driver.device_of(0), blocks, 0, 2, (-3, -(1 << 40)))


def test_a_prepared_kernel_says_all_of_a_launch(stand_in, nothing):
    for addresses in ((1 << 47, 0), (3, (1 << 64) - 1)):
        nothing(*addresses)
        launched = stand_in.launched[-1]
        assert launched[:7] == ("nothing", (7, 5, 3), 96, 4096, 7, 1, STREAM)
        assert launched.arguments == {"a": addresses[0], "b": addresses[1], "n": -3, "stride": -(1 << 40)}


def test_threads_that_launch_at_once_do_not_mix_their_arguments(stand_in, nothing):
    everybody_is_here = threading.Barrier(4, timeout=30)
    read = stand_in._read

    def read_late(*arguments):
        everybody_is_here.wait()  # all have written their addresses, and none has been read
        return read(*arguments)

    stand_in._read = read_late
    for _ in range(3):
        threads = [threading.Thread(target=nothing, args=(i, 10 * i)) for i in range(1, 5)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        found = sorted((each.arguments["a"], each.arguments["b"]) for each in stand_in.launched[-4:])
        assert found == [(1, 10), (2, 20), (3, 30), (4, 40)]


def test_a_launch_that_the_driver_refuses_says_so_and_the_next_one_works(stand_in, nothing):
    good = stand_in.answer
    stand_in.answer = type(good).CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    with pytest.raises(KernelUnavailableError, match="CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        nothing(1, 2)
    stand_in.answer = good
    nothing(3, 4)
    assert [each.arguments["a"] for each in stand_in.launched] == [3]


def test_the_device_of_the_tensors_is_made_current_for_a_launch(stand_in, nothing, monkeypatch):
    current = [1]

    class Switched:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Switched)
    monkeypatch.setattr(driver, "_stream_of", lambda index: 100 * index + current[-1])
    nothing(1, 2)
    assert [each.stream for each in stand_in.launched] == [0]
    assert current == [1]


# ---- the way through PyTorch's dispatcher ---------------------------------------------------------------------


def test_a_compiler_sees_a_call_on_a_gpu():
    with FakeTensorMode():
        a = torch.empty(3, 256, dtype=torch.float16, device="cuda")
        qweight = torch.empty(16, 256, dtype=torch.int32, device="cuda")
        scales = torch.empty(2, 128, dtype=torch.float16, device="cuda")
        out = ops.marlin_gemm(a, qweight, scales)
        assert (out.shape, out.device.type) == ((3, 128), "cuda")
        with pytest.raises(ValueError, match="scales must have the shape"):
            ops.marlin_gemm(a, qweight, torch.empty(2, 64, dtype=torch.float16, device="cuda"))


@pytest.fixture(scope="module")
def double():
    """An operator that is registered on the CPU as ours are on a GPU, and how often each of its two ways was gone."""
    name, ways = "awq2marlin_tests::double", {"calls": 0, "at once": 0}
    torch.library.define(name, "(Tensor a, Tensor? b, int factor) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, lambda a, *_: a.new_empty(a.shape))
    torch.library.register_autograd(name, lambda _, grad: (2 * grad, None, None))

    def run(a, b, factor):
        ways["calls"] += 1
        ways["at once"] += not torch._C._dispatch_tls_is_dispatch_key_excluded(
            torch._C.DispatchKey.AutogradFunctionality
        )
        assert (b, factor) == (None, 2)
        assert not a.is_neg()
        return torch.from_numpy(a.detach().numpy() * factor)

    dispatch.run_on("CPU", name, run, "double")

    def call(a):
        before = dict(ways)
        out = torch.ops.awq2marlin_tests.double.default(a, None, 2)
        return out, ways["calls"] - before["calls"], ways["at once"] - before["at once"]

    return call


class EveryCall(TorchDispatchMode):
    def __init__(self):
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **kwargs or {})


@pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="PyTorch 2.10 brought the short way")
def test_calls_that_need_no_gradient_go_straight_to_the_kernel(double):
    a, differentiable = torch.rand(3), torch.rand(3, requires_grad=True)
    for tensor in (a, torch.nn.Parameter(a, requires_grad=False)):
        out, *ways = double(tensor)
        assert torch.equal(out, 2 * a)
        assert ways == [1, 1]
    for no_gradient in (torch.no_grad, torch.inference_mode):
        with no_gradient():
            out, *ways = double(differentiable)
        assert torch.equal(out, 2 * differentiable)
        assert (ways[0], out.requires_grad) == (1, False)


def test_whoever_wants_to_see_a_call_sees_it(double):
    a, differentiable = torch.rand(3), torch.rand(3, requires_grad=True)
    out, *ways = double(differentiable)
    out.sum().backward()
    assert (ways, differentiable.grad.tolist()) == ([1, 0], [2, 2, 2])
    out, *ways = double(torch._neg_view(a))
    assert torch.equal(out, -2 * a)
    assert ways == [1, 0]
    with EveryCall() as mode:
        _, *ways = double(a)
    assert torch.ops.awq2marlin_tests.double.default in mode.seen
    assert ways == [1, 0]
    with FakeTensorMode() as fake:
        out, *ways = double(fake.from_tensor(a))
    assert (type(out), ways) == (FakeTensor, [0, 0])
    assert torch.equal(torch.vmap(lambda row: double(row)[0])(torch.ones(2, 3)), torch.full((2, 3), 2.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, when torch.func loads its rules
def test_a_tangent_is_refused_and_not_lost(double):
    a = torch.rand(3)
    with pytest.raises(NotImplementedError, match=r"^double has no derivatives in forward mode"):
        torch.func.jvp(lambda a: double(a)[0], (a,), (a,))
    with forward_ad.dual_level():
        assert torch.equal(double(a)[0], 2 * a)  # it has none
