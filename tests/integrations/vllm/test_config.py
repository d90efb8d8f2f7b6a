"""The method as vLLM sees it: registered by its entry point, checked before the model is built, renamed with it."""

import json
from unittest import mock

import pytest
from transformers import LlamaConfig

import awq2marlin
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from tests.integrations.serving.plugins import problem_of, run_python

pytestmark = pytest.mark.usefixtures("harness")

MODULES = {"model.layers.0.self_attn.q_proj": (192, 192), "model.layers.0.mlp.down_proj": (256, 192)}


@pytest.fixture
def model(harness, tmp_path):
    return harness.Model(tmp_path, MODULES, group_size=64, heads=(4, 4), with_inventory=False)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Makes vLLM believe that it has a GPU."""
    from vllm import platforms

    monkeypatch.setattr(type(platforms.current_platform), "is_cuda", lambda _: True)


# --- read -------------------------------------------------------------------------------------------------


def test_what_stops_plain_transformers_is_nothing_to_vllm(tmp_path):
    from vllm.transformers_utils.config import get_config, get_safetensors_params_metadata

    write_checkpoint(tmp_path / "awq", Recipe(MODULES, group_size=64, shards=2, config={"model_type": "llama"}))
    awq2marlin.convert(tmp_path / "awq", tmp_path / "marlin")
    config = get_config(str(tmp_path / "marlin"), trust_remote_code=False)
    assert config.transformers_weights.startswith("marlin_native: ")
    assert config.quantization_config["quant_method"] == "marlin_native"
    source, headers = (get_safetensors_params_metadata(str(tmp_path / name)) for name in ("awq", "marlin"))
    assert headers
    assert headers.keys() == source.keys()


# --- registered -------------------------------------------------------------------------------------------


REGISTER = """
import json, sys
import vllm.model_executor.layers.quantization as quantization
from awq2marlin.integrations.vllm import register
others = [name for name in ("auto_awq", "gptq_marlin", "fp8") if name in quantization.QUANTIZATION_METHODS]
before = {name: quantization.get_quantization_config(name) for name in others}
seen = set(sys.modules)
register()
register()
after = {name: quantization.get_quantization_config(name) for name in before}
ours = quantization.get_quantization_config("marlin_native")
new = [name for name in set(sys.modules) - seen if name.startswith(("awq2marlin", "vllm", "torch", "numba"))]
registered = [len(before), before == after, ours.__name__, ours.get_name(), sorted(new)]

import vllm.model_executor.layers.quantization.utils.marlin_utils as utils
del utils.apply_gptq_marlin_linear
try:
    ours.from_config({"quant_method": "marlin_native"})
except Exception as error:
    print(json.dumps([registered, str(error)]))
"""


@pytest.fixture(scope="module")
def registered():
    """What a process says that registers us, and then loses a function of vLLM: importing that takes seconds."""
    return json.loads(run_python(REGISTER))


def test_registering_adds_one_method_leaves_the_others_and_is_light(registered):
    count, same, name, method, new = registered[0]
    assert (same, name, method) == (True, "MarlinNativeConfig", "marlin_native")
    assert count >= 2
    assert "awq2marlin.integrations.vllm.config" in new
    heavy = {
        "gemm.linear",
        "gemm.ops",
        "layout.torch_functions",
        "gemm.jit",
        "integrations.vllm.linear",
        "integrations.vllm.experts",
    }
    assert heavy.isdisjoint(each.removeprefix("awq2marlin.") for each in new)
    assert [each for each in new if each.startswith(("vllm.model_executor.layers.fused_moe", "numba"))] == []


def test_a_vllm_without_what_the_plugin_needs_refuses_checkpoints_by_name(registered):
    import vllm

    said = registered[1]
    assert said.startswith(
        f"config.json: vLLM {vllm.__version__} lacks what this awq2marlin uses of it: "
        "vllm.model_executor.layers.quantization.utils.marlin_utils.apply_gptq_marlin_linear. It was tried with"
    )


# --- checked before the model is built --------------------------------------------------------------------


def test_the_config_says_what_it_is(model):
    config = model.config
    assert repr(config) == "MarlinNativeConfig(bits=4, group_size=64, zero_point=True, awq_modules=1)"
    assert (config.get_config_filenames(), config.get_min_capability()) == ([], 75)
    assert [str(dtype) for dtype in config.get_supported_act_dtypes()] == ["torch.float16", "torch.bfloat16"]


@pytest.mark.usefixtures("on_a_gpu")
def test_8_bits_with_zero_points_are_refused_beforehand_where_ours_may_not_serve_them(harness, tmp_path, monkeypatch):
    eight = harness.Model(tmp_path, {"model.layers.0.mlp.down_proj": (256, 192)}, bits=8, with_inventory=False)
    eight.config.maybe_update_config(str(eight.folder))
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "engine")
    problem = problem_of(eight.config.maybe_update_config, str(eight.folder))
    assert (problem.code, problem.tensor) == ("unsupported-engine", "model.layers.0.mlp.down_proj")
    assert "8 bits with zero points: AWQ2MARLIN_KERNEL=engine leaves it to the engine's kernels" in problem.message


@pytest.mark.usefixtures("on_a_gpu")
def test_a_setting_of_the_kernel_that_is_none_is_refused(model, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "fast")
    assert "must be one of auto, own, engine" in problem_of(model.config.maybe_update_config, str(model.folder)).message


def test_a_newer_format_is_refused(model):
    document = json.loads((model.folder / "config.json").read_text())["quantization_config"]
    assert problem_of(type(model.config).from_config, {**document, "format_version": 2}).code == "unsupported-format"


def test_a_machine_without_an_nvidia_gpu_is_told_so(model):
    assert "need an NVIDIA GPU" in problem_of(model.config.maybe_update_config, str(model.folder)).message


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("name", "value"), [("VLLM_MARLIN_INPUT_DTYPE", "int8"), ("VLLM_BATCH_INVARIANT", "1")])
def test_settings_that_would_read_the_weights_wrongly_are_refused(model, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    problem = problem_of(model.config.maybe_update_config, str(model.folder))
    assert problem.code == "unsupported-engine"
    assert f"{name} is set" in problem.message
    assert "Unset it" in problem.message


@pytest.mark.usefixtures("on_a_gpu")
def test_a_folder_is_read_before_the_model_is_built(model):
    model.config.maybe_update_config(str(model.folder))
    assert model.config.contents.inventory.zero_point_modules == MODULES.keys()
    (model.folder / "model.safetensors").unlink()
    assert problem_of(model.config.maybe_update_config, str(model.folder)).code == "no-weights"


@pytest.mark.usefixtures("on_a_gpu")
def test_a_quantized_output_embedding_is_loaded_though_the_config_says_that_there_is_none(harness, tmp_path):
    made = harness.Model(tmp_path, {**MODULES, "lm_head": (192, 256)}, group_size=64, with_inventory=False)
    config = LlamaConfig(tie_word_embeddings=True)
    made.config.maybe_update_config(str(made.folder), hf_config=config)
    assert not config.tie_word_embeddings


HUB = "vllm.transformers_utils.config.get_safetensors_params_metadata"
METADATA = "vllm.transformers_utils.config.try_get_safetensors_metadata"


@pytest.mark.usefixtures("on_a_gpu")
def test_the_headers_of_a_repository_are_read_through_vllm(model):
    dtypes = {"torch.int32": "I32", "torch.float16": "F16"}
    headers = {
        name: {"dtype": dtypes[str(tensor.dtype)], "shape": list(tensor.shape)} for name, tensor in model.marlin.items()
    }
    config = mock.Mock()
    config.to_dict.return_value = {"num_attention_heads": 2}
    with mock.patch(HUB, return_value=headers) as read:
        model.config.maybe_update_config("org/name", hf_config=config, revision="main")
    read.assert_called_once_with("org/name", revision="main")
    assert model.config.contents.inventory.largest_tensor_parallel_size == 2
    del headers["model.layers.0.mlp.down_proj.scales"]
    with mock.patch(HUB, return_value=headers):
        problem = problem_of(model.config.maybe_update_config, "org/name")
    assert (problem.tensor, problem.code) == ("model.layers.0.mlp.down_proj.scales", "missing-tensor")


@pytest.mark.usefixtures("on_a_gpu")
def test_a_repository_in_the_hub_s_cache_is_read_without_the_hub(model):
    cached = mock.patch("vllm.transformers_utils.config.hf_api")
    with mock.patch(METADATA, return_value=None), cached as hub:
        hub.return_value.list_repo_files.side_effect = OSError("no network")
        hub.return_value.snapshot_download.return_value = str(model.folder)
        model.config.maybe_update_config("org/name")
    assert model.config.contents.inventory.zero_point_modules == MODULES.keys()


@pytest.mark.usefixtures("on_a_gpu")
def test_a_repository_whose_headers_cannot_be_read_is_loaded_all_the_same(model):
    with mock.patch(HUB, return_value={}), mock.patch("awq2marlin.integrations.vllm.config.logger") as logger:
        model.config.maybe_update_config("org/name\x1b[31m")
    (_, name), _ = logger.warning.call_args
    assert name == "org/name\\x1b[31m"
    assert model.config.contents.inventory is None


# --- names of a model of vLLM -----------------------------------------------------------------------------


def test_names_of_a_multimodal_model_are_mapped_in_all_lists(harness, tmp_path):
    from vllm.model_executor.models.utils import WeightsMapper

    weights = {"model.layers.0.mlp.gate.weight": (64, 256), "visual.proj.weight": (64, 64)}
    modules = {**MODULES, "model.layers.0.self_attn.o_proj": (192, 192)}
    model = harness.Model(tmp_path, modules, weights=weights, group_size=64, has_qzeros=False)
    model.config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.": "language_model.model.", "visual.": None})
    )
    said = model.config.contents.quantization
    layer = "language_model.model.layers.0"
    assert said.awq_modules == {f"{layer}.self_attn.q_proj", f"{layer}.self_attn.o_proj"}
    assert said.unquantized_modules == {f"{layer}.mlp.gate"}

    def method(prefix, size_k, size_n):
        return harness.build("ColumnParallelLinear", model, f"{layer}.{prefix}", size_k, size_n).quant_method

    assert method("self_attn.o_proj", 192, 192).tile == 1
    assert method("mlp.down_proj", 256, 192).tile == 16
    assert type(method("mlp.gate", 256, 64)).__name__ == "UnquantizedLinearMethod"


def test_layers_that_are_never_quantized_are_left_alone(harness, model):
    assert model.config.get_quant_method(harness.torch.nn.Embedding(2, 2), "embed") is None
