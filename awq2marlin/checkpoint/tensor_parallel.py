"""Cutting Marlin modules for tensor parallelism: which cuts are exact, and how many ranks a checkpoint allows.

A slice of a Marlin tensor is the tensor of the slice where columns are cut at multiples of 64, and rows at
multiples of 16 that end a group (docs/marlin-native.md, "Slicing"). Where a cut is not exact, a loader brings the
module back to AWQ's plain order first, so it must be possible there: at whole words, and between groups. The rules of
vLLM decide which way a module is cut: the projections that close a block by rows, everything else by columns.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE, MARLIN_TILE_N, fused_siblings, fusion_group, is_expert
from awq2marlin.layout.modules import ModulePlan, is_models_output_embedding, module_name
from awq2marlin.layout.packing import pack_factor

#: Last name components of the modules that engines cut by rows.
ROW_PARALLEL_NAMES = frozenset(
    {"o_proj", "out_proj", "down_proj", "w2", "wo", "o", "down", "fc2", "fc_out", "c_proj", "dense", "dense_4h_to_h"}
)
#: Those that engines give whole to every rank.
REPLICATED_NAMES = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "gate", "shared_expert_gate"})
#: Those whose heads are repeated where there are fewer of them than ranks.
KEY_VALUE_NAMES = frozenset({"k_proj", "v_proj", "k", "v", "key", "value"})
#: Query, key and value, or gate and up, in one tensor of the file; each part is cut by itself.
FUSED_QKV_NAMES = frozenset({"qkv_proj", "qkv", "query_key_value", "Wqkv", "wqkv", "W_pack", "c_attn"})
FUSED_GATE_UP_NAMES = frozenset({"gate_up_proj", "gate_up"})

#: Parts of a multimodal model's config that speak of its language model, perhaps by a part of their own.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")

#: What SGLang's Marlin experts need of the hidden size: whole tiles of 128 columns.
_SGLANG_TILE_N = 128
#: What engines pad a vocabulary to a multiple of.
_VOCABULARY = 64
#: Last name component of a module that SGLang's models multiply themselves.
_SGLANG_READS_ITSELF = "kv_b_proj"

#: Modules of which engines make one matrix, unless a model is of one of these types. SGLang joins their tensors itself,
#: before the plugin sees them.
_LOW_RANK_NAMES = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})
_KEEPS_LOW_RANK_APART = ("minicpm3", "sarvam_mla")  # no set: what a config says may be anything, even unhashable

#: Types of models that multiply the inputs of experts by router weights; others say so in their config.
_WEIGH_INPUTS = ("llama4", "llama4_text")
_WEIGHS_INPUTS = "moe_apply_router_weight_on_input"

#: Ranks that are tried where the config does not say how many attention heads there are.
_COMMON_SIZES = (1, 2, 4, 8, 16, 32, 64)
_MOST_RANKS = 1024


class Heads(NamedTuple):
    """The attention heads of a model.

    Attributes:
        query: how many query heads, 0 if unknown.
        key_value: how many key and value heads, 0 if unknown.
    """

    query: int
    key_value: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads:
        """Returns what a model's ``config.json`` says, or that of its language model."""
        for document in _language_configs(config):
            query = _count(document.get("num_attention_heads"))
            if query:
                return cls(query, _count(document.get("num_key_value_heads")) or query)
        return cls(0, 0)


def _language_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields a config and those parts of it that speak of the language model, however deep."""
    yield config
    for name in _TEXT_CONFIGS:
        part = config.get(name)
        if isinstance(part, Mapping):
            yield from _language_configs(part)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 < value <= 1 << 20 else 0


def inexact_reason(size_k: int, widths: Iterable[int], group_size: int) -> str | None:
    """Returns why a slice of a Marlin module is not itself a Marlin tensor, in words, or None if it is.

    Args:
        size_k: rows of the slice.
        widths: columns of each part that is cut by itself (those of q, k and v, say).
        group_size: rows that share scales; -1 for all, then rows may be cut within the group.
    """
    for width in widths:
        if width <= 0 or width % MARLIN_TILE_N:
            return f"{width} columns on one rank are not a multiple of {MARLIN_TILE_N}"
    if size_k <= 0 or size_k % GPTQ_MARLIN_TILE:
        return f"{size_k} rows on one rank are not a multiple of {GPTQ_MARLIN_TILE}"
    if group_size != -1 and size_k % group_size:
        return f"{size_k} rows on one rank are not a multiple of the group size {group_size}"
    return None


def inexact_awq_reason(size_k: int, widths: Iterable[int], bits: int, group_size: int) -> str | None:
    """Returns why a slice of an AWQ module is not itself an AWQ tensor, in words, or None if it is.

    Args:
        size_k: rows of the slice.
        widths: columns of each part that is cut by itself.
        bits: 4 or 8.
        group_size: rows that share scales; -1 for all, then rows may be cut within the group.
    """
    for width in widths:
        if width <= 0 or width % pack_factor(bits):
            return f"{width} columns on one rank are not a multiple of {pack_factor(bits)}"
    if size_k <= 0 or (group_size != -1 and size_k % group_size):
        return f"{size_k} rows on one rank are not a multiple of the group size {group_size}"
    return None


@dataclass(frozen=True)
class Limit:
    """Why vLLM cannot cut a checkpoint over a number of ranks.

    Attributes:
        size: how many ranks.
        module: the first module that cannot be cut; empty if it is not for one of them.
        reason: why not, in words.
    """

    size: int
    module: str
    reason: str


class ParallelSizes(NamedTuple):
    """Over how many ranks vLLM can cut a checkpoint.

    Attributes:
        sizes: the numbers of ranks that work, ascending; empty if vLLM cannot load it at all.
        limit: why not the next one, the power of two above the largest; if none works, why not one.
        with_expert_parallel: those that work if vLLM gives every rank whole experts; empty without experts.
        only_in_vllm: why SGLang cannot load what vLLM can, in words; empty if it can.
        not_in_transformers: why Transformers cannot load it, in words; empty if it can.
    """

    sizes: tuple[int, ...] = ()
    limit: Limit = Limit(1, "", "not looked at")
    with_expert_parallel: tuple[int, ...] = ()
    only_in_vllm: str = ""
    not_in_transformers: str = ""

    @property
    def largest(self) -> int:
        """The largest number of ranks that works; 0 if none does."""
        return max(self.sizes, default=0)

    @property
    def unserved(self) -> str:
        """Why vLLM cannot load it at all, in words; empty if it can."""
        return "" if self.sizes else self.limit.reason

    @property
    def refusals(self) -> dict[str, str]:
        """Why engines cannot load it at all, in words, by the engine's name; without those that can."""
        reasons = {
            "vLLM": self.unserved,
            "SGLang": self.unserved or self.only_in_vllm,
            "Transformers": self.not_in_transformers,
        }
        return {engine: reason for engine, reason in reasons.items() if reason}


def parallel_sizes(
    modules: Iterable[ModulePlan], bits: int, group_size: int, config: Mapping[str, Any], tensors: Collection[str] = ()
) -> ParallelSizes:
    """Returns over how many ranks vLLM can cut a checkpoint, and what stands in the way of more.

    Ranks divide the attention heads, and no module is cut within a group, nor within a word of the source.

    Args:
        modules: every quantized module, as it lies in the file.
        bits: 4 or 8.
        group_size: rows of K that share scales, -1 for all.
        config: the model's ``config.json``.
        tensors: names of all tensors of the checkpoint, which tell what modules have biases.
    """
    modules = list(modules)
    joined = _joined(modules, config)
    if found := _mixture(joined, modules, tensors) or _weighed_experts(modules, config):
        return found

    heads = Heads.of(config)
    alike: dict[_Kind, ModulePlan] = {}
    for module in modules:
        alike.setdefault(_Kind.of(module, has_bias=module_name(module.name, "bias") in tensors), module)

    def limit(ranks: int, *, cuts_experts: bool = True) -> Limit | None:
        if heads.query % ranks:
            return Limit(ranks, "", f"{heads.query} attention heads cannot be split evenly")
        for kind, module in alike.items():
            reason = kind.obstacle(ranks if cuts_experts or not kind.is_expert else 1, bits, group_size, heads)
            if reason:
                return Limit(ranks, module.name, reason)
        return None

    tried = _tried_sizes(heads)
    sizes = tuple(size for size in tried if limit(size) is None)
    has_experts = any(kind.is_expert for kind in alike)
    whole = (size for size in tried if has_experts and limit(size, cuts_experts=False) is None)
    following = 1 << max(sizes, default=0).bit_length()
    stop = limit(following) or Limit(following, "", "more ranks were not tried")
    only_in_vllm = filter(None, [*(kind.refusal_of_sglang(bits) for kind in alike), *map(_Joined.unjoinable, joined)])
    return ParallelSizes(sizes, stop, tuple(whole), next(only_in_vllm, ""))


def mixture(modules: Iterable[ModulePlan], config: Mapping[str, Any], tensors: Collection[str]) -> ParallelSizes | None:
    """Returns that engines cannot load a checkpoint, as they join quantized modules with others; None if they do not.

    Args:
        modules: every quantized module.
        config: the model's ``config.json``.
        tensors: names of all tensors of the checkpoint.
    """
    modules = list(modules)
    return _mixture(_joined(modules, config), modules, tensors)


class _Joined(NamedTuple):
    """Quantized modules that stand side by side and of which engines make one matrix.

    Attributes:
        modules: those that there are, by their full names.
        names: full names of all that belong together, whether they exist or not.
    """

    modules: dict[str, ModulePlan]
    names: Sequence[str]

    def mixed(self, tensors: Container[str]) -> str:
        """Returns that some of them are not quantized, which engines cannot join with the others; empty if all are.

        Args:
            tensors: names of all tensors of the checkpoint.
        """
        plain = [name for name in self.names if name not in self.modules and module_name(name, "weight") in tensors]
        if not plain:
            return ""
        return f"{self._said(self.modules)} quantized and {self._said(plain)} not; its models join them in one matrix"

    def unjoinable(self) -> str:
        """Returns why SGLang cannot join the tensors of these modules before it loads them; empty if it can."""
        if {name.rpartition(".")[2] for name in self.modules} != _LOW_RANK_NAMES:
            return ""
        if any(module.is_padded for module in self.modules.values()):
            found = "padded"
        elif len({module.converted for module in self.modules.values()}) > 1:
            found = "in two layouts"
        else:
            return ""
        return f"{self._said(self.modules)} {found}; its models join them before they are loaded"

    def _said(self, chosen: Container[str]) -> str:
        """Returns the last components of names in their usual order, and the verb for them."""
        last = [name.rpartition(".")[2] for name in self.names if name in chosen]
        return f"{' and '.join(last)} {'is' if len(last) == 1 else 'are'}"


def _joined(modules: Iterable[ModulePlan], config: Mapping[str, Any]) -> list[_Joined]:
    """Returns the quantized modules that a model's engines join, by the place; no experts."""
    apart = any(document.get("model_type") in _KEEPS_LOW_RANK_APART for document in _language_configs(config))
    found: dict[str, _Joined] = {}
    for module in modules:
        names = fused_siblings(module.name)
        if len(names) > 1 and not (apart and module.name.rpartition(".")[2] in _LOW_RANK_NAMES):
            found.setdefault(names[0], _Joined({}, names)).modules[module.name] = module
    return list(found.values())


def _mixture(
    joined: Iterable[_Joined], modules: Iterable[ModulePlan], tensors: Collection[str]
) -> ParallelSizes | None:
    for each in joined:
        if reason := each.mixed(tensors):
            return ParallelSizes(limit=Limit(1, next(iter(each.modules)), reason))
    if plain := _plain_expert(modules, tensors):
        reason = "experts of which some are quantized and some are not; it computes those of a layer together"
        return ParallelSizes(limit=Limit(1, plain, reason), not_in_transformers=reason)
    return None


def _weighed_experts(modules: Iterable[ModulePlan], config: Mapping[str, Any]) -> ParallelSizes | None:
    expert = next((module.name for module in modules if is_expert(module.name)), "")
    documents = _language_configs(config)
    if not expert or not any(
        each.get("model_type") in _WEIGH_INPUTS or each.get(_WEIGHS_INPUTS) is True for each in documents
    ):
        return None
    reason = "experts whose inputs the model multiplies by router weights; its Marlin experts do not support that"
    return ParallelSizes(limit=Limit(1, expert, reason))


def _plain_expert(modules: Iterable[ModulePlan], tensors: Collection[str]) -> str:
    """Returns the first module of an expert that is not quantized beside others of its layer that are; or nothing.

    Args:
        modules: every quantized module.
        tensors: names of all tensors of the checkpoint.
    """
    quantized = {module.name for module in modules if is_expert(module.name)}
    layers = {fusion_group(name) for name in quantized}
    weights = (name.removesuffix(".weight") for name in tensors if layers and name.endswith(".weight"))
    return min((name for name in weights if name not in quantized and fusion_group(name) in layers), default="")


def _tried_sizes(heads: Heads) -> Sequence[int]:
    if not heads.query:
        return _COMMON_SIZES
    return [size for size in range(1, min(heads.query, _MOST_RANKS) + 1) if heads.query % size == 0]


def largest_tensor_parallel_size(
    modules: Iterable[ModulePlan], bits: int, group_size: int, config: Mapping[str, Any]
) -> int:
    """Returns the largest number of ranks over which vLLM can cut a checkpoint; 0 if it cannot load it at all.

    Args:
        modules: every quantized module, as it lies in the file.
        bits: 4 or 8.
        group_size: rows of K that share scales, -1 for all.
        config: the model's ``config.json``.
    """
    return parallel_sizes(modules, bits, group_size, config).largest


class _Kind(NamedTuple):
    """What decides how a module is cut; all modules of one kind are cut alike, and there are few kinds."""

    name: str
    size_k: int
    size_n: int
    is_padded: bool
    is_fused: bool
    is_expert: bool
    is_vocabulary: bool
    has_bias: bool
    has_zero_points: bool

    @classmethod
    def of(cls, module: ModulePlan, *, has_bias: bool) -> _Kind:
        """Returns the kind of a module."""
        name, group = module.name.rpartition(".")[2], fusion_group(module.name)
        return cls(
            name,
            module.size_k,
            module.size_n,
            module.is_padded,
            group != module.name or name in FUSED_QKV_NAMES | FUSED_GATE_UP_NAMES,
            group.endswith(".*"),
            is_models_output_embedding(module.name),
            has_bias,
            "qzeros" in module.parts,
        )

    def narrow_experts(self, multiple: int) -> str:
        """Returns that these are experts whose hidden size an engine's kernel does not take; empty if it does."""
        hidden_size = self.size_n if self.name in ROW_PARALLEL_NAMES else self.size_k
        if not self.is_expert or hidden_size % multiple == 0:
            return ""
        return f"experts of hidden size {hidden_size}; its kernel needs a multiple of {multiple}"

    def refusal_of_sglang(self, bits: int) -> str:
        """Returns why SGLang cannot load what vLLM may, in words; empty if it can."""
        if self.name == _SGLANG_READS_ITSELF and not (bits == 4 and self.has_zero_points):
            found = f"in {bits} bits" if bits != 4 else "without zero points"
            return f"{self.name} {found}; its models read that module themselves, as 4 bits with zero points only"
        return self.narrow_experts(_SGLANG_TILE_N)

    def obstacle(self, ranks: int, bits: int, group_size: int, heads: Heads) -> str | None:
        """Returns why a module of this kind cannot be cut in so many parts, in words, or None if it can."""
        if narrow := self.narrow_experts(MARLIN_TILE_N):
            return narrow
        if self.is_expert and self.has_bias:
            return "experts with biases, which the plugin does not load"
        if self.is_padded and not self.is_fused and ranks == 1:
            return None  # as it lies in the file
        slices = self._slices(ranks, heads)
        if isinstance(slices, str):
            return slices
        size_k, widths = slices
        return inexact_awq_reason(size_k, widths, bits, group_size)

    def _slices(self, ranks: int, heads: Heads) -> tuple[int, list[int]] | str:
        """Returns rows and widths of one rank's part, or why the ranks do not divide the module."""
        size_k, size_n, name = self.size_k, self.size_n, self.name
        if self.is_vocabulary:
            size_n += -size_n % _VOCABULARY
        if name in REPLICATED_NAMES:
            return size_k, [size_n]
        if name in ROW_PARALLEL_NAMES:
            return f"{size_k} rows are not a multiple of {ranks}" if size_k % ranks else (size_k // ranks, [size_n])
        uneven = f"{size_n} columns cannot be split evenly"
        if name in FUSED_QKV_NAMES and heads.query:
            head_size, rest = divmod(size_n, heads.query + 2 * heads.key_value)
            query = _share(heads.query * head_size, ranks)
            key = _key_value_share(heads.key_value * head_size, ranks, heads)
            return uneven if rest or query is None or key is None else (size_k, [query, key])
        if name in FUSED_GATE_UP_NAMES:
            half = _share(size_n // 2, ranks)
            return uneven if size_n % 2 or half is None else (size_k, [half])
        share = _key_value_share(size_n, ranks, heads) if name in KEY_VALUE_NAMES else _share(size_n, ranks)
        return uneven if share is None else (size_k, [share])


def _share(size: int, ranks: int) -> int | None:
    return None if size % ranks else size // ranks


def _key_value_share(size: int, ranks: int, heads: Heads) -> int | None:
    """Returns one rank's width of the key or value heads: of several ranks the same where there are more of them."""
    if heads.key_value and max(ranks, heads.key_value) % min(ranks, heads.key_value):
        return None
    return _share(size, min(ranks, heads.key_value or ranks))
