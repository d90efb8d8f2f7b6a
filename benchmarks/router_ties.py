"""Whether a router's near-tie explains how far answers of a small Mixtral or Qwen3-MoE are apart.

    python benchmarks/sglang_tokens.py --only "mixtral, g 128" --keep FOLDER --out tokens.json
    python benchmarks/router_ties.py FOLDER/0/source FOLDER/0/{ours,theirs,own}*.json --out ties.json [--nearest 40]

Each token goes through a few experts. Where the router's last choice and the next one are nearly as good as each other,
rounding decides, and answers then differ by much more than rounding. For every text that an engine gave, this computes
the log-probabilities of its tokens in float64, from the dequantized source: once as the router decides, and once for
each of its nearest ties, with that one decided the other way. An engine whose log-probabilities are far from the first
and near to one of the others has decided that tie the other way. Models are those of the comparison of tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_models import dequantize
from record import origin, save
from vllm_tokens import draw_prompts


class Tie(NamedTuple):
    """The last choice of experts for a token.

    Attributes:
        layer: where.
        token: its place in the text.
    """

    layer: int
    token: int


class Mixture:
    """A Mixtral or Qwen3-MoE in float64: its arithmetic, and nothing that makes it fast."""

    def __init__(self, source: Path) -> None:
        """Reads an AWQ checkpoint."""
        self.config: dict[str, Any] = json.loads((source / "config.json").read_text("utf-8"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            dequantize(source, Path(folder) / "dense", torch.float32)
            weights = load_file(Path(folder) / "dense" / "model.safetensors")
        self._weights = {name: weight.to(self.device, torch.float64) for name, weight in weights.items()}
        if self.config["model_type"] == "mixtral":
            self._block, self._parts = "block_sparse_moe", ("w1", "w3", "w2")
        else:
            self._block, self._parts = "mlp", ("gate_proj", "up_proj", "down_proj")

    def logprobs(self, tokens: list[int], swapped: Tie | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probabilities of the tokens that follow, and how near the router's ties are.

        Args:
            tokens: a text.
            swapped: where the router's last choice gives way to the next one.

        Returns:
            float64 ``[tokens, vocabulary]``, and the last choice's logit less the next one's, ``[layers, tokens]``.
        """
        x = self._weights["model.embed_tokens.weight"][torch.tensor(tokens, device=self.device)]
        margins = []
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            x = x + self._attention(f"{layer}.self_attn", self._norm(x, f"{layer}.input_layernorm"))
            here = swapped.token if swapped and swapped.layer == number else None
            normed = self._norm(x, f"{layer}.post_attention_layernorm")
            added, margin = self._experts(f"{layer}.{self._block}", normed, here)
            x = x + added
            margins.append(margin)
        logits = self._linear("lm_head", self._norm(x, "model.norm"))
        return logits.log_softmax(-1), torch.stack(margins)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self._weights[f"{name}.weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self._weights[f"{name}.weight"]

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        size, repeats = (
            self.config["head_dim"],
            self.config["num_attention_heads"] // self.config["num_key_value_heads"],
        )
        query, key, value = (
            self._linear(f"{name}.{part}_proj", x).unflatten(-1, (-1, size)).transpose(0, 1) for part in "qkv"
        )
        if f"{name}.q_norm.weight" in self._weights:
            query, key = self._norm(query, f"{name}.q_norm"), self._norm(key, f"{name}.k_norm")
        query, key = self._rotated(query), self._rotated(key)
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        scores = query @ key.transpose(1, 2) / size**0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
        return self._linear(f"{name}.o_proj", mixed.transpose(0, 1).flatten(1))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        count, size = x.shape[1:]
        steps = torch.arange(0, size, 2, device=x.device, dtype=x.dtype) / size
        angles = torch.arange(count, device=x.device, dtype=x.dtype)[:, None] / self.config["rope_theta"] ** steps
        one, two = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    def _experts(self, name: str, x: torch.Tensor, swapped: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._linear(f"{name}.gate", x)
        count = self.config["num_experts_per_tok"]
        best, order = logits.topk(count + 1)
        chosen = order[:, :count].clone()
        if swapped is not None:
            chosen[swapped, -1] = order[swapped, -1]
        shares = logits.gather(1, chosen).softmax(-1)
        total = torch.zeros_like(x)
        for expert in chosen.flatten().bincount().nonzero().flatten().tolist():
            rows, which = (chosen == expert).nonzero(as_tuple=True)
            gate, up, down = (f"{name}.experts.{expert}.{part}" for part in self._parts)
            inner = torch.nn.functional.silu(self._linear(gate, x[rows])) * self._linear(up, x[rows])
            total[rows] += self._linear(down, inner) * shares[rows, which, None]
        return total, best[:, -2] - best[:, -1]


def look_at(
    model: Mixture, prompt: list[int], tokens: list[int], said: dict[str, list[float]], nearest: int
) -> dict[str, Any]:
    """Returns how far engines are from float64, and from float64 with a tie decided the other way.

    Args:
        model: what answered.
        prompt: what it was asked.
        tokens: what it said.
        said: the log-probabilities of these tokens, by the engine's name.
        nearest: how many of the text's nearest ties are looked at.
    """
    text, first = [*prompt, *tokens][:-1], len(prompt) - 1
    at = torch.arange(first, len(text), device=model.device), torch.tensor(tokens, device=model.device)
    engines = {name: torch.tensor(values, device=model.device, dtype=torch.float64) for name, values in said.items()}

    def apart(expected: torch.Tensor) -> dict[str, float]:
        return {name: round((values - expected).abs().max().item(), 4) for name, values in engines.items()}

    everything, margins = model.logprobs(text)
    exact, ties = everything[at], []
    for place in margins.flatten().argsort()[:nearest].tolist():
        tie = Tie(*divmod(place, margins.shape[1]))
        other = model.logprobs(text, tie)[0][at]
        ties.append(
            {
                **tie._asdict(),
                "margin": round(margins[tie].item(), 6),
                "moves_logprobs_by": round((other - exact).abs().max().item(), 4),
                "apart_if_swapped": apart(other),
            }
        )
    return {"tokens": len(text), "apart": apart(exact), "ties": ties}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the AWQ checkpoint")
    parser.add_argument("engines", type=Path, nargs="+", help="what engines said of it, as sglang_tokens.py keeps it")
    parser.add_argument("--out", type=Path, help="results, JSON")
    parser.add_argument("--nearest", type=int, default=4, help="how many of a text's nearest ties are looked at (4)")
    options = parser.parse_args()

    model = Mixture(options.source)
    together, short = draw_prompts(model.config["vocab_size"])
    said = {str(path): json.loads(path.read_text("utf-8")) for path in options.engines}
    rows = []
    for way, prompts, key in (("together", together, "rows"), ("alone", short + together, "alone")):
        count = min(len(document[key]) for document in said.values())  # in vLLM only short ones go in alone
        for number, prompt in enumerate(prompts[:count]):
            texts: dict[tuple[int, ...], dict[str, list[float]]] = defaultdict(dict)
            for name, document in said.items():
                texts[tuple(document[key][number]["tokens"])][name] = document[key][number]["logprobs"]
            for tokens, values in texts.items():
                found = look_at(model, prompt, list(tokens), values, options.nearest)
                rows.append({"way": way, "prompt": number, **found})
    save(options.out, {**origin(), "rows": rows})
    pairs = [(each, name) for each in rows for name in each["apart"]]
    nearest = [min(row["apart"][name], *(tie["apart_if_swapped"][name] for tie in row["ties"])) for row, name in pairs]
    print(f"{len(pairs)} texts of {len(said)} engines: from float64 at most")
    print(f"{max(row['apart'][name] for row, name in pairs)} apart, with one tie decided either way {max(nearest)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
