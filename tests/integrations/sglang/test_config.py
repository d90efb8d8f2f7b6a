"""The method as SGLang sees it: found by its entry point, checked before the model is built, renamed with it."""

import json
from contextlib import contextmanager
from unittest import mock

import pytest

from tests.integrations.serving.plugins import problem_of, run_python
from tests.integrations.sglang.test_models import LLAMA, make

pytestmark = pytest.mark.usefixtures("harness")

MODULES = {"model.layers.0.self_attn.q_proj": (192, 192), "model.layers.0.mlp.down_proj": (256, 192)}
CONFIG = "awq2marlin.integrations.sglang.config"


@pytest.fixture
def model(harness, tmp_path):
    return harness.Model(tmp_path, MODULES, group_size=64, heads=(4, 4), with_inventory=False)


@pytest.fixture
def on_a_gpu(harness):
    with harness.on_a_gpu():
        yield


def check(model, place=None, load_format="auto", revision=None, config=()):
    """Checks a checkpoint as the hook does."""
    hf_config = mock.Mock()
    hf_config.to_dict.return_value = dict(config)
    place = mock.Mock(model_path=str(place or model.folder), revision=revision, hf_config=hf_config)
    model.config.check(place, mock.Mock(load_format=load_format, download_dir=None))


# --- registered -------------------------------------------------------------------------------------------


REGISTER = """
import json, sys
from tests.integrations.conftest import NOT_NEEDED, stand_in_for
from transformers import AutoProcessor
stand_in_for(NOT_NEEDED)
import sglang.srt.layers.quantization as quantization
from sglang.srt.model_loader import loader
from sglang.srt.plugins.hook_registry import HookRegistry
from awq2marlin.integrations.sglang import register
before = dict(quantization.QUANTIZATION_METHODS)
seen = set(sys.modules)
register()
register()
HookRegistry.apply_hooks()
ours = quantization.get_quantization_config("marlin_native")
same = all(quantization.QUANTIZATION_METHODS[name] is method for name, method in before.items())
new = [name for name in set(sys.modules) - seen if name.startswith(("awq2marlin", "numba"))]
hooks = sum(len(each) for each in HookRegistry._hooks.values())
print(json.dumps([len(quantization.QUANTIZATION_METHODS) - len(before), same, ours.__name__, hooks, sorted(new)]))
"""


def test_registering_adds_one_method_leaves_the_others_and_is_light():
    more, same, name, hooks, new = json.loads(run_python(REGISTER))
    assert (more, same, name, hooks) == (1, True, "MarlinNativeConfig", 2)
    heavy = {"gemm.linear", "gemm.ops", "layout.torch_functions", "gemm.jit", "integrations.sglang.linear"}
    assert heavy.isdisjoint(each.removeprefix("awq2marlin.") for each in new)
    assert [each for each in new if each.startswith("numba")] == []


def test_a_checkpoint_s_config_is_taken_by_no_other_method_of_sglang(model):
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    document = json.loads((model.folder / "config.json").read_text())["quantization_config"]
    overrides = {name: each.override_quantization_method(document, None) for name, each in QUANTIZATION_METHODS.items()}
    assert {*overrides.values()} == {None}


def test_an_sglang_without_what_the_plugin_needs_refuses_checkpoints_by_name(model, monkeypatch):
    import sglang
    from sglang.srt.layers.quantization import marlin_utils

    from awq2marlin.integrations.sglang.needs import SGLANG

    type(SGLANG).missing_reason.cache_clear()
    monkeypatch.delattr(marlin_utils, "apply_gptq_marlin_linear")
    problem = problem_of(type(model.config).from_config, {"quant_method": "marlin_native"})
    type(SGLANG).missing_reason.cache_clear()
    assert problem.message.startswith(
        f"SGLang {sglang.__version__} lacks what this awq2marlin uses of it: "
        "sglang.srt.layers.quantization.marlin_utils.apply_gptq_marlin_linear. It was tried with 0.5.23; install that"
    )


# --- checked before the model is built --------------------------------------------------------------------


def test_the_config_says_what_it_is(model):
    config = model.config
    assert repr(config) == "MarlinNativeConfig(bits=4, group_size=64, zero_point=True, awq_modules=1)"
    assert (config.get_config_filenames(), config.get_min_capability()) == ([], 80)
    assert [str(dtype) for dtype in config.get_supported_act_dtypes()] == ["torch.float16", "torch.bfloat16"]
    assert config.get_scaled_act_names() == []


def test_sglang_s_loader_checks_a_folder_before_it_builds_the_model(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    made = make(LLAMA, tmp_path)
    (made.folder / "marlin_manifest.json").unlink()
    lost = "model.layers.0.mlp.down_proj.scales"
    from safetensors.torch import load_file, save_file

    tensors = load_file(made.folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, made.folder / "model.safetensors")
    with mock.patch("sglang.srt.models.llama.LlamaModel") as built:
        problem = problem_of(harness.load_model, made.folder)
    assert (problem.tensor, problem.code) == (lost, "missing-tensor")
    assert not built.called


def test_weights_that_sglang_makes_up_need_no_files(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "own")
    made = make(LLAMA, tmp_path)
    (made.folder / "model.safetensors").unlink()
    harness.load_model(made.folder, load_format="dummy")


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("way", "named"), [("auto", "model.layers.0.mlp.down_proj"), ("sharded_state", "")])
def test_8_bits_with_zero_points_are_refused_beforehand_where_ours_may_not_serve_them(
    harness, tmp_path, monkeypatch, way, named
):
    eight = harness.Model(tmp_path, {"model.layers.0.mlp.down_proj": (256, 192)}, bits=8, with_inventory=False)
    check(eight, load_format=way)
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "engine")
    problem = problem_of(check, eight, load_format=way)
    assert (problem.code, problem.tensor) == ("unsupported-engine", named)
    assert "8 bits with zero points: AWQ2MARLIN_KERNEL=engine leaves it to the engine's kernels" in problem.message


@pytest.mark.usefixtures("on_a_gpu")
def test_a_setting_of_the_kernel_that_is_none_is_refused(model, monkeypatch):
    monkeypatch.setenv("AWQ2MARLIN_KERNEL", "fast")
    assert "must be one of auto, own, engine" in problem_of(check, model).message


def test_a_newer_format_is_refused(model):
    document = json.loads((model.folder / "config.json").read_text())["quantization_config"]
    assert problem_of(type(model.config).from_config, {**document, "format_version": 2}).code == "unsupported-format"


def test_a_machine_without_an_nvidia_gpu_is_told_so(model):
    assert "need an NVIDIA GPU" in problem_of(check, model).message


@pytest.mark.usefixtures("on_a_gpu")
def test_deterministic_inference_is_refused(model):
    from sglang.srt.runtime_context import get_exec

    with get_exec().deterministic.override(enable_deterministic_inference=True):
        assert "--enable-deterministic-inference is set" in problem_of(check, model).message


@pytest.mark.usefixtures("on_a_gpu")
def test_a_folder_is_read_before_the_model_is_built(model):
    check(model)
    assert model.config.contents.inventory.zero_point_modules == MODULES.keys()
    (model.folder / "model.safetensors").unlink()
    assert problem_of(check, model).code == "no-weights"


@pytest.mark.usefixtures("on_a_gpu")
def test_the_headers_of_a_repository_are_read_without_its_weights(model, hub):
    files = {path.name: path.read_bytes() for path in model.folder.iterdir()}
    hub.add_repository("org/name", files)
    check(model, "org/name", config={"num_attention_heads": 2})
    assert model.config.contents.inventory.largest_tensor_parallel_size == 2
    assert model.config.contents.inventory.modules == MODULES.keys()


@contextmanager
def offline():
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        yield


@pytest.mark.usefixtures("on_a_gpu")
def test_a_repository_in_the_hub_s_cache_is_read_without_the_hub(model):
    with offline(), mock.patch("huggingface_hub.snapshot_download", return_value=str(model.folder)) as cached:
        check(model, "org/name", revision="main")
    cached.assert_called_once_with("org/name", revision="main", cache_dir=None, local_files_only=True)
    assert model.config.contents.inventory.zero_point_modules == MODULES.keys()


@pytest.mark.usefixtures("on_a_gpu")
def test_a_repository_whose_headers_cannot_be_read_is_loaded_all_the_same(model):
    nothing = mock.patch("huggingface_hub.HfApi.get_safetensors_metadata", side_effect=OSError("no network"))
    with nothing, mock.patch(f"{CONFIG}.logger") as logger:
        check(model, "org/name\x1b[31m")
    (_, name), _ = logger.warning.call_args
    assert name == "org/name\\x1b[31m"
    assert model.config.contents.inventory is None


# --- names of a model of SGLang ---------------------------------------------------------------------------


@pytest.mark.usefixtures("on_a_gpu")
def test_names_of_a_multimodal_model_are_found_whether_it_maps_them_or_not(harness, tmp_path):
    from sglang.srt.models.utils import WeightsMapper

    layer, tower = "model.language_model.layers.0", "model.visual.blocks.0.attn"
    weights = {f"{layer}.mlp.gate.weight": (64, 256), f"{tower}.qkv.weight": (64, 64), f"{tower}.proj.weight": (64, 64)}
    modules = {f"{layer}.self_attn.o_proj": (192, 192), f"{layer}.mlp.down_proj": (256, 192)}
    model = harness.Model(tmp_path, modules, weights=weights, group_size=64, has_qzeros=False)

    def method(prefix, size_k, size_n):
        return harness.build("ColumnParallelLinear", model, prefix, size_k, size_n).quant_method

    def assert_found(prefix):
        assert method(f"{prefix}.self_attn.o_proj", 192, 192).tile == 1
        assert method(f"{prefix}.mlp.down_proj", 256, 192).tile == 16
        assert type(method(f"{prefix}.mlp.gate", 256, 64)).__name__ == "UnquantizedLinearMethod"
        # SGLang's name of the file's "qkv"
        assert type(method("visual.blocks.0.attn.qkv_proj", 64, 64)).__name__ == "UnquantizedLinearMethod"

    assert_found("model.layers.0")
    model.config.apply_weight_name_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": "language."}))
    assert model.config.contents.quantization.awq_modules == {"language.layers.0.self_attn.o_proj"}
    assert model.config.names.find("language.layers.0.mlp.down_proj") == "language.layers.0.mlp.down_proj"
    assert_found("language.layers.0")


def test_what_a_model_joins_is_known_where_it_does_not_say_so(harness, tmp_path):
    model = harness.Model(tmp_path, {"attn.q_a_proj": (256, 192), "attn.kv_a_proj_with_mqa": (256, 192)})
    model.config.packed_modules_mapping = {"model": {"qkv_proj": ["q"]}}  # as one of SGLang's nests it
    assert model.config.parts("attn.fused_qkv_a_proj_with_mqa") == ["attn.q_a_proj", "attn.kv_a_proj_with_mqa"]
    model.config.packed_modules_mapping = {"both": ["q_a_proj", "kv_a_proj_with_mqa"]}
    assert model.config.parts("attn.both") == ["attn.q_a_proj", "attn.kv_a_proj_with_mqa"]
    assert model.config.parts("attn.other") == ["attn.other"]


def test_shared_experts_join_the_others_only_if_all_lie_alike(harness, tmp_path):
    shared = {"model.layers.0.mlp.shared_experts.up_proj": (256, 192)}
    alike = harness.Model(tmp_path, {**MODULES, **shared}, group_size=64)
    assert alike.config.can_fuse_shared_expert()
    kept = harness.Model(tmp_path / "kept", {**MODULES, **dict.fromkeys(shared, (256, 200))}, group_size=64)
    assert not kept.config.can_fuse_shared_expert()


def test_layers_that_are_never_quantized_are_left_alone(harness, model):
    assert model.config.get_quant_method(harness.torch.nn.Embedding(2, 2), "embed") is None
