"""Loading in Transformers: the logits of the dense model that the AWQ tensors mean, in every kind of model."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, core_model_loading
from transformers.core_model_loading import Chunk, WeightConverter

from awq2marlin import convert, demo
from awq2marlin.errors import CheckpointError, UnavailableError
from awq2marlin.gemm.linear import MarlinLinear
from awq2marlin.integrations.transformers import MarlinNativeConfig, names, versions
from awq2marlin.integrations.transformers.experts import MarlinExperts
from awq2marlin.integrations.transformers.versions import check_version
from tests.integrations.transformers.checkpoints import Format, quantize, read_tensors, write_dense, write_tensors
from tests.integrations.transformers.conftest import ARCHITECTURES, Case
from tests.skips import HAS_GPU

MakeCase = Callable[..., Case]

FORMATS = {
    "8 bits": Format(bits=8),
    "one group": Format(group_size=-1),
    "no zero points": Format(zero_point=False),
    "bf16": Format(scales=torch.bfloat16, others=torch.bfloat16),
    "groups of 32, shards": Format(group_size=32, shards=3),
}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens.to(model.device)).logits.float().cpu()


def assert_as_exact_as_dense(case: Case, tokens: torch.Tensor, dtype: torch.dtype = torch.float16) -> None:
    """Both models compute in ``dtype``; the fp32 one, whose weights are exact, says how far that leads away.

    The dense model's weights are rounded to ``dtype`` too, ours are not: so ours may be no farther away, but for the
    luck of the roundings. Twice its distance is the bound.
    """
    exact, dense = logits(case.load_dense(), tokens), logits(case.load_dense(dtype=dtype), tokens)
    found = logits(case.load(), tokens)
    assert found.dtype == exact.dtype
    bound = 2 * (dense - exact).abs().max()
    assert 0 < bound < 0.3 * exact.std()
    assert (found - exact).abs().max() <= bound
    best = exact.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * bound
    assert clear.float().mean() > 0.25
    assert torch.equal(found.argmax(-1)[clear], exact.argmax(-1)[clear])


def packed_layers(model: torch.nn.Module) -> dict[str, MarlinLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, MarlinLinear)}


# --- every kind of model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_the_logits_of_the_dense_model(make_case: MakeCase, prompt: torch.Tensor, architecture: str) -> None:
    assert_as_exact_as_dense(make_case(architecture), prompt)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_gives_them_in_every_format(make_case: MakeCase, prompt: torch.Tensor, form: Format) -> None:
    assert_as_exact_as_dense(make_case("llama", form), prompt, form.others)


def test_gives_them_where_modules_are_padded(make_case: MakeCase, prompt: torch.Tensor) -> None:
    case = make_case("unaligned", unaligned="pad")
    document = json.loads((case.marlin / "config.json").read_text("utf-8"))["quantization_config"]
    assert document["padded_modules"]["model.layers.0.self_attn.q_proj"] == [192, 192]
    layer = packed_layers(case.load())["model.layers.0.self_attn.q_proj"]
    assert (layer.in_features, layer.padded_k, layer.padded_n) == (192, 192, 256)
    assert_as_exact_as_dense(case, prompt)


def test_what_the_demonstration_keeps_can_be_loaded(tmp_path: Path) -> None:
    demo(tmp_path / "shown")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shown" / "marlin"), torch.tensor([[5, 2, 3]]))
    assert found.shape == (1, 3, 4096)
    assert found.isfinite().all()


def test_every_quantized_layer_is_packed_and_frozen(make_case: MakeCase) -> None:
    model = make_case("qwen2 tied").load()
    layers = packed_layers(model)
    assert len(layers) == 2 * 7
    assert layers["model.layers.1.self_attn.k_proj"].bias is not None
    assert not any(parameter.requires_grad for layer in layers.values() for parameter in layer.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_quantized_output_embedding_is_loaded_though_the_config_ties_it(
    make_case: MakeCase, prompt: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    awq = make_case("llama").awq
    tensors, config = read_tensors(awq), json.loads((awq / "config.json").read_text("utf-8"))
    head = quantize(tensors.pop("lm_head.weight"), Format())
    tensors |= {f"lm_head.{part}": tensor for part, tensor in head.items()}
    write_tensors(tmp_path / "untied", tensors, config)
    write_tensors(tmp_path / "tied", tensors, {**config, "tie_word_embeddings": True})
    convert(tmp_path / "tied", tmp_path / "marlin", verify="none")
    case = Case(tmp_path / "tied", tmp_path / "marlin", write_dense(tmp_path / "dense", tmp_path / "untied"))
    assert_as_exact_as_dense(case, prompt)
    assert "the checkpoint has a quantized lm_head, which is used" in caplog.text
    model = case.load()
    model.tie_weights()
    assert isinstance(model.lm_head, MarlinLinear)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not again.config.tie_word_embeddings
    assert torch.equal(logits(again, prompt), logits(model, prompt))


def test_modules_kept_in_awq_layout_are_repacked_and_padded(make_case: MakeCase) -> None:
    case = make_case("unaligned")
    layer = packed_layers(case.load())["model.layers.0.self_attn.k_proj"]
    assert read_tensors(case.marlin)["model.layers.0.self_attn.k_proj.qweight"].shape == (192, 96 // 8)
    assert (layer.out_features, layer.padded_k, layer.padded_n) == (96, 192, 128)
    assert layer.qweight.shape == (192 // 16, 128 * 16 // 8)


@pytest.mark.parametrize(("architecture", "name"), [("mixtral", "w1"), ("qwen3 moe", "gate_proj")])
def test_experts_stay_packed_under_the_names_of_the_file(make_case: MakeCase, architecture: str, name: str) -> None:
    experts = make_case(architecture).load().model.layers[1].mlp.experts
    assert isinstance(experts, MarlinExperts)
    assert experts.roles["gate"] == name
    assert f"3.{name}.qweight" in experts.state_dict()
    assert sum(parameter.nbytes for parameter in experts.parameters()) < 4 * 3 * 128 * 256  # one byte a weight


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2 moe"])
def test_experts_give_what_those_of_the_dense_model_give(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture)
    packed, dense = (model.model.layers[0].mlp.experts for model in (case.load(), case.load_dense()))
    hidden = torch.randn(9, 128, generator=torch.Generator().manual_seed(2)).half()
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 3], [3, 0], [2, 3], [0, 2], [2, 0], [3, 2]])  # nobody asks for 1
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, exact = packed(hidden, chosen, weights.half()), dense(hidden.float(), chosen, weights.half().float())
    assert found.dtype == torch.float16
    # Three roundings to fp16 on the way (2^-11 each), of values no larger than the largest sum of products.
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=2**-8 * exact.abs().max().item())
    assert torch.equal(packed(hidden, chosen, weights.half()), found)


def test_modules_that_are_not_quantized_are_left_alone(
    make_case: MakeCase, prompt: torch.Tensor, tmp_path: Path
) -> None:
    case = make_case("llama")
    tensors, dense = read_tensors(case.awq), read_tensors(case.dense)
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"model.layers.1.mlp.down_proj.{part}"]
    tensors["model.layers.1.mlp.down_proj.weight"] = dense["model.layers.1.mlp.down_proj.weight"].half()
    awq = write_tensors(tmp_path / "awq", tensors, json.loads((case.awq / "config.json").read_text("utf-8")))
    convert(awq, tmp_path / "marlin", verify="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "marlin")
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert len(packed_layers(model)) == 13
    assert torch.allclose(logits(model, prompt), logits(case.load(), prompt), atol=0.01)


def test_the_base_model_loads_from_the_checkpoint_of_the_whole(make_case: MakeCase, prompt: torch.Tensor) -> None:
    case = make_case("llama")
    base, whole = AutoModel.from_pretrained(case.marlin), case.load()
    with torch.no_grad():
        assert torch.equal(base(prompt).last_hidden_state, whole.model(prompt).last_hidden_state)


# --- types and devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_another_type_rounds_the_scales_and_says_so(
    make_case: MakeCase, prompt: torch.Tensor, caplog: pytest.LogCaptureFixture, architecture: str
) -> None:
    case = make_case(architecture)
    model = case.load(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.int32}
    assert "scales are torch.float16 in the files and are rounded to torch.bfloat16" in caplog.text
    exact = logits(case.load_dense(), prompt)
    assert (logits(model, prompt) - exact).abs().max() < 0.1 * exact.std()


def test_a_mixed_checkpoint_takes_the_type_of_its_config(make_case: MakeCase, prompt: torch.Tensor) -> None:
    case = make_case("llama", Format(scales=torch.float16, others=torch.bfloat16))
    model = case.load()
    assert model.dtype == torch.bfloat16
    assert packed_layers(model)["model.layers.0.mlp.up_proj"].scales.dtype == torch.bfloat16
    exact = logits(case.load_dense(), prompt)
    assert (logits(model, prompt) - exact).abs().max() < 0.1 * exact.std()


def test_device_maps_on_a_cpu(make_case: MakeCase, prompt: torch.Tensor) -> None:
    case = make_case("unaligned")
    expected = logits(case.load(), prompt)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert torch.equal(logits(case.load(device_map=device_map), prompt), expected)


def test_layers_can_be_offloaded_to_the_disk(make_case: MakeCase, prompt: torch.Tensor, tmp_path: Path) -> None:
    case = make_case("unaligned")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = case.load(device_map=device_map, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.up_proj.qweight.is_meta
    assert torch.equal(logits(model, prompt), logits(case.load(), prompt))


# --- torch.compile and generation ---------------------------------------------------------------------------


def test_compiles_as_a_whole(make_case: MakeCase, prompt: torch.Tensor) -> None:
    model = make_case("unaligned").load()
    expected = logits(model, prompt)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(prompt).logits.float(), expected)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2 moe"])
def test_experts_compile_as_a_whole(make_case: MakeCase, prompt: torch.Tensor, architecture: str) -> None:
    model = make_case(architecture).load(device_map="cpu")
    expected = logits(model, prompt)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(prompt).logits.float(), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
def test_experts_that_need_gradients_compile_with_a_break(make_case: MakeCase, prompt: torch.Tensor) -> None:
    model = make_case("mixtral").load()
    expected = model(prompt).logits
    assert torch.equal(torch.compile(model, backend="eager")(prompt).logits, expected)


@pytest.mark.parametrize("architecture", ["unaligned", "qwen3 moe"])
def test_generates_the_dense_model_s_tokens(make_case: MakeCase, prompt: torch.Tensor, architecture: str) -> None:
    case = make_case(architecture)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = case.load().generate(prompt[:1], attention_mask=torch.ones_like(prompt[:1]), **options)
    expected = case.load_dense().generate(prompt[:1], attention_mask=torch.ones_like(prompt[:1]), **options)
    assert torch.equal(found, expected)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def broken(make_case: MakeCase, tmp_path: Path) -> Callable[..., Path]:
    """Copies a converted checkpoint without some tensors."""

    def make(architecture: str, *missing: str) -> Path:
        shutil.copytree(make_case(architecture).marlin, tmp_path / "broken")
        path = tmp_path / "broken" / "model.safetensors"
        tensors = load_file(path)
        for name in missing:
            del tensors[name]
        save_file(tensors, path, {"format": "pt"})
        return tmp_path / "broken"

    return make


MISSING = [
    ("llama", "model.layers.0.mlp.up_proj.scales"),
    ("llama", "model.layers.0.mlp.up_proj.qweight"),
    ("llama", "model.layers.1.input_layernorm.weight"),
    ("llama", "lm_head.weight"),
    ("qwen2 tied", "model.layers.0.self_attn.q_proj.bias"),
    ("qwen2 tied", "model.embed_tokens.weight"),
    ("unaligned", "model.layers.0.self_attn.k_proj.qzeros"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.qzeros"),
]


@pytest.mark.parametrize(("architecture", "name"), MISSING)
def test_a_missing_tensor_is_named(broken: Callable[..., Path], architecture: str, name: str) -> None:
    folder = broken(architecture, name)
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert name in [problem.tensor for problem in caught.value.problems]


@pytest.mark.parametrize("architecture", ["llama", "unaligned", "mixtral"])
def test_a_whole_module_that_is_missing_is_named(broken: Callable[..., Path], architecture: str) -> None:
    place = {"mixtral": "block_sparse_moe.experts.2.w3"}.get(architecture, "self_attn.k_proj")
    module = f"model.layers.1.{place}"
    folder = broken(architecture, *(f"{module}.{part}" for part in ("qweight", "qzeros", "scales")))
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S*(k_proj|experts\.2\.w3)"):
        AutoModelForCausalLM.from_pretrained(folder)


def with_activation(source: Path, target: Path, name: str) -> Path:
    """A copy of a checkpoint whose config names another activation."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "hidden_act": name}))
    return target


@pytest.mark.parametrize(
    ("activation", "is_apart"), [("gelu_pytorch_tanh", False), ("relu2", True), ("quick_gelu", True)]
)
def test_experts_of_other_activations_are_right_and_slow_ones_are_told_once(
    make_case: MakeCase,
    prompt: torch.Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    activation: str,
    is_apart: bool,
) -> None:
    case = make_case("mixtral")
    folders = (with_activation(getattr(case, kind), tmp_path / kind, activation) for kind in ("awq", "marlin", "dense"))
    case = Case(*folders)
    assert_as_exact_as_dense(case, prompt)
    told = [record.getMessage() for record in caplog.records if "one after" in record.getMessage()]
    expected = "experts are computed one after the other, which is slower: their activation is neither SiLU nor GELU"
    assert told == [expected] * is_apart


@pytest.mark.parametrize(("activation", "tensor"), [("prelu", "act_fn.weight"), ("xielu", "act_fn.alpha_p")])
def test_experts_whose_activation_was_learned_are_refused(
    make_case: MakeCase, tmp_path: Path, activation: str, tensor: str
) -> None:
    folder = with_activation(make_case("mixtral").marlin, tmp_path / "other", activation)
    with pytest.raises(CheckpointError, match=rf"experts\.0\.\w+: the experts of MixtralExperts also have .*{tensor}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_expert_of_another_size_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    shutil.copytree(make_case("mixtral").marlin, tmp_path / "other")
    path, expert = tmp_path / "other" / "model.safetensors", "model.layers.1.block_sparse_moe.experts.2"
    tensors = load_file(path)
    for part in ("qweight", "qzeros", "scales"):
        tensors[f"{expert}.w1.{part}"] = tensors[f"{expert}.w2.{part}"].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1: the file has K=256, N=128, .* has K=128, N=256"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")


def test_more_experts_than_the_model_has_are_refused(make_case: MakeCase, tmp_path: Path) -> None:
    shutil.copytree(make_case("mixtral").marlin, tmp_path / "other")
    path, experts = tmp_path / "other" / "model.safetensors", "model.layers.1.block_sparse_moe.experts"
    tensors = load_file(path)
    for part in ("qweight", "qzeros", "scales"):
        tensors[f"{experts}.7.w1.{part}"] = tensors[f"{experts}.2.w1.{part}"].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.7\.w1: the model's \S+ has 4 experts, numbered from 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")


def test_a_module_of_another_size_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    shutil.copytree(make_case("llama").marlin, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"intermediate_size": 256', '"intermediate_size": 384'))
    with pytest.raises(CheckpointError, match=r"the file has K=128, N=256, the model's \S+gate_proj has K=128, N=384"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")


def test_fp32_is_refused(make_case: MakeCase) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.float32, but Marlin kernels take float16 and bfloat16"):
        make_case("llama").load(dtype=torch.float32)


def test_a_loaded_model_is_not_cast_to_fp32(make_case: MakeCase) -> None:
    model = make_case("llama").load()
    for cast in (lambda: model.to(torch.float32), lambda: model.to(dtype=torch.float32), model.double):
        with pytest.raises(TypeError, match=r"must be torch\.float16 or torch\.bfloat16"):
            cast()


def test_devices_without_kernels_are_refused(make_case: MakeCase) -> None:
    with pytest.raises(UnavailableError, match="device_map names mps; Marlin kernels run on CUDA GPUs"):
        make_case("llama").load(device_map={"": "mps"})


@pytest.mark.skipif(torch.cuda.is_available(), reason=HAS_GPU)
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(make_case: MakeCase) -> None:
    from awq2marlin import KernelUnavailableError

    with pytest.raises(KernelUnavailableError, match="cannot run on a GPU here"):
        make_case("llama").load(device_map="cuda")


def test_tensor_parallelism_is_refused(make_case: MakeCase) -> None:
    config = AutoConfig.from_pretrained(make_case("llama").marlin)
    config.distributed_config = object()
    with pytest.raises(CheckpointError, match="cannot be cut for tensor parallelism here; use device_map"):
        AutoModelForCausalLM.from_pretrained(make_case("llama").marlin, config=config)


def test_a_layer_that_the_model_s_code_splits_is_refused_by_name(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = WeightConverter(r"mlp\.up_proj\.weight", [r"mlp.up_proj.weight", r"mlp.gate_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda _: [split])
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj: this model's code joins or splits it into "
    ) as caught:
        make_case("llama").load()
    assert [problem.code for problem in caught.value.problems] == ["unsupported-model"] * 2


def test_a_state_dict_is_refused(make_case: MakeCase) -> None:
    case = make_case("llama")
    model, config = case.load(), AutoConfig.from_pretrained(case.marlin)
    with pytest.raises(CheckpointError, match="from safetensors files only"):
        type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def test_a_newer_format_is_refused(make_case: MakeCase) -> None:
    document = json.loads((make_case("llama").marlin / "config.json").read_text("utf-8"))["quantization_config"]
    assert MarlinNativeConfig(**document).to_dict() == document
    with pytest.raises(CheckpointError, match="format_version is 2"):
        MarlinNativeConfig(**{**document, "format_version": 2})


@pytest.mark.parametrize("found", ["4.57.6", "5.16.1", "5.dev0"])
def test_older_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(versions, "version", lambda _: found)
    with pytest.raises(ImportError, match=rf"{found} is installed, but this loader needs a version from 5\.17 on"):
        check_version()


@pytest.mark.parametrize("found", ["5.17.0", "5.20.1", "5.23.0", "5.24.0", "5.24.3.dev0"])
def test_versions_that_were_tried_are_taken_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: str
) -> None:
    monkeypatch.setattr(versions, "version", lambda _: found)
    check_version()
    assert caplog.records == []


@pytest.mark.parametrize("found", ["5.25.0", "5.100.0", "6.0.0.dev0"])
def test_a_version_never_tried_is_taken_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: str
) -> None:
    monkeypatch.setattr(versions, "version", lambda _: found)
    check_version()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"Transformers {found} has all that this loader uses, but it was never tried with it; 5.17 to 5.24 were"
    )


def test_what_a_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(source_key: str, weight_converters: Any, weight_renamings: Any, base_model_prefix: Any) -> None:
        """Lacks a parameter."""

    def swapped(weight_conversions: Any, method: Any) -> None:
        """Has them in another order."""

    monkeypatch.setattr(core_model_loading, "rename_source_key", renamed)
    monkeypatch.delattr(core_model_loading.ConversionOps, "reverse_op")
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(ImportError) as caught:
        check_version()
    assert (
        "this loader needs transformers.conversion_mapping, transformers.core_model_loading.ConversionOps.reverse_op, "
        "transformers.core_model_loading.rename_source_key(meta_state_dict). Versions 5.17 to 5.24 have all of it"
    ) in str(caught.value)
    monkeypatch.setattr(core_model_loading, "rename_source_key", swapped)
    said = list(versions.lacks_of("core_model_loading", "rename_source_key", ("method", "weight_conversions")))
    assert said == ["transformers.core_model_loading.rename_source_key(method, weight_conversions), in this order"]


def test_all_that_is_imported_of_transformers_is_asked_for() -> None:
    """A name that is not asked for would end in a traceback where a version lacks it."""
    asked = {(f"transformers.{module}", name.partition(".")[0]) for module, name, _ in versions.NEEDED}
    imported = {
        (node.module, each.name)
        for path in Path(versions.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
        for each in node.names
    }
    assert imported
    assert imported <= asked


def test_no_transformers_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def version(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(ImportError, match=r"not installed; .* pip install '\.\[transformers\]'"):
        check_version()


def test_copies_and_weights_that_do_not_count_change_nothing(make_case: MakeCase, tmp_path: Path) -> None:
    """A shard that was taken over: a norm that stands in both files, and the dense weight of a quantized module."""
    case = make_case("llama", Format(shards=2))
    source = Path(shutil.copytree(case.awq, tmp_path / "awq"))
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    first, last = sorted({*document["weight_map"].values()})
    name = "model.layers.0.self_attn.q_proj"
    held = load_file(source / first)
    norm = next(each for each, shard in document["weight_map"].items() if "norm" in each and shard == last)
    held[norm] = load_file(source / last)[norm].clone()
    held[f"{name}.weight"] = torch.zeros(128, 128, dtype=torch.float16)
    save_file(held, source / first, {"format": "pt"})
    convert(source, tmp_path / "marlin")
    tokens = torch.arange(8).reshape(1, -1)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "marlin", dtype=torch.float16)(tokens).logits
    assert torch.equal(found, case.load(dtype=torch.float16)(tokens).logits)
