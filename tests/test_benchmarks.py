"""The scripts of benchmarks/ that need no GPU, on small made-up inputs."""

import contextlib
import datetime
import importlib
import itertools
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from awq2marlin import convert, inspect, verify
from awq2marlin.layout import reference
from tests.gemm.gemm_cases import random_layer, random_tokens

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

RUN = {
    "ready_seconds": 21.5,
    "read_seconds": 2.25,
    "process_seconds": 0.75,
    "gpu_peak_mib": 7168.0,
    "gpu_reserved_peak_mib": 8192.0,
    "gpu_after_mib": 5120.0,
    "host_anonymous_peak_mib": 3072.0,
    "host_anonymous_after_mib": 2048.0,
}


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_layers_are_counted_by_their_method_and_what_it_names(script):
    class Linear: ...

    class Marlin: ...

    class Experts: ...

    def layer(scheme=None, **named):
        method = Linear()
        vars(method).update(named)
        return SimpleNamespace(quant_method=method, scheme=scheme)

    with_experts = SimpleNamespace(fused_experts=Experts())
    modules = [
        SimpleNamespace(),
        SimpleNamespace(quant_method=None),
        layer(),
        layer(kernel=Marlin()),
        layer(kernel=Marlin(), moe_kernel=None),
        layer(experts_cls=Experts),
        layer(kernel=Marlin(), moe_kernel=with_experts),
        layer(scheme=Marlin()),
    ]
    counted = script("record").kinds_of_layers(SimpleNamespace(modules=lambda: modules))
    assert counted == {"Linear": 1, "Linear Marlin": 3, "Linear Experts": 2}


def test_the_load_chart_is_drawn_and_its_table_holds_the_figures(tmp_path):
    vllm = {"engine": "vllm", "awq": RUN, "marlin": {**RUN, "process_seconds": 0.0625, "gpu_reserved_peak_mib": 5632.0}}
    transformers = {"engine": "transformers", "awq": {"error": "GPTQModel is missing"}, "marlin": RUN}
    results, chart = tmp_path / "load.json", tmp_path / "load.png"
    results.write_text(json.dumps({"rows": [vllm, transformers]}))
    command = [sys.executable, str(FOLDER / "load_chart.py"), str(results), "--output", str(chart)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert chart.stat().st_size > 10_000
    lines = done.stdout.splitlines()
    assert lines[2] == "| vLLM | AWQ source | 21.50 | 2.25 | 0.75 | 7.00 | 8.00 | 5.00 | 3.00 | 2.00 |"
    assert lines[3] == "| vLLM | converted | 21.50 | 2.25 | 0.06 | 7.00 | 5.50 | 5.00 | 3.00 | 2.00 |"
    assert lines[4].startswith("| Transformers | AWQ source | not run: GPTQModel is missing |")


def test_the_picture_in_the_readme_is_that_of_the_stored_result(script):
    row = json.loads((FOLDER / "results" / "serving_h200.json").read_text("utf-8"))["rows"][0]
    drawn = script("serving_chart").draw(row)
    assert (FOLDER.parent / "docs" / "serving_h200.svg").read_text("utf-8") == drawn
    rates = row["engines"]["converted"]["decode_tokens_per_s"]
    assert all(f">{each['median']:.0f}</text>" in drawn for each in rates.values())


def test_random_models_convert_and_their_dequantized_form_is_what_the_oracle_says(tmp_path, script):
    random_models, dense_models = script("random_models"), script("dense_models")
    model = random_models.Model(128, 256, 1, 2, 1, 64, experts=2, group_size=64)
    size = random_models.write_model(tmp_path / "awq", model)
    assert size < inspect(tmp_path / "awq").bytes
    result = convert(tmp_path / "awq", tmp_path / "marlin")
    assert len(result.converted) == 10
    verify(tmp_path / "awq", tmp_path / "marlin")

    import torch
    from safetensors.numpy import load_file

    dense_models.dequantize(tmp_path / "awq", tmp_path / "dense", torch.float16)
    awq = load_file(tmp_path / "awq" / "model-00001.safetensors")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    q = reference.unpack_awq(awq[f"{module}.qweight"].view(np.uint32), 4).astype(np.float32)
    z = reference.unpack_awq(awq[f"{module}.qzeros"].view(np.uint32), 4).repeat(64, axis=0)
    weight = ((q - z) * awq[f"{module}.scales"].astype(np.float32).repeat(64, axis=0)).T.astype(np.float16)
    np.testing.assert_array_equal(dense[f"{module}.weight"], weight)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float16"
    assert {each.dtype for each in dense.values()} == {np.dtype(np.float16)}


def test_a_random_mixture_of_experts_of_qwen3_converts_whole(tmp_path, script):
    random_models = script("random_models")
    model = random_models.Model(128, 128, 1, 4, 2, 64, experts=3, top_k=3, head_size=64, group_size=64)
    random_models.write_model(tmp_path / "awq", model)
    result = convert(tmp_path / "awq", tmp_path / "marlin", verify="all")
    assert (len(result.converted), len(result.kept)) == (4 + 3 * 3, 0)
    with safe_open(tmp_path / "awq" / "model-00001.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dictionary
    assert shapes["model.layers.0.self_attn.o_proj.qweight"] == [4 * 64, 128 // 8]
    assert shapes["model.layers.0.self_attn.k_norm.weight"] == [64]
    assert shapes["model.layers.0.mlp.experts.2.down_proj.scales"] == [2, 128]
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    assert (config["model_type"], config["num_experts_per_tok"], config["head_dim"]) == ("qwen3_moe", 3, 64)


@pytest.mark.parametrize("name", ["gptq", "auto-round", "compressed-tensors"])
@pytest.mark.parametrize("bits", [4, 8])
def test_random_models_of_other_formats_convert_whole_and_mean_something(tmp_path, script, name, bits):
    random_models = script("random_models")
    zero_points = name == "compressed-tensors"
    model = random_models.Model(128, 256, 1, 2, 1, 64, bits=bits, group_size=64, zero_points=zero_points, format=name)
    random_models.write_model(tmp_path / "source", model)
    result = convert(tmp_path / "source", tmp_path / "marlin", verify="all")
    assert (len(result.converted), len(result.kept)) == (7, 0)
    quantization = json.loads((tmp_path / "marlin" / "config.json").read_text())["quantization_config"]
    assert (quantization["bits"], quantization["zero_point"]) == (bits, zero_points)
    convert(
        tmp_path / "source", tmp_path / "awq", to="awq"
    )  # weights of the usual size around 0: a zero point off shows
    with safe_open(tmp_path / "awq" / "model-00001.safetensors", "numpy") as file:
        parts = [file.get_tensor(f"model.layers.0.mlp.down_proj.{part}") for part in ("qweight", "qzeros", "scales")]
    q, z = (reference.unpack_awq(each.view(np.uint32), bits).astype(np.float32) for each in parts[:2])
    weight = (q - z.repeat(64, axis=0)) * parts[2].astype(np.float32).repeat(64, axis=0)
    assert abs(weight.mean()) < 0.2 * weight.std()
    assert 0.5 < weight.std() * 256**0.5 < 2


def test_a_random_model_with_a_quantized_output_embedding_keeps_it_in_awq_layout(tmp_path, script):
    import torch

    random_models, dense_models = script("random_models"), script("dense_models")
    random_models.write_model(tmp_path / "awq", random_models.Model(128, 128, 1, 2, 2, 64, quantized_head=True))
    result = convert(tmp_path / "awq", tmp_path / "marlin")
    assert (len(result.converted), [each.name for each in result.kept]) == (7, ["lm_head"])
    dense_models.dequantize(tmp_path / "awq", tmp_path / "dense", torch.float32)
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        head, other = file.get_tensor("lm_head.weight"), file.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert head.shape == (64, 128)
    assert 2 < head.std() / other.std() < 4  # so that tokens differ in probability


def test_every_model_of_the_token_comparison_is_what_its_name_says(script):
    models = script("vllm_tokens").MODELS
    assert {model.experts > 0 for model in models.values()} == {True, False}
    for name, model in models.items():
        assert model.zero_points == ("without zero points" not in name)
        assert model.biases == ("biases" in name)
        assert (model.format == "awq") == (
            name.split()[0].rstrip(",") not in ("gptq", "auto-round", "compressed-tensors")
        )
        assert (model.bits == 8) == ("8 bits" in name)
        assert (str(model.dtype) == "torch.bfloat16") == ("bf16" in name)
        assert model.quantized_head == ("quantized output embedding" in name)


def test_where_two_kernels_differ_the_gap_of_the_two_best_is_told(script):
    import torch

    compare = script("vllm_tokens").compare_own
    row = {"tokens": [5, 6, 7], "logprobs": [-0.5, -0.75, -1.0], "gaps": [2.0, 0.015625, 1.0]}
    other = {"tokens": [5, 8, 9], "logprobs": [-0.5, -0.765625, -3.0], "gaps": [2.0, 0.0078125, 1.0]}
    same = {"alone": [row], "rows": [row], "layers": {"Linear OwnKernel": 1}}
    found = compare({**same, "rows": [other]}, same, torch.half)
    assert (found["own_alone_same_logprobs"], found["own_together_same_tokens"], found["own_ok"]) == (1, 0, True)
    assert found["own_together_max_gap_where_tokens_differ"] == 0.015625
    assert found["own_together_max_logprob_difference"] == 0.015625
    far = {**other, "gaps": [2.0, 0.5, 1.0]}
    assert not compare({**same, "rows": [far]}, same, torch.half)["own_ok"]


@pytest.fixture
def compared(tmp_path, script, monkeypatch):
    """Compares a model in SGLang; gets what engines say and hold that is not the same in all of them."""
    tokens = script("sglang_tokens")
    about = {"layers": {"Linear": 1}, "sglang": "0.5.23", "torch": "2.14.1", "gpu": "a GPU", "seconds": 1.5}

    def compare(model, said=None, source=None, way=None):
        def start(*arguments):
            name = arguments[2].stem
            words = [(said or {}).get(name, {"tokens": [5, 6], "logprobs": [-0.5, -0.75], "gaps": [2.0, 1.0]})]
            held = (source if name.startswith("theirs") else None) or {"w.qweight": "1"}
            return {**about, "alone": words, "rows": words, "tensors": held}

        monkeypatch.setattr(tokens, "start_engine", start)
        with ThreadPoolExecutor(2) as pool:
            return tokens.compare(model, tokens.MODELS[model], way or tokens.Way(), tmp_path, pool)

    return compare


NEAR = {"tokens": [5, 6], "logprobs": [-0.5, -0.765625], "gaps": [2.0, 1.0]}


@pytest.mark.parametrize("model", ["llama, g 128", "gptq, 8 bits without zero points", "mixtral, g 128"])
def test_in_sglang_every_loaded_tensor_must_have_the_bits_of_the_source(compared, model):
    assert compared(model)["ok"]
    found = compared(model, source={"w.qweight": "2"})
    assert (found["tensors_apart"], found["tensors_same"], found["ok"]) == (["w.qweight"], 0, False)


def test_in_sglang_tensors_are_compared_by_what_they_are_not_by_their_names(compared):
    names = {"w.weight_packed": "1", "w.weight_scale": "2", "w.weight_zero_point": "3", "w.weight_shape": "4", "b": "5"}
    found = compared("compressed-tensors, g 128", source=names)
    assert (found["tensors"], found["tensors_same"]) == (4, 1)
    assert found["tensors_apart"] == ["b", "w.qzeros", "w.scales"]


def test_in_sglang_dense_models_must_say_the_same_bits_and_experts_what_two_starts_do(compared):
    assert not compared("llama, g 128", {"theirs": NEAR})["ok"]
    assert not compared("mixtral, g 128", {"theirs": NEAR, "theirs_again": NEAR})["ok"]
    found = compared("mixtral, g 128", {"theirs": NEAR})  # two starts of the source are as far apart as it and ours
    assert (found["theirs_again_alone_max_logprob_difference"], found["ok"]) == (0.015625, True)


def test_in_sglang_modules_that_its_marlin_does_not_take_are_compared_by_what_they_say(compared):
    name = "llama with attention kept as AWQ, g 64"
    assert compared(name, {"theirs": NEAR}, {"w.qweight": "2"})["ok"]
    far = {**NEAR, "logprobs": [-0.5, -0.9]}
    assert not compared(name, {"theirs": far}, {"w.qweight": "2"})["ok"]


@pytest.mark.parametrize(
    ("does", "failure"),
    [
        ("import time; time.sleep(60)", "has not said all in 0.5 seconds"),
        ("print('no GPU'); raise SystemExit(3)", "ended with exit code 3"),
        ("print('no GPU')", "said nothing"),
    ],
)
def test_an_engine_of_sglang_that_fails_or_hangs_is_told_with_the_end_of_its_log(
    tmp_path, script, monkeypatch, does, failure
):
    tokens = script("sglang_tokens")
    (tmp_path / "engine.py").write_text(does)
    monkeypatch.setattr(tokens, "__file__", str(tmp_path / "engine.py"))
    monkeypatch.setattr(tokens, "PATIENCE", 0.5 if "sleep" in does else 30)
    with pytest.raises(RuntimeError, match=failure) as raised:
        tokens.start_engine(tmp_path / "marlin", tokens.Way(), tmp_path / "ours.json")
    assert raised.value.args[0].endswith("no GPU" if "print" in does else ":\n")
    told = json.loads((tmp_path / "ours.json").read_text())["failure"]  # to whoever waits for what it says
    assert (told or "said nothing") == failure


class Judge:
    """What SGLang's engine says of the tokens of a prompt: of the last one of the vocabulary, that it is the first."""

    def generate(self, input_ids, **options):  # noqa: ARG002 - as SGLang's
        said = [[(-0.5, token if token < 63 else 0, None) for token in ids] for ids in input_ids]
        best = [[[(-0.25, 7, None)] for _ in ids] for ids in input_ids]
        pairs = zip(said, best, strict=True)
        return [{"meta_info": {"input_token_logprobs": one, "input_top_logprobs": two}} for one, two in pairs]


def test_an_engine_of_sglang_judges_the_last_token_of_the_vocabulary_too(script):
    judge = script("sglang_tokens").judge
    rows = judge(Judge(), [[5, 6], [4]], [{"tokens": [63, 8]}, {"tokens": [9]}])
    assert [row["tokens"] for row in rows] == [[63, 8], [9]]
    assert rows[0]["logprobs"] == [-0.5, -0.5]
    assert rows[0]["best"] == [-0.25, -0.25]


def test_log_probabilities_of_other_tokens_are_no_judgement(script, monkeypatch):
    monkeypatch.setattr(
        Judge, "generate", lambda self, input_ids, **_: GENERATE(self, [ids[::-1] for ids in input_ids])
    )
    with pytest.raises(RuntimeError, match="other tokens"):
        script("sglang_tokens").judge(Judge(), [[5, 6]], [{"tokens": [7, 8]}])


GENERATE = Judge.generate


def test_an_engine_of_sglang_is_asked_for_the_ranks_that_share_tensors_or_experts(tmp_path, script, monkeypatch):
    tokens = script("sglang_tokens")
    (tmp_path / "engine.py").write_text(
        "import json, os, pathlib, sys\nat = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "at.write_text(json.dumps({'arguments': sys.argv[1:], 'nvls': os.environ['NCCL_NVLS_ENABLE']}))\n"
    )
    monkeypatch.setattr(tokens, "__file__", str(tmp_path / "engine.py"))
    out = tmp_path / "ours.json"
    told = tokens.start_engine(tmp_path / "marlin", tokens.Way(2, True, True), out, tmp_path / "own.json")
    folder = ["--engine", str(tmp_path / "marlin"), "--tp", "2", "--out", str(out)]
    assert told == {
        "arguments": [*folder, "--forced", str(tmp_path / "own.json"), "--expert-parallel"],
        "nvls": "0",
    }
    assert tokens.start_engine(tmp_path / "marlin", tokens.Way(eager=False), out)["arguments"][-1] == "--graphs"


def test_a_comparison_of_experts_on_several_ranks_says_how_they_shared_them(compared, script):
    way = script("vllm_tokens").Way(2, True, True)
    row = compared("mixtral, g 128", way=way)
    assert (row["tensor_parallel_size"], row["expert_parallel"], row["ok"]) == (2, True, True)
    assert "expert_parallel" not in compared("mixtral, g 128")


def test_where_sglang_cannot_load_the_source_the_dequantized_model_judges(compared, script, monkeypatch):
    judged = []
    dense_models = script("dense_models")
    monkeypatch.setattr(dense_models, "dequantize", lambda *arguments: judged.append(arguments[1].name))
    words = {"tokens": [5, 6], "logprobs": [-0.5, -0.75], "gaps": [2.0, 1.0], "best": [-0.5, -0.75]}
    for name in ("llama, 8 bits", "llama with a quantized output embedding, g 128", "llama without zero points"):
        row = compared(name, {"dense": words})
        assert (row["reference"], row["together_same_tokens"], row["ok"]) == ("dequantized model, fp16", 1, True)
        assert ("own_ok" in row) == (name != "llama, 8 bits")
    assert judged == ["dense"] * 3


def test_rows_of_the_token_comparison_are_written_as_they_come_and_earlier_ones_are_kept(tmp_path, script, monkeypatch):
    tokens = script("vllm_tokens")
    out, seen = tmp_path / "results" / "tokens.json", []
    out.parent.mkdir()
    out.write_text(json.dumps({"about": "a GPU", "rows": [{"model": "earlier"}]}))

    def compare(name, work):  # noqa: ARG001 - as the function's
        seen.append([row["model"] for row in json.loads(out.read_text())["rows"]])
        if name == "llama, g -1":
            raise RuntimeError("the engine failed")
        return {"model": name, "ok": True}

    names = ["llama, g 128", "llama, g -1", "llama, 8 bits"]
    monkeypatch.setattr(tokens, "prepare", lambda model, work: (work.mkdir(parents=True), (7, 0))[1])  # noqa: ARG005
    assert tokens.compare_all(tokens.MODELS, names, 1, 1, compare, out, tmp_path / "kept") == 1
    assert sorted(each.name for each in (tmp_path / "kept").iterdir()) == ["0", "1", "2"]
    assert seen == [["earlier"], ["earlier", *names[:1]], ["earlier", *names[:2]]]
    document = json.loads(out.read_text())
    assert (document["about"], [row.get("error") for row in document["rows"]]) == (
        "a GPU",
        [None, None, "the engine failed", None],
    )
    found = {key: document["rows"][3][key] for key in ("model", "ok", "converted", "kept")}
    assert found == {"model": "llama, 8 bits", "ok": True, "converted": 7, "kept": 0}


def test_in_sglang_no_dense_model_is_added_up_by_atomic_operations(script):
    models = script("sglang_tokens").MODELS
    columns = {model.hidden for model in models.values()} | {model.vocabulary for model in models.values()}
    assert max(max(model.hidden, model.inner) for model in models.values()) < 2048 <= max(columns)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_of_sglang_writes_what_it_has_loaded(tmp_path, script, monkeypatch, ranks):
    import torch

    tokens = script("sglang_tokens")

    class ModelRunner:
        def load_model(self):
            self.model = torch.nn.Linear(2, 1)

    def run(server_args, port_args, gpu_id, tp_rank, pp_rank):  # noqa: ARG001 - the names are SGLang's
        ModelRunner().load_model()

    for name, found in {"managers.scheduler": run, "model_executor.model_runner": ModelRunner}.items():
        module = ModuleType(f"sglang.srt.{name}")
        module.run_scheduler_process = module.ModelRunner = found
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv(tokens.LOADED_VARIABLE, "")
    files = tokens.tell_what_is_loaded(tmp_path / "ours.json", ranks)
    load = ModelRunner.load_model
    for rank in range(ranks):
        tokens.run_scheduler(None, None, 0, rank, pp_rank=0)
        ModelRunner.load_model = load  # each rank is a process of its own
    found = tokens.what_is_loaded(files)
    names = [f"{rank}{name}" for rank in ("", "rank 1: ")[:ranks] for name in ("weight", "bias")]
    assert sorted(found["tensors"]) == sorted(names)


def test_a_digest_tells_tensors_apart_by_their_bits(script):
    import torch

    digests = script("sglang_tokens").digests
    layer = torch.nn.Linear(2, 1).half()
    layer.register_buffer("factor", torch.tensor(1.0))
    layer.register_buffer("nothing", torch.empty(0))
    first = digests(layer)
    assert first.keys() == {"weight", "bias", "factor"}
    layer.factor += 1e-7
    second = digests(layer)
    assert [name for name in first if first[name] != second[name]] == ["factor"]


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(tmp_path, script, request):
    """A small mixture of experts in AWQ, and the script that computes it in float64."""
    make = script("random_models")
    more = {"mixtral": {"experts": 4}, "qwen3_moe": {"experts": 8, "top_k": 4, "head_size": 16}}[request.param]
    make.write_model(tmp_path / "source", make.Model(128, 64, 2, 4, 2, 64, group_size=32, **more))
    ties = script("router_ties")
    return ties, ties.Mixture(tmp_path / "source")


def test_a_mixture_in_float64_says_what_transformers_does(tmp_path, script, mixture):
    import torch

    transformers = pytest.importorskip("transformers")
    ties, model = mixture
    script("dense_models").dequantize(tmp_path / "source", tmp_path / "dense", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    text = torch.randint(3, 64, (19,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(text[None]).logits[0].log_softmax(-1)
    found, margins = model.logprobs(text.tolist())
    assert (found - expected).abs().max() < 1e-4
    assert margins.shape == (2, 19)
    swapped, _ = model.logprobs(text.tolist(), ties.Tie(1, 7))
    moved = (swapped - found).abs().amax(-1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [7]  # of the last layer's tokens no other sees it


def test_an_engine_that_decided_a_tie_the_other_way_is_near_to_float64_with_that_tie_swapped(mixture):
    ties, model = mixture
    prompt, tokens = [5, 9, 33, 12], [7, 20, 41]
    _, margins = model.logprobs([*prompt, *tokens[:-1]])
    nearest = ties.Tie(*divmod(int(margins.argmin()), margins.shape[1]))
    said = {
        name: [model.logprobs([*prompt, *tokens[:-1]], tie)[0][3 + at, token].item() for at, token in enumerate(tokens)]
        for name, tie in {"as the router": None, "the other way": nearest}.items()
    }
    found = ties.look_at(model, prompt, tokens, said, 4)
    first = found["ties"][0]
    assert (first["layer"], first["token"]) == nearest
    assert (found["apart"]["as the router"], first["apart_if_swapped"]["the other way"]) == (0, 0)
    assert found["apart"]["the other way"] == first["apart_if_swapped"]["as the router"] == first["moves_logprobs_by"]
    assert first["moves_logprobs_by"] > 0.01


def test_a_variant_must_give_the_same_bits_and_an_adapter_must_do_something(script):
    compare = script("vllm_variants").compare
    about = {"vllm": "0.33.0", "torch": "2.14.0", "gpu": "a GPU", "layers": {}}
    alone = [{"tokens": [9], "logprobs": [-0.25]}]
    plain = {**about, "alone": alone, "rows": [{"tokens": [5, 6], "logprobs": [-0.5, -0.75]}]}
    near = {**about, "alone": alone, "rows": [{"tokens": [5, 6], "logprobs": [-0.5, -0.76]}]}
    other = {**about, "alone": alone, "rows": [{"tokens": [5, 7], "logprobs": [-0.5, -0.75]}]}
    assert compare("sharded_state", plain, plain, {})["ok"]
    assert not compare("sharded_state", near, plain, {})["ok"]
    assert compare("sharded_state", near, plain, {}, experts=True)["ok"]
    off = {**plain, "alone": [{"tokens": [9], "logprobs": [-0.125]}]}
    assert not compare("ipc_cache", off, plain, {}, experts=True)["ok"]
    assert not compare("lora", plain, plain, {})["ok"]
    assert compare("lora", other, plain, {})["ok"]
    judged = {**about, "rows": [{"tokens": [5, 7], "logprobs": [-0.5, -0.8], "best": [-0.5, -0.7]}]}
    found = compare("lora, dequantized", judged, plain, other)
    assert (found["together_same_tokens"], found["ok"]) == (0, True)
    far = {**judged, "rows": [{"tokens": [5, 7], "logprobs": [-0.5, -0.9], "best": [-0.5, -0.7]}]}
    assert not compare("lora, dequantized", far, plain, other)["ok"]
    assert not compare("lora, dequantized", far, plain, other, experts=True)["ok"]  # one of two is too many
    assert compare("cpu offload", {"error": "no memory"}, plain, {})["error"] == "no memory"


def test_the_serving_table_has_a_column_for_every_engine_that_ran(script):
    serving = script("serving")
    first = [[7, -0.25, 8, -1.0], [4, -0.5, 3, -0.625]]
    memory = {"load_allocated_peak_mib": 5500, "load_reserved_peak_mib": 7400, "loaded_allocated_mib": 5400}
    rates = {str(count): {"median": 10.0 * count} for count in serving.BATCHES}
    engine = {"title": "one", "said": [first], "decode_tokens_per_s": rates, "prefill_ms": {"median": 70.25}, **memory}
    engine |= {"read_seconds": 0.75, "process_seconds": 0.015625}
    engine["graph_us"] = {str(count): {"median": 100.0 * count} for count in serving.BATCHES}
    other = {**engine, "title": "other", "said": [[first[0], [3, -0.5, 4, -0.53125]]]}
    found = {"source": engine, "source_marlin": {"title": "lost", "error": "out of memory"}, "converted": other}
    lines = serving.table(found).splitlines()
    assert lines[0] == "|  | one | other |"
    assert lines[2] == "| decoding, batch 1, tokens/s | 10 | 10 |"
    assert lines[9] == "| GPU time of a step's CUDA graph, batch 64, us | 6400 | 6400 |"
    assert lines[10] == "| prefill of 2048 tokens, ms | 70.2 | 70.2 |"
    words = serving.differences(found)
    assert words["compared_with"] == "source"
    assert words["engines"]["source"]["same_tokens"] == 1
    assert words["engines"]["converted"] == {
        "prompts": 1, "same_tokens": 0, "max_logprob_difference": 0.0, "max_gap_where_tokens_differ": 0.125,
    }  # fmt: skip


def test_a_turn_of_prefill_measures_nothing_else_and_leaves_its_first_time_out(script):
    serving, found, seconds = script("serving"), {}, itertools.cycle([9.0, 0.5, 0.25, 0.125, 0.25, 0.375])

    def timed(batch, new_tokens):
        assert [len(each["prompt_token_ids"]) for each in batch] == [2048]
        assert new_tokens == 1
        return next(seconds)

    assert serving.ROUND.index("prefill") == 1
    for turn in (1, 1 + len(serving.ROUND)):
        serving.measure(turn, timed, None, 1000, found)
    assert found == {"prefill_ms": {"median": 250.0, "all": [500.0, 250.0, 125.0, 250.0, 375.0] * 2}}


def test_engines_measure_in_turn_and_those_that_fail_are_told(script, tmp_path, monkeypatch, capsys):
    serving, record, order, environments = script("serving"), script("record"), [], []

    class Engine(threading.Thread):
        """Stands in for the process of an engine."""

        def __init__(self, command, env, stdout, **_):
            super().__init__()
            options = dict(itertools.pairwise(command))
            assert command[-3:] == ["--batches", "1", "64"]
            environments.append(env)
            self.name, self.out, self.ended = options["--engine"], Path(options["--out"]), None
            self.rounds, self.log = int(options["--rounds"]), Path(stdout.name)
            self.start()

        def run(self):
            if self.name == "source":
                self.log.write_text("no memory\n\n")
                self.ended = 1
                return
            found = {"title": self.name}
            for number in serving.turns(self.name, tmp_path, self.rounds):
                order.append((number, self.name))
                serving.note(found, "us", [float(number), 4.0], 1)
                record.save(self.out, found)
            self.ended = 0

        def poll(self):
            return self.ended

        def wait(self):
            self.join()
            return self.ended

        def terminate(self):
            pass

    monkeypatch.setattr(serving.subprocess, "Popen", Engine)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    kept, arguments = [], ["--batches", "1", "64"]
    names = ["source", "converted_engine", "converted"]
    found = serving.run_all(names, tmp_path, 60, 2, keep=kept.append, arguments=arguments)
    assert order == [(0, "converted_engine"), (0, "converted"), (1, "converted_engine"), (1, "converted")]
    assert found["source"] == {"title": "source, vLLM's default", "error": "no memory"}
    assert found["converted"]["us"] == {"median": 2.5, "all": [0.0, 4.0, 1.0, 4.0]}
    assert [each["converted"]["us"]["all"] for each in kept] == [[0.0, 4.0], [0.0, 4.0, 1.0, 4.0]]
    assert "source failed:" in capsys.readouterr().err
    assert not any("OMP_NUM_THREADS" in each for each in environments)  # vLLM would run its steps on four threads
    assert [each.get("AWQ2MARLIN_KERNEL") for each in environments] == [None, "engine", None]


@pytest.mark.parametrize("is_here", [True, False])
def test_memory_and_graphs_are_measured_where_the_engine_is_in_this_process(is_here, script, tmp_path, monkeypatch):
    serving, asked = script("serving"), []
    engine = SimpleNamespace(apply_model=lambda function: [{}])  # noqa: ARG005
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    for name, value in (serving.ENVIRONMENT | ({} if is_here else serving.OWN_PROCESS)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(serving, "measured_load", lambda work, found: asked.append("load"))  # noqa: ARG005
    monkeypatch.setattr(serving, "start", lambda engine_asked, folder: engine)  # noqa: ARG005
    monkeypatch.setattr(serving, "turns", lambda name, work, rounds: range(rounds))  # noqa: ARG005
    monkeypatch.setattr(serving, "measure", lambda *arguments: asked.append(arguments[-2:]))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", torch.cuda.CUDAGraph.replay)  # put back afterwards
    (tmp_path / "marlin").mkdir()
    config = {"quantization_config": {"quant_method": "marlin_native"}, "vocab_size": 64}
    (tmp_path / "marlin" / "config.json").write_text(json.dumps(config))
    serving.run_engine("converted", tmp_path, 1, tmp_path / "converted.json", [1, 64])
    (replays, batches) = asked[-1]
    assert (asked[0] == "load", replays is not None, batches) == (is_here, is_here, [1, 64])
    assert ("threads" in json.loads((tmp_path / "converted.json").read_text())) == is_here


@pytest.mark.parametrize(("name", "more"), [("serving", {"zero_points": True, "experts": 0}), ("sglang_serving", {})])
def test_rows_of_serving_join_those_that_a_file_holds(name, more, script, tmp_path, monkeypatch):
    serving, record, measured = script("serving"), script("record"), script(name)
    engine = {"title": "one", "said": [], "decode_tokens_per_s": {}, "prefill_ms": {"median": 70.0}}
    engine["decode_tokens_per_s"] = {str(count): {"median": 10.0} for count in serving.BATCHES}
    out, seen = tmp_path / "out" / "serving.json", {}
    record.save(out, {"note": "kept", "rows": [{"layers": 1}]})

    def run_all(names, work, patience, rounds, script, keep, engines, arguments):  # noqa: ARG001
        seen.update(names=names, script=Path(script).name, engines=engines, models=sorted(work.iterdir()))
        seen["arguments"] = arguments
        keep({"source": {**engine, "title": "after a round"}})
        seen["early"] = record.earlier(out)["rows"][1]["engines"]["source"]["title"]
        return {"source": engine, "converted": {"title": "lost", "error": "no memory"}}

    monkeypatch.setattr(serving, "run_all", run_all)
    monkeypatch.setattr(serving, "make_models", lambda model, folder: (model.layers, folder.mkdir())[0])
    monkeypatch.setattr(serving, "compile_beforehand", lambda folder: 0.5)  # noqa: ARG005
    monkeypatch.setattr(record, "driver", lambda: "580.1")
    monkeypatch.setattr(record, "commit", lambda: "abc")
    command = [name, "--out", str(out), "--layers", "2", "--only", "source", "--models", str(tmp_path / "models")]
    monkeypatch.setattr(sys, "argv", command)
    assert measured.main() == 1  # an engine failed
    assert [path.name for path in seen["models"]] == ["marlin", "source"]
    assert (seen["names"], seen["script"], seen["early"]) == (["source"], f"{name}.py", "after a round")
    assert seen["engines"] is measured.ENGINES
    assert seen["arguments"] == ["--batches", "1", "8", "32", "64"]
    kept = json.loads(out.read_text())
    assert (kept["note"], kept["rows"][0]) == ("kept", {"layers": 1})
    row = kept["rows"][1]
    assert row.pop("date") <= datetime.date.today().isoformat()
    assert row.pop("engines")["source"]["title"] == "one"
    assert row.pop("words")["compared_with"] == "source"
    assert row == {
        "format": "awq", **more, "layers": 2, "rounds": 1, "driver": "580.1", "commit": "abc", "bytes": 2,
        "compile_seconds": 0.5,
    }  # fmt: skip


def test_a_result_says_of_what_commit_it_is(script, tmp_path, monkeypatch):
    record = script("record")
    assert record.origin("abc")["commit"] == "abc"
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "commit").write_text("packed\n")
    assert record.commit() == "packed"


def test_a_result_that_cannot_be_written_leaves_the_earlier_one(script, tmp_path):
    record, path = script("record"), tmp_path / "result.json"
    record.save(path, {"rows": [1]})
    with pytest.raises(TypeError):
        record.save(path, {"rows": [object()]})
    assert record.earlier(path) == {"rows": [1]}
    assert record.earlier(tmp_path / "none.json") == {"rows": []}
    record.save(None, {"rows": [2]})
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_the_kernels_that_are_compiled_are_those_that_a_model_needs(script):
    compile_seconds = script("compile_seconds")
    experts = {source.name for source in compile_seconds.expert_kernels(2048, 768, 128, 8)}
    assert {name for name in experts if name.startswith("align")} == {
        f"align_experts<{blocks}, {heights}>" for blocks in (1, 8) for heights in (1, 3)
    }
    assert {name.split("<")[0] for name in experts} == {
        "HopperExperts", "SmallExperts", "align_experts", "sum_experts",
    }  # fmt: skip


def test_replays_of_graphs_are_watched_only_while_asked(script, monkeypatch):
    import torch

    clock = itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(clock)

        def elapsed_time(self, later):
            return float(later.time - self.time)

    class Graph:
        replayed = 0

        def replay(self):
            self.replayed += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    replays, graph = script("cuda_graphs").Replays(), Graph()
    graph.replay()
    with replays.watched():
        for _ in range(4):
            graph.replay()
    graph.replay()
    found = replays.summary(2)
    assert (found["replays_a_step"], found["gpu_us"], found["gpu_between_us"]) == (2.0, 2000.0, 1000.0)
    assert replays.over_and_over(10)["clock_us"] > 0
    assert graph.replayed == 6 + 20 + 10 + 50


def test_the_load_summary_takes_medians_and_compares_tokens(script):
    summary = script("load").summary
    run = {"ready_seconds": 2.0, "tokens": [1, 2], "vllm": "0.25.0"}
    found = summary({"awq": [{"error": "no"}], "marlin": [run, {**run, "ready_seconds": 4.0}]})
    assert found == {
        "awq": {"error": "no"}, "marlin": {"ready_seconds": 3.0}, "vllm": "0.25.0", "same_tokens": True,
    }  # fmt: skip
    assert not summary({"awq": [{**run, "tokens": [1, 3]}], "marlin": [run]})["same_tokens"]


def test_a_launch_is_warmed_up_only_when_the_replays_before_it_are_through(script, monkeypatch):
    """Kernels that share locks wait for each other for ever when two of them run side by side."""
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    gemm = script("gemm")
    for _ in range(2):
        assert isinstance(gemm.captured(lambda i: done.append(i), 2), Graph)
    assert done == [0, "wait", 0, 1, "replay", "wait"] * 2


def test_kinds_of_weights_are_compared_at_the_same_bytes(script):
    variants = script("gemm_variants")

    def case(kind, size_m):
        layer = random_layer(256, kind.columns(512, size_m), kind.group_size, num_bits=kind.bits)
        a = random_tokens(size_m, layer)
        return variants.Case(kind, a, [(layer.qweight, layer.scales, layer.qzeros)]), layer(a)

    finer = variants.Kind(variants.USUAL.dtype, 4, 32, has_zeros=True)
    wider = variants.Kind(variants.USUAL.dtype, 8, 128, has_zeros=True)
    assert (str(finer), wider.columns(512, 64), wider.columns(512, 65)) == ("fp16, 4 bits, g = 32", 256, 512)
    few, _ = case(variants.USUAL, 1)
    assert few.moved_bytes == 256 * 512 // 2 + 2 * 512 * (2 + 0.5) + 256 * 2 + 512 * 2
    assert variants.ratio(case(finer, 1)[0], 10.0, few, 8.0) == pytest.approx(10 / 8 * 69_632 / 77_312)
    assert variants.ratio(case(finer, 65)[0], 10.0, case(variants.USUAL, 65)[0], 8.0) == 1.25
    right, product = case(finer, 3)
    right.check(product)
    product[1, -1] *= 2
    with pytest.raises(SystemExit, match="g = 32: wrong result"):
        right.check(product)


def test_the_table_of_kinds_has_means_and_the_largest(script):
    rows = [{"kind": "g = 128", "M": size_m, "ratio": ratio} for size_m, ratio in ((1, 1.0), (1, 1.21), (8, 1.5))]
    assert script("gemm_variants").table(rows, ["g = 128"]) == [
        "| weights | M = 1 | M = 8 |",
        "| --- | --- | --- |",
        "| g = 128 | 1.10 (1.21) | 1.50 (1.50) |",
    ]


def test_the_table_of_other_weights_is_that_of_the_stored_result(script):
    rows = json.loads((FOLDER / "results" / "gemm_variants_h100.json").read_text("utf-8"))["rows"]
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if "no zero points" not in kind]
    told = (FOLDER.parent / "docs" / "benchmarks.md").read_text("utf-8")
    assert "\n".join(script("gemm_variants").table(rows, kinds)) in told


def test_the_benchmark_of_experts_compares_the_operators_with_float64(script, monkeypatch):
    experts = script("experts")
    monkeypatch.setattr(experts, "DEVICE", "cpu")
    model = experts.Model(experts=3, topk=2, hidden=256, inter=128)
    for weights in ("zp128", "sym128", "zp32", "single", "bf16", "8bits"):
        layer, kind = experts.Experts(model, weights), experts.WEIGHTS[weights]
        routing = "zipf" if weights == "sym128" else "uniform"
        point = experts.Point(model, 5, routing, launches=2, dtype=kind.dtype)
        assert [ids.shape for ids in point.ids] == [(5, 2), (5, 2)]
        parts, tokens = experts.parts_of_ours(point, [layer.marlin()], kind.bits), [0, 4]
        exact = layer.exact(point, tokens)
        assert exact["block"].std() == pytest.approx(0.7, rel=0.5)
        assert max(experts.check_ours(parts, point, exact, tokens).values()) < (4e-3 if weights == "bf16" else 5e-4)
        off = 1.01 * parts["w2"](0)
        with pytest.raises(SystemExit, match="wrong result"):
            experts.check_ours({"w2": lambda _, off=off: off}, point, exact, tokens)
        with pytest.raises(SystemExit, match="away from Marlin"):
            experts._refuse_other_results("marlin", float("nan"), point)


def test_a_harness_finds_what_it_reads_of_the_experts_and_is_asked_for_what_it_knows(script, monkeypatch):
    experts = script("experts")
    monkeypatch.setattr(experts, "DEVICE", "cpu")
    asked = {}

    class Harness:
        @staticmethod
        def make_peers(names, layer, weights, *_):
            shapes = [tuple(tensors["w2"].shape) for tensors in (layer.q, layer.s)]
            asked[weights] = (layer.group, layer.has_zeros, layer.z["w2"] is not None, *shapes)
            return dict.fromkeys(names, layer.model)

    model = experts.Model(experts=2, topk=2, hidden=256, inter=128)
    for weights in experts.WEIGHTS:
        peers = experts.peers_of(Harness, ["marlin"], experts.Experts(model, weights), weights, 2, {})
        assert peers == ({"marlin": model} if weights in asked else {})
    assert asked == {
        "zp128": (128, True, True, (2, 16, 256), (2, 1, 256)),
        "sym128": (128, False, False, (2, 16, 256), (2, 1, 256)),
        "zp64": (64, True, True, (2, 16, 256), (2, 2, 256)),
        "zp32": (32, True, True, (2, 16, 256), (2, 4, 256)),
    }
    assert experts.peers_of(None, ["marlin"], experts.Experts(model, "zp128"), "zp128", 2, {}) == {}


def test_the_tables_of_experts_name_means_the_best_peer_and_what_is_slower(script, capsys):
    experts = script("experts")
    floor = {"block": 10.0, "w13": 6.0, "w2": 4.0}

    def times(block):
        return {"block": block, "w13": block / 2, "w2": block / 4}

    rows = [
        {"model": name, "weights": "zp128", "routing": "uniform", "M": 4, "floor_us": floor, "us": us}
        for name, us in (
            ("one", {"ours": times(20.0), "marlin": times(40.0), "humming": times(32.0)}),
            ("two", {"ours": times(45.0), "marlin": times(40.0), "humming": times(50.0)}),
        )
    ]
    experts.print_tables(rows)
    lines = capsys.readouterr().out.splitlines()
    assert "| 4 | 3.00 | 4.00 | 4.00 | 3.58 | 0.84 (1.12) | 0.75 (1.12) |" in lines
    assert "| 4 | 20.0 us: 2.00, 0.62, 0.50 | 45.0 us: 4.50, 1.12 !, 1.12 !! |" in lines


def test_experts_of_runs_with_different_peers_are_told_as_one(script, tmp_path, monkeypatch, capsys):
    experts = script("experts")

    def row(routing, **blocks):
        times = {name: {"block": block, "w13": block / 2, "w2": block / 4} for name, block in blocks.items()}
        same = {"model": "one", "weights": "zp128", "M": 4, "floor_us": {"block": 10.0, "w13": 5.0, "w2": 2.5}}
        return same | {"routing": routing, "us": times}

    first = [row("uniform", ours=20.0, marlin=40.0), row("zipf", ours=30.0, marlin=50.0)]
    second = [row("uniform", ours=45.0, humming=30.0)]
    for name, rows in (("first", first), ("second", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"commit": name, "rows": rows}), "utf-8")
    files = [str(tmp_path / f"{name}.json") for name in ("first", "second", "all")]
    monkeypatch.setattr(sys, "argv", ["experts.py", "show", *files[:2], "--output", files[2]])
    experts.main()
    assert json.loads((tmp_path / "all.json").read_text("utf-8")) == {"commit": "first", "rows": first + second}
    lines = capsys.readouterr().out.splitlines()
    assert "| 4 | 3.00 | 6.00 | 2.00 | 2.00 | 1.50 (1.50) | 0.50 (0.50) |" in lines  # ours is the mean of 20 and 45
    assert "| M | one | mean of ours | mean of marlin |" in lines
    assert "| 4 | 1.00 (30, 30) | 1.00 | 0.83 |" in lines


def test_the_host_s_time_a_call_is_the_median_of_loops_that_take_turns(script, tmp_path, monkeypatch, capsys):
    host, torch, order = script("gemm_host"), pytest.importorskip("torch"), []
    clock = iter(range(1_000_000))
    calls = {name: lambda name=name: order.append((name, torch.is_inference_mode_enabled())) for name in ("one", "two")}
    for name, stand_in in {
        "dense_calls": lambda: calls,
        "expert_calls": dict,
        "vllm_calls": dict,
        "bare_launch": dict,
        "gpu_us": lambda call, count: 7e6 if call is calls["two"] else 1.0,  # noqa: ARG005
    }.items():
        monkeypatch.setattr(host, name, stand_in)
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    output = tmp_path / "host.json"
    command = ["gemm_host.py", "--calls", "10", "--repeats", "3", "--commit", "abc", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    host.main()
    turn = [(name, mode) for mode in (True, False) for name in calls for _ in range(1 + 10)]  # a tenth to warm up
    assert order == 3 * turn
    result = json.loads(output.read_text("utf-8"))
    second = {"inference_mode_us": 1e5, "us": 1e5}  # of ten calls, by the clock
    assert result["rows"] == [{"call": "one", **second, "gpu_us": 1.0}, {"call": "two", **second, "gpu_us": 7e6}]
    assert [line.endswith("bound by the GPU") for line in capsys.readouterr().out.splitlines()] == [False] * 3 + [True]


NCU_TABLE = """\
==PROF== Connected to process 1557 (/usr/bin/python3.12)
==WARNING== Note: Running with unmodified GPU clocks.
"ID","Kernel Name","gpu__time_duration.sum","launch__grid_size",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",\
"sm__pipe_tensor_cycles_active.max.pct_of_peak_sustained_elapsed",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"
"","","ns","","%","%","inst","inst","inst"
"0","awq2marlin_kernel","120,640","132","56.97","57.17","0","3.00","1.00"
"1","awq2marlin_kernel","9,728","1,792","0.45","0.59","1.00","1.00","2.00"
==PROF== Disconnected from process 1557
"""


def test_a_profile_has_the_figures_of_every_launch_and_says_where_there_are_others(tmp_path, script, capsys):
    profile, table = script("kernel_profile"), tmp_path / "ncu.csv"
    table.write_text(NCU_TABLE)
    rows = profile.rows_of(table, [("8B o, M = 64", "HopperGemm<1>"), ("8B o, M = 64", "HopperSum<1>")])
    assert [(row["kernel"], row["us"], row["blocks"], row["tensor_cores"]) for row in rows] == [
        ("HopperGemm<1>", 120.64, 132, 56.97),
        ("HopperSum<1>", 9.73, 1792, 0.45),
    ]
    assert rows[0]["stalls"] == {"long_scoreboard": 75.0, "barrier": 0.0}
    assert rows[1]["stalls"] == {"barrier": 25.0, "long_scoreboard": 25.0}
    profile.show({"gpu": "H100", "rows": rows})
    assert "| 8B o, M = 64 | HopperGemm<1> | 121 | 57 | - | - | - | - | - | - | long_scoreboard 75, barrier 0 |" in (
        capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="2 launches, and there were 1"):
        profile.rows_of(table, [("8B o, M = 64", "HopperGemm<1>")])
