"""The model card of a converted checkpoint: what it is, what loads it, what was checked, and the source's own card.

The source's front matter is kept as it is written, value by value, as text: it is composed to nodes and serialized
again, and no value is ever constructed, so nothing in it is executed, expanded, or turned into another type. Front
matter that is no plain YAML mapping is shown in the card's text. Equal inputs give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from awq2marlin._version import __version__
from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.errors import article, escaped, printable, size_text
from awq2marlin.formats.serving import Serving
from awq2marlin.pipeline.plan import Plan

if TYPE_CHECKING:
    from yaml import Node

    from awq2marlin.gemm.check import GemmRun

    _Entries = dict[str, tuple[Node, Node]]

#: Stands for the checkpoint's own place where nobody knows it yet; see `addressed`.
PLACEHOLDER = "THIS_MODEL"

#: Front matter above this is shown, not merged: the largest cards published have 400 kB of evaluation results.
MAX_FRONT_MATTER = 500_000

#: More files than this that were left behind are only counted.
_MAX_FILES_SHOWN = 100

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_YAML = "tag:yaml.org,2002:"
_WORD = r"(?i)(?!(?:null|true|false|yes|no|on|off|y|n)\Z)[a-z][a-z0-9_-]*|[0-9]-bit"  # compiled where it is needed
_TAGS = {_YAML + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")}
_HINT = f"(`{PLACEHOLDER}` is this folder's path, or the repository's name.)\n\n"
_HUB = "https://huggingface.co"


def model_card(
    plan: Plan,
    verified: Sequence[str],
    gemm: GemmRun | None,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
) -> bytes:
    """Returns the bytes of a converted checkpoint's ``README.md``.

    Args:
        plan: what was converted.
        verified: modules whose values were compared with the source's.
        gemm: what the Marlin GEMM said of them; None if it was not asked.
        repo_id: repository on the Hub that the source came from, if any.
        revision: commit of it.
    """
    card = plan.checkpoint.card
    text = plan.checkpoint.folder.read(card).decode("utf-8-sig", "replace") if card else ""
    front_matter, body = split_card(text)
    merged, problem = merge_front_matter(front_matter, _own_metadata(plan, repo_id))
    parts = [
        f"---\n{merged}---\n\n",
        plan.target.warning and f"{plan.target.warning}\n\n",
        f"# {_title(repo_id, plan)}\n\n",
        _what(plan, repo_id, revision),
        _how_to_load(plan),
        _what_was_checked(plan, verified, gemm),
        _how_to_check_and_revert(repo_id, revision, plan),
        _what_to_know(plan.checkpoint),
        _source_card(front_matter if problem else "", problem, body, plan.checkpoint.title),
    ]
    return "".join(parts).encode("utf-8")


def addressed(card: bytes, repo_id: str) -> bytes:
    """Returns a card whose commands name the repository that it is in.

    Args:
        card: as `model_card` made it; in one that somebody changed, only what still is the placeholder is replaced.
        repo_id: the repository.
    """
    return card.replace(_HINT.encode(), b"").replace(PLACEHOLDER.encode(), repo_id.encode())


def _title(repo_id: str | None, plan: Plan) -> str:
    name, source, target = repo_id and repo_id.partition("/")[2], plan.checkpoint.title, plan.target
    if name:
        return f"{name}, {target.title}"
    noun = f"{target.title} {source} checkpoint" if target.is_own else f"{target.title} checkpoint"
    return f"{article(noun)[0].upper()}{article(noun)[1:]}"


def _what(plan: Plan, repo_id: str | None, revision: str | None) -> str:
    quantization, target = plan.quantization, plan.target
    source = f"[{repo_id}]({_HUB}/{repo_id})" if repo_id else f"{article(plan.checkpoint.title)} checkpoint"
    if repo_id and revision:
        source += f" at revision [`{revision}`]({_HUB}/{repo_id}/tree/{revision})"
    groups = "one group a column" if quantization.group_size == -1 else f"group size {quantization.group_size}"
    points = "with zero points" if quantization.zero_point else "without zero points"
    version = f", format version {target.version}" if target.is_own else ""
    return (
        f"The weights of {source} ({quantization.bits} bits, {groups}, {points}), with its quantized layers in "
        f"{target.purpose} No weight was changed: "
        "the integers, scales and zero points are the same, in a different order. Made by awq2marlin "
        f"{__version__}{version}."
        "\n\n"
    )


def _how_to_load(plan: Plan) -> str:
    ways = "\n\n".join(map(_how_one_loads_it, plan.serving(PLACEHOLDER)))
    return f"## How to load it\n\n{_HINT}{ways}\n\n"


def _how_one_loads_it(serving: Serving) -> str:
    """Returns how one engine loads a checkpoint, or why it cannot, in Markdown."""
    engine = f"{serving.engine} {serving.versions}".rstrip()
    if serving.reason:
        return f"{engine} cannot serve this checkpoint: {serving.reason}."
    after = f", after `{serving.install}`{serving.where and f' {serving.where}'}" if serving.install else ""
    note = f"\n\n{serving.note}." if serving.note else ""
    return f"{engine}{after}:\n\n```{serving.language}\n{serving.command}\n```{note}"


def _what_was_checked(plan: Plan, verified: Sequence[str], gemm: GemmRun | None) -> str:
    padded = sum(module.is_padded for module in plan.converted)
    rows = [
        ("quantized layers", str(len(plan.modules))),
        (
            f"of these in the {plan.target.layout_title} layout",
            str(len(plan.converted)) + (f", {padded} padded with zeros" if padded else ""),
        ),
        *([("of these still in the AWQ layout", str(len(plan.kept)))] if plan.target.is_own else []),
        (
            "compared with the source, value for value",
            f"{len(verified)} of {len(plan.counterparts.rewritten)}: no difference" if verified else "not done",
        ),
    ]
    if not plan.target.is_own:
        pass  # no layer is in the GEMM's layout
    elif gemm is None:
        rows.append(("run through the Marlin GEMM", "not done"))
    else:
        rows += _gemm_rows(gemm)
    table = "".join(f"| {what} | {result} |\n" for what, result in rows)
    return f"## What was checked\n\n| | |\n| --- | --- |\n{table}\n"


def _gemm_rows(gemm: GemmRun) -> Iterator[tuple[str, str]]:
    what = f"run through the Marlin GEMM ({printable(gemm.device_name)})"
    yield what, f"{len(gemm.checks)}: identity activations reproduced every weight, bit for bit"
    if gemm.checks:
        worst = max(check.max_relative for check in gemm.checks)
        yield "largest error with random activations, against float64", f"{worst:.1%} of the bound"


def _what_to_know(checkpoint: Checkpoint) -> str:
    """Returns what is odd about the source, and every file that is not here; empty if nothing is."""
    left, parts = checkpoint.left_behind, []
    if checkpoint.oddities:
        parts.append("".join(f"* {_plain(oddity)}\n" for oddity in checkpoint.oddities))
    if left:
        shown = list(left)[:_MAX_FILES_SHOWN]
        lines = [f"* {_code(name)}: {size_text(checkpoint.left_behind_bytes[name])}, {left[name]}\n" for name in shown]
        more = f"* and {len(left) - len(shown)} more\n" if len(left) > len(shown) else ""
        parts.append(f"These files of the source were left behind and cannot be restored:\n\n{''.join(lines)}{more}")
    return "## What to know about the source\n\n" + "\n".join(parts) + "\n" if parts else ""


def _plain(sentence: str) -> str:
    """Returns a sentence with the names of strangers in it as Markdown that shows it as it is."""
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", escaped(sentence))


def _code(name: str) -> str:
    """Returns a name of a stranger as code in Markdown."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", name)), default=0))
    space = " " if fence != "`" else ""
    return f"{fence}{space}{printable(name)}{space}{fence}"


def _how_to_check_and_revert(repo_id: str | None, revision: str | None, plan: Plan) -> str:
    format, left = plan.checkpoint.title, plan.checkpoint.left_behind
    every = "Every file except those left behind" if left else "Every file"
    source = f"{repo_id}@{revision}" if repo_id and revision else repo_id or "SOURCE"
    return f"""To compare everything with the source:

```sh
awq2marlin verify {source} {PLACEHOLDER}
```

## How to get the {format} checkpoint back

{every} is restored byte for byte, the source's card included; the command prints each file's SHA-256:

```sh
awq2marlin revert {PLACEHOLDER} OUTPUT
```

"""


def _source_card(front_matter: str, problem: str, body: str, format: str) -> str:
    """Returns the source's own card, with its front matter where that could not be merged."""
    if not front_matter and not body.strip():
        return "The source has no card of its own.\n"
    parts = [f"---\n\n*What follows is the card of the source. It describes the {format} checkpoint.*\n\n"]
    if front_matter:
        longest = max((len(run) for run in re.findall("`+", front_matter)), default=0)
        fence = "`" * max(3, longest + 1)
        parts.append(f"Its front matter could not be merged ({problem}):\n\n{fence}yaml\n{front_matter}{fence}\n\n")
    return "".join([*parts, body.lstrip("\r\n")])


def split_card(text: str) -> tuple[str, str]:
    """Returns a card's front matter, without the lines of dashes and empty if it has none, and its body."""
    match = _FRONT_MATTER.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _own_metadata(plan: Plan, repo_id: str | None) -> dict[str, str | list[str]]:
    """Returns what our front matter says; lists are added to the source's, all else replaces it."""
    layouts = [plan.target.layout_name]
    if plan.target.is_own:  # engines take other formats for what their tags say
        layouts.insert(0, plan.counterparts.source.layout_name)
    own: dict[str, str | list[str]] = {
        "base_model_relation": "quantized",
        "library_name": plan.target.library_name,
        "tags": [*layouts, "awq2marlin", f"{plan.quantization.bits}-bit"],
    }
    return {"base_model": repo_id, **own} if repo_id else own


def merge_front_matter(source: str, own: dict[str, str | list[str]]) -> tuple[str, str]:
    """Merges front matter.

    Args:
        source: YAML that a stranger wrote, without the lines of dashes; may be empty, huge, broken or hostile.
        own: what to add: lists are joined with the source's, everything else replaces what the source says.

    Returns:
        YAML of one mapping, and why the source is not in it; empty if it is.
    """
    if not source.strip() and all(_is_word(value) for value in own.values()):
        return "".join(_lines(own)), ""  # PyYAML would say the same, but takes a while to import
    entries, problem = _entries(source)
    for key, value in own.items():
        node, theirs = entries.get(key, (_scalar(key), None))
        entries[key] = node, _joined(theirs, value) if isinstance(value, list) else _scalar(value)
    return _serialized(entries), problem


def _is_word(value: str | list[str]) -> bool:
    """Returns whether YAML needs no quotes for a text, or for every text of a list, and takes it for text."""
    return all(re.fullmatch(_WORD, each) for each in ([value] if isinstance(value, str) else value))


def _lines(own: dict[str, str | list[str]]) -> Iterator[str]:
    for key, value in own.items():
        yield (
            f"{key}: {value}\n"
            if isinstance(value, str)
            else "".join([f"{key}:\n", *(f"- {each}\n" for each in value)])
        )


def _entries(source: str) -> tuple[_Entries, str]:
    """Returns the nodes of a mapping's keys and values by the keys' names, or nothing and why."""
    import yaml

    if not source.strip():
        return {}, ""
    if len(source) > MAX_FRONT_MATTER:
        return {}, f"it has more than {MAX_FRONT_MATTER} characters"
    try:
        node = yaml.compose(source, yaml.SafeLoader)
    except yaml.YAMLError:
        return {}, "it is not YAML"
    except RecursionError:
        return {}, "it is nested too deeply"
    if node is None:
        return {}, ""
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        return {}, "it is not a mapping from names to values"
    if not _is_plain(node):
        return {}, "it has aliases, or types that YAML does not define"
    return {key.value: (key, value) for key, value in node.value}, ""


def _is_plain(root: Node) -> bool:
    """Returns whether nodes are a tree of YAML's own types: no aliases, no foreign tags."""
    seen: set[int] = set()
    waiting: list[Node] = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen or node.tag not in _TAGS:
            return False
        seen.add(id(node))
        if isinstance(node.value, list):
            for each in node.value:
                waiting += each if isinstance(each, tuple) else [each]
    return True


def _scalar(text: str) -> Node:
    import yaml

    return yaml.ScalarNode(_YAML + "str", text)


def _joined(theirs: Node | None, ours: list[str]) -> Node:
    """Returns a list of theirs, if it is text or a list, and of what it lacks of ours."""
    import yaml

    found = theirs.value if isinstance(theirs, yaml.SequenceNode) else [theirs]
    kept = [each for each in found if isinstance(each, yaml.ScalarNode) and each.tag != _YAML + "null"]
    known = {each.value for each in kept}
    added = [_scalar(each) for each in ours if each not in known]
    return yaml.SequenceNode(_YAML + "seq", [*kept, *added], flow_style=False)


def _serialized(entries: _Entries) -> str:
    import yaml

    node = yaml.MappingNode(_YAML + "map", list(entries.values()), flow_style=False)
    text: str = yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=1 << 20)
    return text
