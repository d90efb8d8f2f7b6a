"""What stops Transformers without our loader: put into a config and taken out again, whatever the config says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq2marlin.checkpoint.config import without_quantization, written_config
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.plain_transformers import WEIGHTS_KEY, is_stop, with_stop, without_stop
from awq2marlin.formats.registry import AWQ_GEMM, MARLIN_NATIVE
from awq2marlin.layout.scheme import Scheme

KEYS = st.sampled_from(["text_config", "thinker_config", "vision_config", "a", WEIGHTS_KEY])
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
CONFIGS = st.recursive(
    st.dictionaries(KEYS, LEAVES), lambda inner: st.dictionaries(KEYS, LEAVES | inner), max_leaves=12
)
QUANTIZATION = Quantization(Scheme(4, 128, True))


def test_a_config_says_what_to_do_where_transformers_looks_for_a_name():
    stopped = with_stop({"a": 1, "text_config": {"b": 2}, "vision_config": {}})
    assert stopped == {
        "a": 1,
        "text_config": {"b": 2, WEIGHTS_KEY: stopped[WEIGHTS_KEY]},
        "vision_config": {},
        WEIGHTS_KEY: (
            "marlin_native: by itself Transformers would leave the quantized weights out and write garbage. Install "
            "the newest awq2marlin, and put 'import awq2marlin.integrations.transformers' before from_pretrained"
        ),
    }


@pytest.mark.parametrize("name", ["other.safetensors", "x.safetensors.index.json", "a] [b.safetensors", "a\nb", ""])
def test_a_name_that_the_source_gives_is_kept_in_the_sentence_and_comes_back(name):
    stopped = with_stop({WEIGHTS_KEY: name, "a": 1})
    assert list(stopped) == [WEIGHTS_KEY, "a"]
    assert not stopped[WEIGHTS_KEY].endswith((".safetensors", ".safetensors.index.json"))
    assert without_stop(stopped) == {WEIGHTS_KEY: name, "a": 1}


def test_what_a_stranger_puts_into_our_sentence_does_no_harm():
    for kept in "[" * 100_000, "", '"a', '"a"] [':
        assert without_stop({"a": 1, WEIGHTS_KEY: f"marlin_native: x [{kept}]"}) == {"a": 1}


@given(CONFIGS)
def test_a_conversion_says_the_same_of_the_model_as_its_source(config):
    converted = written_config(config, MARLIN_NATIVE, QUANTIZATION)
    assert is_stop(converted[WEIGHTS_KEY])
    assert without_quantization(converted) == without_quantization(config)
    assert written_config(converted, MARLIN_NATIVE, QUANTIZATION) == converted
    back = written_config(converted, AWQ_GEMM, QUANTIZATION)
    assert back == written_config(config, AWQ_GEMM, QUANTIZATION)
    assert "marlin_native" not in repr(back)
