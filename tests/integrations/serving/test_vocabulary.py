"""A quantized output embedding, whose vocabulary engines pad: a rank holds its part, and zeros behind it."""

import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.serving.plugins import problem_of


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
def test_a_quantized_output_embedding_is_repacked(harness, tmp_path, rank, ranks):
    model = harness.Model(tmp_path, {"lm_head": (128, 256), "a.down_proj": (128, 64)}, group_size=64)
    head = harness.output_embedding(model, 256, 128, rank, ranks)
    harness.load(head, model, {None: "lm_head"})
    harness.finish(head)
    harness.assert_holds(head, model, harness.columns(model.values("lm_head"), rank, ranks))


@pytest.mark.parametrize("kind", [(4, 64, True), (4, 64, False), (8, -1, False), (8, 64, True)], ids=str)
@pytest.mark.parametrize(("entries", "ranks"), [(200, 1), (200, 2), (72, 4), (1000, 8)])
def test_a_vocabulary_is_padded_as_engines_pad_it(harness, tmp_path, kind, entries, ranks):
    """72 entries are padded to 128, 32 on each of 4 ranks: the third has 8 of them, the last has none."""
    bits, group_size, has_qzeros = kind
    modules = {"lm_head": (128, entries), "a.down_proj": (128, 64)}
    model = harness.Model(tmp_path, modules, bits=bits, group_size=group_size, has_qzeros=has_qzeros, heads=(8, 8))
    width = (entries + 63) // 64 * 64 // ranks
    for rank in range(ranks):
        head = harness.output_embedding(model, entries, 128, rank, ranks)
        for part in head.quant_method.parts:
            getattr(head, part).data.fill_(-1)  # what is allocated may hold anything
        harness.load(head, model, {None: "lm_head"})
        harness.finish(head)
        mine = slice(rank * width, (rank + 1) * width)
        expected = [None if each is None else each[:, mine] for each in model.values("lm_head")]
        harness.assert_holds(head, model, expected)
        assert head.scales.shape[1] == (width + 63) // 64 * 64


def test_another_vocabulary_than_the_model_s_is_refused(harness, tmp_path):
    model = harness.Model(tmp_path, {"lm_head": (128, 192), "a.down_proj": (128, 64)}, group_size=64)
    problem = problem_of(harness.load, harness.output_embedding(model, 256, 128), model, {None: "lm_head"})
    assert (problem.code, problem.tensor) == ("wrong-shape", "lm_head")
    assert problem.message == "it has 192 columns, but the vocabulary of the model has 256 entries"


@given(
    entries=st.integers(1, 40),
    ranks=st.sampled_from([1, 2, 4, 8]),
    kind=st.sampled_from([(4, 64, True), (4, 64, False), (4, -1, True), (8, 64, True), (8, -1, False)]),
)
@settings(max_examples=25, deadline=None)
def test_the_parts_of_all_ranks_are_the_vocabulary(harness, entries, ranks, kind):
    """Of any size that a source can hold, down to one word: every column once, in order, and zeros behind the last."""
    bits, group_size, has_qzeros = kind
    entries *= 32 // bits
    with tempfile.TemporaryDirectory() as folder:
        modules = {"lm_head": (128, entries), "a.down_proj": (128, 64)}
        options = {"bits": bits, "group_size": group_size, "has_qzeros": has_qzeros, "heads": (8, 8)}
        model = harness.Model(Path(folder), modules, **options)
    width, parts = (entries + 63) // 64 * 64 // ranks, []
    for rank in range(ranks):
        head = harness.output_embedding(model, entries, 128, rank, ranks)
        harness.load(head, model, {None: "lm_head"})
        harness.finish(head)
        values = harness.loaded_values(head, bits, group_size)
        assert not any(array is not None and array[:, width:].any() for array in values)
        parts.append([None if array is None else array[:, :width] for array in values])
    for found, wanted in zip(zip(*parts, strict=True), model.values("lm_head"), strict=True):
        if wanted is None:
            assert set(found) == {None}
            continue
        whole = np.concatenate(found, axis=1)
        np.testing.assert_array_equal(whole[: len(wanted), :entries], wanted)
        assert not whole[:, entries:].any()
        assert not whole[len(wanted) :].any()


def test_ranks_that_would_cut_a_word_of_the_vocabulary_are_refused(harness, tmp_path):
    model = harness.Model(tmp_path, {"lm_head": (128, 64), "a.down_proj": (128, 64)}, group_size=64, heads=(16, 16))
    problem = problem_of(harness.output_embedding, model, 64, 128, 3, 16)
    assert (problem.code, problem.tensor) == ("unsupported-engine", "lm_head")
    assert problem.message.startswith("4 columns on one rank are not a multiple of 8")


@pytest.mark.parametrize(
    ("module", "is_tied"),
    [("lm_head", False), ("language_model.output", False), ("model.layers.0.output", True), ("visual.output", True)],
)
def test_a_model_whose_config_ties_a_quantized_output_embedding_loads_it(harness, tmp_path, caplog, module, is_tied):
    model = harness.Model(tmp_path, {module: (128, 96), "a.down_proj": (128, 64)}, group_size=64)
    whole, text, free = (SimpleNamespace(tie_word_embeddings=tied) for tied in (True, True, False))
    model.config.untie(logging.getLogger("test"), whole, text, free, SimpleNamespace())
    assert [each.tie_word_embeddings for each in (whole, text, free)] == [is_tied, is_tied, False]
    assert len(caplog.records) == (0 if is_tied else 1)
