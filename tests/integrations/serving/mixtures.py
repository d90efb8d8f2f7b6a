"""Mixtures of experts for the tests of every engine, and what one expert holds."""

import numpy as np

from tests.equality import assert_identical
from tests.integrations.serving.harness import expert_values, refusal  # noqa: F401 - tests of experts take it from here

PREFIX = "mlp.experts"
COUNT, HIDDEN, INNER = 4, 256, 512
#: Hidden and inner size of experts whose inner size Marlin cannot take as it is.
UNALIGNED = (128, 96)


def modules(hidden=HIDDEN, inner=INNER, count=COUNT):
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {f"{PREFIX}.{expert}.{name}": size for expert in range(count) for name, size in sizes.items()}


def make_model(harness, folder, bits=4, group_size=128, has_qzeros=True, sizes=(HIDDEN, INNER), extra=(), **options):
    options = {"bits": bits, "group_size": group_size, "has_qzeros": has_qzeros, **options}
    return harness.Model(folder, {**modules(*sizes), **dict(extra)}, **options)


def layer_of(experts, model, rank=0, ranks=1, sizes=(HIDDEN, INNER), **options):
    return experts.experts_layer(model, PREFIX, COUNT, *sizes, rank, ranks, **options)


def padded(values, rows, columns):
    return None if values is None else np.pad(values, ((0, rows - len(values)), (0, columns - values.shape[1])))


def assert_expert_holds(harness, layer, model, expert, rank, ranks, local=None):
    """Fails unless one expert holds its share of the source's values, and zeros where it is padded."""
    bits, group_size = model.recipe.bits, model.recipe.group_size
    gate, up, down = (model.values(f"{PREFIX}.{expert}.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
    local = expert if local is None else local
    inner = layer.w2_qweight.shape[1] * 16  # with padding
    halves = [
        tuple(
            padded(each, len(each), inner) if each is not None else None for each in harness.columns(half, rank, ranks)
        )
        for half in (gate, up)
    ]
    w2_rows = harness.rows(down, group_size, rank, ranks)
    groups = layer.w2_scales.shape[1]
    w2 = tuple(
        padded(each, size, down[0].shape[1]) for each, size in zip(w2_rows, (inner, groups, groups), strict=True)
    )
    for group, wanted in (("w13", harness.side_by_side(*halves)), ("w2", w2)):
        found = expert_values(layer, group, local, bits)
        for name, values, expected in zip("qzs", found, wanted, strict=True):
            if expected is None:
                assert values is None
            else:
                assert_identical(values, expected, f"{group} {name} of expert {expert}")
