"""What the documents say is what the code does: examples run, links resolve, and every list is complete.

The examples of one document run in order, in one namespace, in a temporary folder that holds `EXAMPLES`; the Hub that
they speak of is one on loopback.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import shutil
import statistics
from collections.abc import Iterator
from operator import truediv
from pathlib import Path
from typing import Any

import pytest
import typer

import awq2marlin
from awq2marlin.checkpoint.manifest import Manifest, ManifestShard, SourceCard
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from awq2marlin.cli.app import app, main
from awq2marlin.cli.json import Report
from awq2marlin.error_codes import ERROR_CODES, table_rows
from awq2marlin.errors import STATUS
from awq2marlin.formats.base import Quantization
from awq2marlin.formats.registry import MARLIN_NATIVE
from awq2marlin.io.digest import digest_of
from awq2marlin.io.safetensors import Header
from awq2marlin.layout.marlin import FUSED_SIBLINGS
from awq2marlin.layout.scheme import Scheme

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "awq2marlin"
DOCS = ROOT / "docs"

#: AWQ checkpoints that the examples find in their folder.
EXAMPLES = ("model-awq", "Llama-3-8B-AWQ")


def _documents() -> list[Path]:
    """Every Markdown file of the project, but what lies in hidden or built folders."""
    skipped = {"build", "dist", "node_modules", "venv"}
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(part.startswith(".") or part in skipped for part in path.relative_to(ROOT).parts)
    )


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```\s*$", re.DOTALL | re.MULTILINE
)


def _python_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, code) of the fenced blocks marked ``python``."""
    for match in FENCE.finditer(text):
        if match["language"].strip() == "python":
            yield text.count("\n", 0, match.start("code")), match["code"]


READERS_PAGES = [path for path in _documents() if path.parent == DOCS or path == ROOT / "README.md"]
RUNNABLE = [path for path in READERS_PAGES if any(_python_blocks(path.read_text("utf-8")))]


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    """A temporary working folder that holds the checkpoints of the examples, with modules of both fates."""
    for name in EXAMPLES:
        write_checkpoint(tmp_path / name, llama_recipe(192, 512, 1, 64, 256, group_size=64, shards=2))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", RUNNABLE, ids=_name)
@pytest.mark.usefixtures("model_folder")
def test_python_examples_run(path, hub):
    hub.add_repository("org/model-awq", Path("model-awq").absolute())
    if path.name == "python.md":  # which says that it makes what it needs
        for name in EXAMPLES:
            shutil.rmtree(name)
    namespace = {"__name__": "__main__"}
    for line, code in _python_blocks(path.read_text("utf-8")):
        # Blank lines first, so that a traceback names the document's line.
        exec(compile("\n" * line + code, str(path), "exec"), namespace)


@pytest.mark.usefixtures("model_folder")
def test_the_first_commands_of_the_readme_run_as_they_stand(hub, capsys):
    hub.add_repository("Qwen/Qwen2.5-0.5B-Instruct-AWQ", Path("model-awq").absolute())
    blocks = [match["code"] for match in FENCE.finditer((ROOT / "README.md").read_text("utf-8"))]
    first = next(block for block in blocks if "convert Qwen/" in block)
    for line in first.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert (program, main([*arguments, "--quiet"])) == ("awq2marlin", 0), capsys.readouterr().err
    assert digest_of(Path("restored/config.json").read_bytes()) == digest_of(Path("model-awq/config.json").read_bytes())


def test_the_readme_installs_the_small_build_of_torch_before_what_would_fetch_the_large_one():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    installs = [line for line in lines if line.startswith("pip install")]
    assert installs[0].startswith("pip install torch --index-url https://download.pytorch.org/whl/cpu")


#: What says where a figure comes from: hosts, drivers, commits and dates.
PROVENANCE = re.compile(r"\b(EPYC|Xeon|driver \d|commit [0-9a-f]{7}|20\d\d-\d\d-\d\d)\b")


def test_where_figures_come_from_is_told_in_the_benchmarks_and_not_in_the_readme():
    assert not PROVENANCE.findall((ROOT / "README.md").read_text("utf-8"))
    assert PROVENANCE.findall((DOCS / "benchmarks.md").read_text("utf-8"))


def test_the_benchmarks_name_every_result_and_its_commit():
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    stored = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert stored == set(re.findall(r"\(\.\./benchmarks/results/([^)]+)\)", text))
    told = text + "".join((DOCS / f"{name}.md").read_text("utf-8") for name in ("vllm", "sglang", "transformers"))
    told += (ROOT / "kernels" / "README.md").read_text("utf-8")
    for name in sorted(stored):
        commits = re.findall(r'"commit": "([0-9a-f]{7,})', (ROOT / "benchmarks" / "results" / name).read_text("utf-8"))
        assert all(commit in told for commit in commits), f"no document tells the commit of {name}"


def _rows(result: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / result).read_text("utf-8"))["rows"]


def test_the_figures_of_the_readme_are_those_of_the_stored_results():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    served = _rows("serving_h200.json")[0]["engines"]
    source, converted = served["source"], served["converted"]
    for batch, words in (("1", "{:.2f} times as many"), ("64", "{:.2f} times at batch 64")):
        rates = [each["decode_tokens_per_s"][batch]["median"] for each in (converted, source)]
        assert words.format(rates[0] / rates[1]) in text
    prefill = converted["prefill_ms"]["median"] / source["prefill_ms"]["median"]
    assert f"Prefill takes {prefill:.2f} times as long" in text
    h100 = [row["engines"] for row in _rows("serving_h100.json")]
    dense, experts = (
        [each["median"] / one["source"]["decode_tokens_per_s"][batch]["median"]
         for batch, each in one["converted"]["decode_tokens_per_s"].items()]
        for one in h100[:2]
    )  # fmt: skip
    assert f"on an H100 {dense[0]:.2f} and {dense[1]:.2f} times" in text
    prefill = h100[0]["converted"]["prefill_ms"]["median"] / h100[0]["source"]["prefill_ms"]["median"]
    assert f"on the H200, {prefill:.2f} times on the H100" in text
    assert f"{experts[0]:.2f} times as many at batch 1, and {min(experts[1:]):.2f} to {max(experts[1:]):.2f}" in text
    saved = source["load_allocated_peak_mib"] - converted["load_allocated_peak_mib"]
    assert f"{saved / 1024:.0f} GiB less GPU memory" in text
    loaded = _rows("load_h200.json")[0]["awq"]
    assert f"{loaded['process_seconds']:.1f} of {loaded['ready_seconds']:.1f} seconds" in text
    linear, of_experts = (
        [statistics.geometric_mean(ratios) for ratios in of_best.values()]
        for of_best in (_linear_of_best(), _experts_of_best())
    )
    assert f"a linear layer takes {min(linear):.2f} to {max(linear):.2f} times as long" in text
    assert f"a layer of experts takes {min(of_experts):.2f} to {max(of_experts):.2f} times as long" in text


def _linear_of_best() -> dict[int, list[float]]:
    """Returns how long our GEMM takes beside the fastest peer, for each shape, by number of tokens."""
    of_best: dict[int, list[float]] = {}
    for row in _rows("gemm_h100.json"):
        of_best.setdefault(row["M"], []).append(row["us"] / min(row["peers_us"].values()))
    return of_best


def _experts_of_best() -> dict[int, list[float]]:
    """The same of a layer of experts, for each model with even routing. A run has ours and one peer."""
    of_best: dict[tuple[int, str], float] = {}
    for row in _rows("experts_h100.json"):
        if row["routing"] == "uniform":
            ours, peer = (times["block"] for times in row["us"].values())
            key = row["M"], row["model"]
            of_best[key] = max(of_best.get(key, 0.0), ours / peer)
    return {size: [ratio for (m, _), ratio in of_best.items() if m == size] for size, _ in of_best}


def _mean_and_worst(rows: list[dict[str, Any]], ours: str, peers: str) -> str:
    ratios = [row[ours] / min(row[peers].values()) for row in rows]
    return f"{statistics.geometric_mean(ratios):.2f} ({max(ratios):.2f})"


def test_the_figures_of_the_gemm_are_those_of_the_stored_results():
    text = (ROOT / "kernels" / "README.md").read_text("utf-8")
    sizes: dict[int, list[dict[str, Any]]] = {}
    for row in _rows("gemm_h100.json"):
        sizes.setdefault(row["M"], []).append(row)
    for size, rows in sizes.items():
        times = [[row[key] for row in rows] for key in ("us", "after_us")]
        times += [[row["peers_us"][peer] for row in rows] for peer in ("marlin", "machete", "humming")]
        times.append([row["matmul_us"] for row in rows])
        floors = [row["floor_us"] for row in rows]
        cells = [f"{statistics.geometric_mean(map(truediv, each, floors)):.2f}" for each in times]
        cells += [_mean_and_worst(rows, "us", "peers_us"), _mean_and_worst(rows, "after_us", "peers_after_us")]
        assert "| " + " | ".join([str(size), *cells]) + " | " in text
    dense = [statistics.geometric_mean(row["matmul_us"] / row["us"] for row in sizes[size]) for size in sizes]
    first, *many = dense[list(sizes).index(256) :]
    said = f"{first:.2f} times as long with 256 tokens, and {min(many):.2f} to {max(many):.2f} times beyond"
    told = " ".join(text.split())
    assert f"An fp16 product takes {said}" in told
    few: dict[int, list[float]] = {}
    for row in _rows("gemm_few_h100.json"):
        few.setdefault(row["M"], []).append(row["us"] / row["before_us"])
    said = "{:.2f}, {:.2f} and {:.2f} times as long with 32, 48 and 64 tokens, and {:.2f} and {:.2f} with 96 and 128"
    assert said.format(*map(statistics.geometric_mean, few.values())) in told


def test_the_figures_of_the_experts_are_those_of_the_stored_results():
    told = (DOCS / "benchmarks.md").read_text("utf-8").partition("## Layers of experts")[2]
    for size, ratios in _experts_of_best().items():
        line = next(line for line in told.splitlines() if line.startswith(f"| {size} | "))
        assert f"| {statistics.geometric_mean(ratios):.2f} ({max(ratios):.2f}) |" in line


LINK = re.compile(r"!?\[[^\]\[]*\]\((?P<target>[^()\s]+)\)")


def _prose(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", _documents(), ids=_name)
def test_relative_links_resolve(path):
    for match in LINK.finditer(_prose(path.read_text("utf-8"))):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (path.parent / target) if target else path
        assert linked.exists(), f"{_name(path)} links to {match['target']}, which does not exist"
        if anchor and linked.suffix == ".md":
            assert anchor in _anchors(linked.read_text("utf-8")), f"{_name(path)} links to {match['target']}"


#: Habits of translated prose that CONTRIBUTING.md names, with what English says instead.
HABITS = {
    r"\banew\b": "again",
    r"\b(is|are|was|were) told\b": "is reported, the message says",
    r"\bas far as\b": "if, up to",
    r"\bthat is none\b": "that is not",
    r"\bof (our own|ours)\b": "this package's",
    r"\bsuch a one\b": "this, one of these",
    r"\bin the place of\b": "instead of",
    r"\b(as it|as they) (stands?|lies?)\b": "as it is",
}


@pytest.mark.parametrize("path", [path for path in _documents() if path.name != "CONTRIBUTING.md"], ids=_name)
def test_documents_are_in_plain_english(path):
    prose = _prose(path.read_text("utf-8"))
    prose = prose.partition("<!-- keys: error codes -->")[0]  # those come from the code
    found = {match[0]: better for habit, better in HABITS.items() for match in re.finditer(habit, prose)}
    assert not found, f"{_name(path)} has what this dictionary's keys say; its values are better"


@pytest.mark.parametrize("path", [path for path in _documents() if path.parent in (ROOT, DOCS)], ids=_name)
def test_lines_of_documents_but_those_of_tables_fit_120_columns(path):
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    long = [
        f"{_name(path)}:{number}" for number, line in lines if len(line) > 120 and not line.lstrip().startswith("|")
    ]
    assert not long


def _options() -> dict[str, set[str]]:
    """The options of every command, as its ``--help`` shows them."""
    group = typer.main.get_command(app)
    assert hasattr(group, "commands")
    commands = {"": group, **group.commands}
    help_names = set(group.context_settings["help_option_names"])
    return {
        name: help_names | {option for each in command.params for option in each.opts if option.startswith("-")}
        for name, command in commands.items()
    }


def _code(text: str) -> Iterator[str]:
    """Yields the commands of fenced blocks, continued lines joined, and the inline code outside of them."""
    for match in FENCE.finditer(text):
        for line in match["code"].replace("\\\n", " ").splitlines():
            yield from re.split(r" (?:&&|\||;) ", line)
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def test_options_named_in_documents_exist():
    options = _options()
    every = set().union(*options.values())
    for path in _documents():
        for line in _code(path.read_text("utf-8")):
            code = line.strip().removeprefix("$ ").removeprefix("python -m ")
            if code.startswith("--"):
                option = re.split(r"[ =]", code)[0]
                assert option in every, f"{_name(path)}: no command has the option {option}"
            elif code.startswith("awq2marlin ") and len(words := shlex.split(code, comments=True)) > 1:
                command = "" if words[1].startswith("-") else words[1]
                if command != "COMMAND":
                    assert command in options, f"{_name(path)}: there is no command in {code!r}"
                    named = {word.split("=")[0] for word in words[1:] if word.startswith("-") and word != "-"}
                    assert named <= options[command], f"{_name(path)}: {code!r} has an option that is not there"


def test_every_option_is_described():
    text = "\n".join(path.read_text("utf-8") for path in READERS_PAGES)
    missing = {
        option for each in _options().values() for option in each if option.startswith("--") and option not in text
    }
    assert not missing, f"no document names {sorted(missing)}"


def _table(document: str, keys: str) -> list[str]:
    """Returns the first column of the table that ``<!-- keys: ... -->`` heads, without its back quotes."""
    _, marker, rest = (DOCS / document).read_text("utf-8").partition(f"<!-- keys: {keys} -->\n")
    assert marker, f"docs/{document} has no table of {keys}"
    table = rest.split("\n\n")[0].splitlines()[2:]
    return [name for row in table for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_format_document_lists_the_config_keys():
    quantization = Quantization(Scheme(4, 128, True), padded_modules={"module": (64, 64)})
    written = MARLIN_NATIVE.write_config(quantization)
    assert sorted(_table("marlin-native.md", "quantization_config")) == sorted(written)


def test_format_document_lists_the_manifest_keys():
    file = digest_of(b"")
    shard = ManifestShard(Header(b"{}", {}), file, file)
    manifest = Manifest(
        {"<file>": shard},
        {"<file>": ""},
        {"<file>": file},
        {"<file>": file},
        None,
        None,
        {"<file>": ""},
        card=SourceCard.of("", b""),
        restores="tensors",
        made={"<file>": file},
    )
    written = list(_paths(json.loads(manifest.encode())))
    assert sorted(_table("marlin-native.md", "manifest")) == sorted(written)


def _paths(document: object, prefix: str = "") -> Iterator[str]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _paths(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix


def test_format_document_lists_the_fused_modules():
    _, _, rest = (DOCS / "marlin-native.md").read_text("utf-8").partition("| family |\n| --- |\n")
    rows = rest.split("\n\n")[0].splitlines()
    assert [tuple(re.findall(r"`([^`]+)`", row)) for row in rows] == list(FUSED_SIBLINGS)


def test_json_document_lists_the_keys_of_a_report():
    assert _table("json.md", "report") == list(Report("convert").document(0))


@pytest.mark.usefixtures("model_folder", "hub")
def test_json_document_lists_the_keys_of_every_command(capsys):
    def run(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--quiet", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    convert = run("convert", "model-awq", "model-marlin")
    assert _table("json.md", "convert modules") == list(convert["modules"][0])
    assert _table("json.md", "convert details") == list(convert["details"])
    verify = run("verify", "model-awq", "model-marlin")
    assert _table("json.md", "convert modules") == list(verify["modules"][0])
    assert _table("json.md", "verify details") == list(verify["details"])
    inspect = run("inspect", "model-marlin")
    assert _table("json.md", "inspect modules") == list(inspect["modules"][0])
    assert _table("json.md", "inspect details") == list(inspect["details"])
    for each in (*convert["details"]["serving"], *inspect["details"]["serving"]):
        assert _table("json.md", "serving") == list(each)
    Path("list.txt").write_text("model-awq\n")
    batch = run("batch", "list.txt", "--out-dir", "many")
    assert _table("json.md", "batch details") == list(batch["details"])
    record = json.loads(Path("list.txt.record.jsonl").read_text())
    assert _table("json.md", "record") == list(record)
    assert sorted(batch["details"]["items"][0]) == sorted({*record, "earlier", "written", "needs"} - {"version"})
    revert = run("revert", "model-marlin", "model-back")
    assert revert["modules"] == []
    assert _table("json.md", "revert details") == list(revert["details"])
    push = run("push", "model-marlin", "org/model-marlin")
    assert (push["modules"], _table("json.md", "push details")) == ([], list(push["details"]))
    gemm = run("verify", "model-awq", "model-marlin", "--device", "cpu")["details"]["gemm"]
    assert _table("json.md", "gemm") == list(gemm[0])
    assert _table("json.md", "doctor details") == list(run("doctor")["details"])
    demo = run("demo")
    assert _table("json.md", "convert details") + _table("json.md", "demo details") == list(demo["details"])


def test_json_examples_have_the_shape_of_a_report():
    blocks = [match["code"] for match in FENCE.finditer((DOCS / "json.md").read_text("utf-8"))]
    keys = list(Report("convert").document(0))
    assert list(json.loads(blocks[0])["details"]) == _table("json.md", "convert details")
    assert list(json.loads(blocks[0])["modules"][0]) == _table("json.md", "convert modules")
    assert [(list(json.loads(block)), json.loads(block)["status"]) for block in blocks] == [
        (keys, "done"),
        (keys, "failed"),
    ]


@pytest.mark.usefixtures("model_folder")
def test_the_refusal_in_the_json_document_is_what_a_refusal_says(capsys):
    blocks = [match["code"] for match in FENCE.finditer((DOCS / "json.md").read_text("utf-8"))]
    assert main(["convert", "model-awq", "model-marlin", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["convert", "model-marlin", "--quiet", "--json"]) == 1
    assert {**json.loads(capsys.readouterr().out), "seconds": 0.231} == json.loads(blocks[1])


def test_json_document_lists_every_status():
    text = (DOCS / "json.md").read_text("utf-8")
    found = re.findall(r"^\| `([a-z]+)` \| (\d+) \|", text, re.MULTILINE)
    assert {int(code): status for status, code in found} == STATUS


def test_json_document_has_the_registry_of_error_codes():
    rest = (DOCS / "json.md").read_text("utf-8").partition("<!-- keys: error codes -->\n")[2]
    listed = rest.split("\n\n")[0].splitlines()[2:]
    assert listed == table_rows(), "python -m awq2marlin.error_codes prints the rows"
    assert list(ERROR_CODES) == sorted(ERROR_CODES)


def test_every_error_code_is_used_and_no_other():
    used, made = set(), set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "error_codes.py":
            tree = ast.parse(path.read_text("utf-8"))
            used |= {text for node in ast.walk(tree) for text in _handed_on(node)}
            made |= {code for node in ast.walk(tree) for code in _made_with(node)}
    assert ERROR_CODES.keys() - used == set()
    assert made - ERROR_CODES.keys() == set()
    assert len(made) > len(ERROR_CODES) / 2, "the test no longer sees how problems are made"


def _handed_on(node: ast.AST) -> Iterator[str]:
    """Yields the texts that a node hands on: to a call, or in a tuple, as the tables and generators of problems do."""
    if isinstance(node, (ast.Call, ast.Tuple, ast.IfExp)):
        yield from (each.value for each in ast.iter_child_nodes(node) if isinstance(each, ast.Constant))


def _made_with(node: ast.AST) -> Iterator[str]:
    """Yields the code in a call that makes a problem, if it stands there in words."""
    place = {"Problem": 2, "refuse": 0, "difference": 0}.get(getattr(getattr(node, "func", None), "id", ""))
    if place is not None and len(node.args) > place and isinstance(node.args[place], ast.Constant):
        yield node.args[place].value


def test_design_document_lists_the_floors():
    from tests.test_package import FLOORS

    folders = [name for name in reversed(FLOORS) if (PACKAGE / name).is_dir()]
    assert _table("design.md", "floors") == folders
    text = (DOCS / "design.md").read_text("utf-8")
    for name in folders:
        says = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text("utf-8")))
        assert says
        assert f"| `{name}` | {says.splitlines()[0].removesuffix('.')}" in text, name


def test_python_document_lists_the_arguments_of_every_function():
    text = (DOCS / "python.md").read_text("utf-8")
    table = text.partition("| function | arguments | result |\n| --- | --- | --- |\n")[2].split("\n\n")[0]
    assert table
    for row in table.splitlines():
        name, arguments, result = (re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|"))
        signature = inspect.signature(getattr(awq2marlin, name[0]))
        written = [
            each.name if each.default is each.empty else f"{each.name}={json.dumps(each.default)}"
            for each in signature.parameters.values()
        ]
        for python, other in (("None", "null"), ("False", "false")):
            written = [each.replace(f"={other}", f"={python}") for each in written]
        assert (arguments, result) == (written, [signature.return_annotation]), name


def test_python_document_names_every_public_name():
    text = (DOCS / "python.md").read_text("utf-8")
    missing = [name for name in awq2marlin.__all__ if f"`{name}`" not in text and f"`{name}(" not in text]
    assert not missing, f"docs/python.md does not name {missing}"
