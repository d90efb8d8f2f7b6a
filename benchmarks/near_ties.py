"""Whether a router's near-tie is behind the tokens of a mixture of experts on which two kernels are furthest apart.

    python benchmarks/near_ties.py --out benchmarks/results/vllm_near_ties_h100.json [--words FOLDER]

Runs the Qwen3-MoE of benchmarks/vllm_tokens.py, converted, in vLLM on this package's kernels and on vLLM's Marlin,
compiled; or takes what they said from ``own.json`` and ``marlin.json`` of a folder. Then computes the dequantized model
in float64 along the same texts. For every token on which the two are further apart than a bound, it looks for the
places, there and before, where the last expert that a router chose was hardly better than the next one, and computes
the text once more with one such choice turned round. A near-tie explains the differences of a text if float64 says
with one choice what one kernel said, and with the other, the same for all tokens, what the other one did.

Weights are drawn on the GPU, so words go with models of the same kind of device only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_models import dequantize
from random_models import Model
from record import origin, save
from vllm_tokens import MODELS, Way, draw_prompts, prepare, start_engine

NAME = "qwen3-moe, g 128"

#: Log-probabilities further apart than this are looked at; most are within half of it.
APART = 0.03

#: The largest distance between the router's logits of two experts that counts as near, and how many are tried.
NEAR, MOST = 0.03, 60

#: A layer and a position whose router takes the next expert for the last one.
Turned = tuple[int, int]


class Exact:
    """A Qwen3-MoE in float64, whose norms have weights of 1, as `random_models` makes them."""

    def __init__(self, folder: Path, model: Model) -> None:
        """Loads the dequantized model of a folder to the GPU, or to the CPU where there is none."""
        self.model, self.device = model, "cuda" if torch.cuda.is_available() else "cpu"
        tensors = load_file(folder / "model.safetensors").items()
        self.weights = {name: tensor.to(self.device, torch.float64) for name, tensor in tensors}

    @torch.no_grad()
    def __call__(self, tokens: list[int], turned: Turned | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what follows every token of a text, and how clearly each router chose.

        Args:
            tokens: of the text.
            turned: where the last expert chosen gives way to the next one.

        Returns:
            Log-probabilities [T, V]; and by how much the router's logit of the last expert chosen is above that of the
            next one, [layers, T].
        """
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens, device=self.device)]
        margins = []
        for layer in range(self.model.layers):
            prefix = f"model.layers.{layer}"
            x = x + self._attention(_norm(x), f"{prefix}.self_attn")
            place = turned[1] if turned and turned[0] == layer else None
            y, margin = self._experts(_norm(x), f"{prefix}.mlp", place)
            x = x + y
            margins.append(margin)
        return self._product(_norm(x), "lm_head").log_softmax(-1), torch.stack(margins)

    def _product(self, x: torch.Tensor, module: str) -> torch.Tensor:
        return x @ self.weights[f"{module}.weight"].T

    def _attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        model, count = self.model, len(x)
        query, key, value = (
            self._product(x, f"{prefix}.{name}_proj").view(count, -1, model.head_columns) for name in "qkv"
        )
        query, key = _turn(_norm(query)), _turn(_norm(key))
        key, value = (each.repeat_interleave(model.heads // model.key_value_heads, 1) for each in (key, value))
        scores = torch.einsum("thd,shd->hts", query, key) * model.head_columns**-0.5
        scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), value)
        return self._product(out.reshape(count, -1), f"{prefix}.o_proj")

    def _experts(self, x: torch.Tensor, prefix: str, place: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        logits, top_k = self._product(x, f"{prefix}.gate"), self.model.top_k
        ranked = logits.sort(-1, descending=True)
        chosen = ranked.indices[:, :top_k].clone()
        if place is not None:
            chosen[place, -1] = ranked.indices[place, top_k]
        shares = logits.softmax(-1).gather(1, chosen)
        shares = shares / shares.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in set(chosen.flatten().tolist()):
            rows, which = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (self._product(x[rows], f"{prefix}.experts.{expert}.{name}_proj") for name in ("gate", "up"))
            down = self._product(silu(gate) * up, f"{prefix}.experts.{expert}.down_proj")
            y[rows] += down * shares[rows, which][:, None]
        return y, ranked.values[:, top_k - 1] - ranked.values[:, top_k]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _turn(x: torch.Tensor) -> torch.Tensor:
    """Returns query or key [T, heads, columns] after the rotary embedding of base 10000."""
    count, half = len(x), x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = torch.arange(count, dtype=x.dtype, device=x.device)[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def compare(exact: Exact, prompt: list[int], own: dict[str, Any], marlin: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for every token of a text that two kernels gave, up to the first in which they differ.

    Where they are far apart, the row has ``other``: the one that float64 does not side with, which then took another
    expert somewhere. And it has ``turned``, as `explain` finds it.
    """
    text = prompt + own["tokens"]
    logprobs, margins = exact(text)
    rows: list[dict[str, Any]] = []
    for number, (token, its) in enumerate(zip(own["tokens"], marlin["tokens"], strict=True)):
        said = {"own": own["logprobs"][number], "marlin": marlin["logprobs"][number]}
        place = len(prompt) + number - 1
        row: dict[str, Any] = {"token": number, **said, "float64": logprobs[place, token].item()}
        if abs(row["own"] - row["marlin"]) > APART:
            row["other"] = max(said, key=lambda name: abs(said[name] - row["float64"]))
        rows.append(row)
        if token != its:
            break
    for name in ("own", "marlin"):
        explain(exact, text, len(prompt) - 1, [row for row in rows if row.get("other") == name], margins)
    return rows


def explain(exact: Exact, text: list[int], start: int, rows: list[dict[str, Any]], margins: torch.Tensor) -> None:
    """Gives all rows of one kernel the one near-tie that, turned round, brings float64 the closest to all of them.

    Args:
        exact: the model.
        text: prompt and tokens.
        start: the position that says the first of the tokens.
        rows: of tokens, the first one first.
        margins: of the routers, [layers, T].
    """
    if not rows:
        return
    places = [start + row["token"] for row in rows]
    near = (margins[:, : places[0] + 1] < NEAR).nonzero().tolist()
    nearest = sorted((margins[layer, position].item(), layer, position) for layer, position in near)[:MOST]
    found = []
    for margin, layer, position in nearest:
        logprobs, _ = exact(text, (layer, position))
        turned = [logprobs[place, text[place + 1]].item() for place in places]
        apart = max(abs(logprob - row[row["other"]]) for logprob, row in zip(turned, rows, strict=True))
        found.append((apart, margin, layer, position, turned))
    for number, row in enumerate(rows):
        row["near_ties"], row["turned"] = len(near), None
        if found:
            _, margin, layer, position, turned = min(found)
            before = places[number] - position
            row["turned"] = {"margin": margin, "layer": layer, "tokens_before": before, "logprob": turned[number]}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns how far kernels and float64 are apart, with and without the turned choices."""
    far = [row for row in rows if "turned" in row]
    near = [abs(row[name] - row["float64"]) for row in rows if "turned" not in row for name in ("own", "marlin")]
    left = [abs(row["turned"]["logprob"] - row[row["other"]]) for row in far if row["turned"]]
    sides = [abs(row["float64"] - row[name]) for row in far for name in ("own", "marlin") if name != row["other"]]
    return {
        "tokens": len(rows),
        "apart": len(far),
        "others_from_float64": max(near, default=0.0),
        "apart_from_float64_as_chosen": max(sides, default=0.0),
        "apart_from_float64_turned": max(left, default=0.0),
        "without_a_near_tie": sum(row["turned"] is None for row in far),
    }


def run_engines(work: Path) -> list[dict[str, Any]]:
    """Returns what this package's kernels and vLLM's Marlin say with the converted model of a folder."""

    def said(kernel: str) -> dict[str, Any]:
        return start_engine(work / "marlin", Way(eager=False), work / f"{kernel}.json", kernel=kernel)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(said, ("own", "engine")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    parser.add_argument("--words", type=Path, help="folder with own.json and marlin.json of such engines")
    options = parser.parse_args()
    model = MODELS[NAME]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(model, work)
        if options.words:
            own, marlin = (json.loads((options.words / f"{name}.json").read_text()) for name in ("own", "marlin"))
        else:
            own, marlin = run_engines(work)
        dequantize(work / "source", work / "dense", torch.float32)
        exact = Exact(work / "dense", model)
    rows = []
    for what, prompts in zip(("rows", "alone"), draw_prompts(model.vocabulary), strict=True):
        for number, prompt in enumerate(prompts):
            label = {"prompts": "together" if what == "rows" else "alone", "text": number}
            rows += [label | row for row in compare(exact, prompt, own[what][number], marlin[what][number])]
    found = summary(rows)
    far = [row for row in rows if "turned" in row]
    save(
        options.out, {"model": NAME, "vllm": own["vllm"], "gpu": own["gpu"], **origin(), "summary": found, "rows": far}
    )
    print(json.dumps(found))
    return 1 if found["without_a_near_tie"] else 0


if __name__ == "__main__":
    sys.exit(main())
