"""Our experts in an engine's layers: what they compute on a CPU, which experts they serve, and what is said of it."""

import logging
from unittest import mock

import pytest
from torch.nn.functional import silu

from awq2marlin.errors import KernelUnavailableError
from awq2marlin.integrations.kernel_choice import KERNEL_VARIABLE, KernelChoice
from awq2marlin.integrations.serving.kernels import ExpertsTask, chosen_experts_kernel, run_experts
from tests.integrations.serving.mixtures import COUNT, HIDDEN, PREFIX, UNALIGNED, layer_of, make_model, refusal
from tests.integrations.serving.test_kernels import weight_of

TOKENS, TOP_K = 5, 2


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "own")


def finished(experts, model, *arguments, **options):
    layer = layer_of(experts, model, *arguments, **options)
    experts.load_experts(layer, model, PREFIX)
    experts.finish_experts(layer)
    return layer


def choices(torch, hidden, dtype="half", ids="int32", shares="float32"):
    """Returns tokens, their experts and the weights of these; one token chooses an expert that does not count."""
    generator = torch.Generator().manual_seed(0)
    x = (0.25 * torch.randn(TOKENS, hidden, generator=generator)).to(getattr(torch, dtype))
    topk_ids = torch.stack([torch.randperm(COUNT, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    topk_ids[0, 0] = -1
    topk_weights = torch.rand(TOKENS, TOP_K, generator=generator)
    return x, topk_ids.to(getattr(torch, ids)), topk_weights.to(getattr(torch, shares))


def exact(torch, model, x, topk_ids, topk_weights):
    """Returns the experts' result from the source's values, and how large its terms are, in float64."""
    gates, ups, downs = (
        [torch.from_numpy(weight_of(model, f"{PREFIX}.{expert}.{name}")) for expert in range(COUNT)]
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    out, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, experts, shares) in enumerate(
        zip(x.double(), topk_ids.long(), topk_weights.double(), strict=True)
    ):
        for expert, share in zip(experts.tolist(), shares, strict=True):
            if expert >= 0:
                inner = silu(row @ gates[expert]) * (row @ ups[expert])
                out[token] += share * (inner @ downs[expert])
                size[token] += share * (inner.abs() @ downs[expert].abs())
    return out, size


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "kind", [(4, 128, True), (4, -1, True), (4, 64, False), (8, 32, False), (8, 128, True)], ids=str
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_together_give_the_source_s_result(harness, experts, tmp_path, kind, ranks):
    torch, model = harness.torch, make_model(harness, tmp_path, *kind, heads=(8, 8))
    given = choices(torch, HIDDEN)
    parts = [experts.run_experts(finished(experts, model, rank, ranks), *given) for rank in range(ranks)]
    assert parts[0].dtype == torch.half
    wanted, size = exact(torch, model, *given)
    found = sum(part.double() for part in parts)
    error = (found - wanted).abs()
    assert (error <= torch.finfo(torch.half).eps * (ranks * size + 1e-3)).all()
    assert wanted.abs().max() > 100 * error.max()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("dtype", "ids", "shares"), [("half", "int64", "half"), ("bfloat16", "int32", "float32")])
def test_every_rank_of_expert_parallelism_gives_what_its_experts_add(harness, experts, tmp_path, dtype, ids, shares):
    torch, model = harness.torch, make_model(harness, tmp_path)
    kind = getattr(torch, dtype)
    given = choices(torch, HIDDEN, dtype, ids, shares)
    for rank in range(2):
        found = experts.run_experts(finished(experts, model, rank, apart=2, dtype=kind), *given)
        x, topk_ids, topk_weights = given
        mine = torch.where(topk_ids // (COUNT // 2) == rank, topk_ids, -1)
        wanted, size = exact(torch, model, x, mine, topk_weights)
        assert ((found.double() - wanted).abs() <= torch.finfo(kind).eps * (size + 1e-3)).all()
        assert not found[(mine < 0).all(1)].any()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("unaligned", ["pad", "keep"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_padded_and_recut_experts_give_the_source_s_result(harness, experts, tmp_path, unaligned, ranks):
    """96 inner rows are padded to 128, at 3 ranks 32 to as many as the engine's kernel takes, too."""
    torch = harness.torch
    extra = {"a": (128, 64)} if unaligned == "keep" else {}
    model = make_model(harness, tmp_path, 4, 32, False, UNALIGNED, heads=(3, 3), unaligned=unaligned, extra=extra)
    given = choices(torch, UNALIGNED[0])
    parts = [
        experts.run_experts(finished(experts, model, rank, ranks, sizes=UNALIGNED), *given) for rank in range(ranks)
    ]
    wanted, size = exact(torch, model, *given)
    error = (sum(part.double() for part in parts) - wanted).abs()
    assert (error <= torch.finfo(torch.half).eps * (ranks * size + 1e-3)).all()


# --- which experts ours serve --------------------------------------------------------------------------------


def test_without_a_gpu_the_engine_s_are_taken_unless_ours_are_asked_for(harness, experts, tmp_path, monkeypatch):
    model = make_model(harness, tmp_path)
    assert experts.experts_kernel(finished(experts, model)) == "engine"
    monkeypatch.setenv(KERNEL_VARIABLE, "own")
    harness.kernels.EXPERTS_CHOICE = KernelChoice.of_experts("the engine's", logging.getLogger("test"))
    assert experts.experts_kernel(finished(experts, model)) == "own"


def test_what_a_layer_holds_does_not_depend_on_the_kernel(harness, experts, tmp_path, monkeypatch):
    model = make_model(harness, tmp_path)
    engine_s = finished(experts, model)
    monkeypatch.setenv(KERNEL_VARIABLE, "own")
    harness.kernels.EXPERTS_CHOICE = KernelChoice.of_experts("the engine's", logging.getLogger("test"))
    own_s = finished(experts, model)
    assert [experts.experts_kernel(layer) for layer in (engine_s, own_s)] == ["engine", "own"]
    harness.assert_same(harness.tensors(own_s), harness.tensors(engine_s))


def test_8_bits_with_zero_points_are_ours_whatever_is_chosen(harness, experts, tmp_path):
    assert experts.experts_kernel(finished(experts, make_model(harness, tmp_path, bits=8))) == "own"
    assert harness.kernels.EXPERTS_CHOICE.kernel == "engine"


def test_8_bits_with_zero_points_are_refused_if_ours_may_not_be_taken(harness, experts, tmp_path, monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "engine")
    (problem,) = refusal(layer_of, experts, make_model(harness, tmp_path, bits=8))
    assert problem.tensor == PREFIX
    assert "Marlin experts do not support: AWQ2MARLIN_KERNEL=engine leaves it" in problem.message


def test_8_bits_with_zero_points_need_our_compiler(harness, experts, tmp_path):
    model, why = make_model(harness, tmp_path, bits=8), KernelUnavailableError("NVRTC cannot be loaded.")
    report = mock.patch.object(KernelChoice, "_report", side_effect=why)
    with report, pytest.raises(KernelUnavailableError, match="NVRTC cannot be loaded"):
        finished(experts, model)


def test_kernels_are_got_ready_before_graphs_are_captured(monkeypatch):
    """On a GPU: every kernel that the layer may need, for its tensors and as many experts as a token chooses."""
    place = "awq2marlin.integrations.serving.kernels"
    monkeypatch.setattr(f"{place}.torch.cuda.get_device_capability", lambda _: (9, 0))
    warm_up = mock.Mock()
    monkeypatch.setattr(f"{place}.warm_up_experts", warm_up)
    names = ("w13_qweight", "w13_scales", "w13_qzeros", "w2_qweight", "w2_scales")
    layer = mock.Mock(spec=names, **{name: mock.Mock(device=mock.Mock(type="cuda")) for name in names})
    choice = KernelChoice.of_experts("the engine's", logging.getLogger("test"))
    assert chosen_experts_kernel(choice, layer, 4, PLAIN, only_own=False) == "own"
    weights = [getattr(layer, name) for name in names]
    warm_up.assert_called_once_with(*weights, None, top_k=8, activation="silu", num_bits=4)


PLAIN = ExpertsTask("silu", True, False, 8, 128)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_gated": False}, "with a gate only"),
        ({"activation": "swigluoai"}, "does not compute the activation 'swigluoai'"),
        ({"has_limits": True}, "an activation with limits or factors"),
        ({"has_lora": True}, "does not support LoRA adapters on experts"),
        ({"is_sent": True}, "tokens that are sent between GPUs"),
        ({"is_summed": False}, "which this model needs separately"),
        ({"top_k": 33}, "at most 32 experts per token, this model has 33"),
        ({"num_experts": 1025}, "at most 1024 experts, this rank has 1025"),
    ],
)
def test_what_ours_cannot_is_left_to_the_engine_and_said_once(caplog, monkeypatch, changes, said):
    caplog.set_level("INFO")
    assert PLAIN.reason_without_own() is None
    reason = PLAIN._replace(**changes).reason_without_own()
    assert said in reason
    choice = KernelChoice.of_experts("vLLM's Marlin", logging.getLogger("test"))
    assert [choice.leave(reason) for _ in range(3)] == ["engine"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"experts in Marlin layout run on vLLM's Marlin: {reason}"
    ]
    assert caplog.records[0].levelname == "INFO"
    monkeypatch.setenv(KERNEL_VARIABLE, "own")
    KernelChoice.of_experts("vLLM's Marlin", logging.getLogger("test")).leave(reason)
    assert caplog.records[1].levelname == "WARNING", "it was asked for"


def test_numbers_of_experts_of_other_ranks_count_for_nothing(harness):
    torch = harness.torch
    ids = torch.tensor([[0, 3], [-1, 2]], dtype=torch.int16)
    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    with mock.patch("awq2marlin.integrations.serving.kernels.marlin_experts") as ours:
        run_experts((None,) * 6, torch.zeros(2, 64).half(), ids, torch.zeros(2, 2).double(), expert_map=expert_map)
    *_, given, weights = ours.call_args.args
    assert given.tolist() == [[-1, 1], [-1, 0]]
    assert weights.dtype == torch.float32
