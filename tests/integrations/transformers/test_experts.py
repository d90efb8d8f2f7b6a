"""`MarlinExperts`: all experts at once where the operator applies, one by one elsewhere; tensors that stay views."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from awq2marlin.gemm.linear import MarlinLinear
from awq2marlin.integrations.transformers import experts as module
from awq2marlin.integrations.transformers.experts import MarlinExperts, activation_of

ROLES = {"gate": "w1", "up": "w3", "down": "w2"}


def linear(size_k: int, size_n: int, seed: int, dtype: torch.dtype, **options: Any) -> MarlinLinear:
    layer = MarlinLinear(size_k, size_n, num_bits=4, group_size=64, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if name in ("qweight", "qzeros"):
            words = torch.randint(-(2**31), 2**31, parameter.shape, generator=generator, dtype=torch.int32)
            parameter.data.copy_(words)
        else:
            parameter.data.copy_((torch.rand(parameter.shape, generator=generator) + 0.5) / 50)
    return layer


def random_experts(
    dtype: torch.dtype = torch.float16, number: int = 4, activation: str | None = "silu", **options: Any
) -> MarlinExperts:
    sizes = {"w1": (128, 192), "w3": (128, 192), "w2": (192, 128)}
    layers = {
        e: {name: linear(*size, 10 * e + i, dtype, **options) for i, (name, size) in enumerate(sizes.items())}
        for e in range(number)
    }

    def activate(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    return MarlinExperts(layers, ROLES, activate, activation)


def call(tokens: int = 5, top_k: int = 2, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(tokens, 128, generator=generator).to(dtype)
    weights, chosen = torch.rand(tokens, 4, generator=generator).softmax(-1).topk(top_k)
    return hidden, chosen, weights


def spied(experts: MarlinExperts, *arguments: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The result, and how often all experts were computed at once for it."""
    with mock.patch.object(module, "marlin_experts", wraps=module.marlin_experts) as spy:
        out = experts(*arguments)
    return out, spy.call_count


def storages(experts: MarlinExperts) -> int:
    """Bytes of all memory behind the parameters and the stack."""
    tensors = [*experts.parameters(), *(each for each in experts._stack or () if each is not None)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_all_at_once_is_what_they_are_one_by_one(dtype: torch.dtype) -> None:
    experts, arguments = random_experts(dtype), call(dtype=dtype)
    single = experts._one_by_one(*arguments).double()
    with torch.no_grad():
        for weights in (arguments[2], arguments[2].to(dtype), arguments[2].double()):
            for chosen in (arguments[1], arguments[1].int(), arguments[1].short()):
                out, count = spied(experts, arguments[0], chosen, weights)
                assert count == 1
                assert out.dtype == dtype
                tolerance = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(out.double(), single, rtol=tolerance, atol=tolerance * single.abs().max())


def test_experts_lie_in_one_tensor_and_take_no_memory_twice() -> None:
    experts = random_experts()
    before, expected = storages(experts), {name: each.clone() for name, each in experts.state_dict().items()}
    experts.stack()
    assert experts._stack is not None
    assert storages(experts) == before
    assert experts._stack.w13_qweight.shape == (4, 128 // 16, 2 * 192 * 2)
    assert experts._stack.w2_scales.shape == (4, 3, 128)
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    experts.get_submodule("2.w3").qweight.data.fill_(5)  # type: ignore[operator, union-attr]
    assert (experts._stack.w13_qweight[2, :, 384:] == 5).all()
    assert not (experts._stack.w13_qweight[2, :, :384] == 5).any()


def test_a_gradient_goes_through_the_single_experts() -> None:
    experts, (hidden, chosen, weights) = random_experts().requires_grad_(False), call()
    out, count = spied(experts, hidden.requires_grad_(), chosen, weights)
    assert count == 0
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


CHANGES: dict[str, Callable[[MarlinExperts], MarlinExperts]] = {
    "bfloat16": lambda experts: experts.bfloat16(),
    "to": lambda experts: torch.nn.Sequential(experts).to("cpu")[0],  # type: ignore[return-value]
    "deep copy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda experts: pickle.loads(pickle.dumps(experts)),
    "apart": lambda experts: (experts.unstack(), experts)[1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_becomes_of_experts_computes_with_its_own_tensors(
    change: Callable[[MarlinExperts], MarlinExperts],
) -> None:
    experts = random_experts()
    experts._activate = torch.nn.functional.silu  # a local function cannot be pickled
    experts.stack()
    changed = change(experts)
    arguments = call(dtype=changed.get_submodule("0.w1").scales.dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        before, count = spied(changed, *arguments)
        assert count == 1
        for number in range(4):
            changed.get_submodule(f"{number}.w2").scales.mul_(2)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(spied(changed, *arguments)[0], 2 * before)


def test_tensors_that_are_replaced_are_those_that_count() -> None:
    experts, other, arguments = random_experts(), random_experts(), call()
    experts.stack()
    for name, parameter in other.named_parameters():
        if name.endswith("w2.scales"):
            parameter.data.mul_(2)
    with torch.no_grad():
        expected = 2 * experts(*arguments)
        experts.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(experts(*arguments), expected)
        experts.load_state_dict(random_experts().state_dict())
        torch.testing.assert_close(2 * experts(*arguments), expected)


@pytest.mark.parametrize(
    "options",
    [{"activation": None}, {"bias": True}, {"padded": (256, 192)}, {"number": 1025}],
    ids=["activation", "bias", "padded", "many"],
)
def test_where_the_operator_does_not_apply_experts_are_computed_one_by_one(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    if "padded" in options:
        layers = {0: {"w1": (100, 192), "w3": (100, 192), "w2": (192, 100)}}
        made = {
            name: linear(*size, 1, torch.float16, padded=(128, 192) if name != "w2" else (192, 128))
            for name, size in layers[0].items()
        }
        experts = MarlinExperts({0: made}, ROLES, lambda both: both[:, :192] * both[:, 192:], "silu")
        arguments = (torch.randn(3, 100).half(), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    else:
        if "number" in options:
            monkeypatch.setattr(module, "MAX_EXPERTS", 3)
        experts = random_experts(**{**options, "number": 4})
        arguments = call()
    with torch.no_grad():
        out, count = spied(experts, *arguments)
        assert count == 0
        assert out.shape == arguments[0].shape
        assert torch.equal(out, experts._one_by_one(*arguments))


def test_more_choices_than_the_operator_takes_are_computed_one_by_one() -> None:
    experts = random_experts()
    hidden, _, _ = call()
    chosen, weights = torch.zeros(5, 33, dtype=torch.long), torch.full((5, 33), 1 / 33)
    with torch.no_grad():
        assert spied(experts, hidden, chosen, weights)[1] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", None)],
)
def test_the_model_s_activation_is_known_by_its_kind(name: str, expected: str | None) -> None:
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_local_experts=2, num_experts_per_tok=1, hidden_act=name
    )
    with torch.device("meta"):
        experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
    assert activation_of(experts) == expected
    x = torch.linspace(-4, 4, 33)
    if expected:
        known = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
        function = known.get(expected, lambda each: torch.nn.functional.gelu(each, approximate="tanh"))
        torch.testing.assert_close(ACT2FN[name](x), function(x))

    if expected:

        class SiLU(torch.nn.Module):  # of that name, and of a model's own code
            pass

        experts.act_fn = SiLU()
        assert activation_of(experts) is None

    class Gated(type(experts)):  # type: ignore[misc]
        def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
            return both

    experts.__class__ = Gated
    assert activation_of(experts) is None
