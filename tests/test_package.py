"""What the package promises as a whole: light imports, lasting names, imports one way, docstrings."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import awq2marlin
from awq2marlin.checkpoint.synthetic import llama_recipe, write_checkpoint
from tests.skips import NOT_INSTALLED

PACKAGE = Path(awq2marlin.__file__).parent
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
PUBLIC_FUNCTIONS = ("convert", "convert_many", "verify", "revert", "push", "inspect", "demo")

#: The floors of the house, lowest first: a folder, or a file of the ground floor, imports only from below.
FLOORS = [
    "_version",
    "installing",
    "error_codes",
    "errors",
    "arguments",
    "progress",
    "io",
    "layout",
    "formats",
    "checkpoint",
    "gemm",
    "integrations",
    "hub",
    "verification",
    "pipeline",
    "commands",
    "batch",
    "cli",
    "__main__",
]


def run_python(code, *arguments, cwd=None):
    """Runs code in a fresh interpreter that finds this package; returns what it printed."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- imports are light ------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_torch_numpy_or_numba():
    out = run_python(
        "import sys, awq2marlin\n"
        "dir(awq2marlin), awq2marlin.__version__\n"
        "print([name for name in ('torch', 'numpy', 'numba', 'typer', 'safetensors') if name in sys.modules])\n"
        "print([name for name in sys.modules if name.startswith('awq2marlin.')])"
    )
    assert out.splitlines() == ["[]", "['awq2marlin._version']"]


def test_help_imports_no_torch_numpy_or_numba():
    out = run_python(
        "import sys\n"
        "from awq2marlin.cli import main\n"
        "code = main(['--help'])\n"
        "print(code, [name for name in ('torch', 'numpy', 'numba') if name in sys.modules])"
    )
    assert "convert" in out
    assert out.splitlines()[-1] == "0 []"


COMMANDS = """
import sys
from awq2marlin.cli import main
source, output, back = sys.argv[1:]
codes = [
    main(["convert", source, output, "--quiet", "--verify", "all"]),
    main(["verify", source, output, "--quiet"]),
    main(["inspect", output, "--json"]),
    main(["revert", output, back, "--quiet"]),
]
print(codes, [name for name in ("torch", "huggingface_hub") if name in sys.modules])
"""


def test_commands_on_a_cpu_import_no_torch_and_no_client_of_the_hub(tmp_path):
    source, output, back = tmp_path / "source", tmp_path / "output", tmp_path / "back"
    write_checkpoint(source, llama_recipe(128, 256, 1, 64, 32, group_size=64))
    out = run_python(COMMANDS, source, output, back, cwd=tmp_path)
    assert out.splitlines()[-1] == "[0, 0, 0, 0] []"
    assert (output / "config.json").is_file()
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


CONVERSION = """
import sys
before = {*sys.modules}
from awq2marlin import convert
convert(*sys.argv[1:])
loaded = {*sys.modules} - before
print(*sorted({name.partition(".")[0] for name in loaded} - sys.stdlib_module_names))
from awq2marlin.formats.registry import HOMES
print(*sorted(file for file, _ in HOMES if f"awq2marlin.formats.{file}" in loaded))
print(*sorted(loaded & {"importlib.metadata", "filelock._soft"}))
"""
QUIET = """
import gc, sys
from awq2marlin.cli import main
code = main(["convert", *sys.argv[1:], "--quiet"])
print(code, *sorted(name for name in sys.modules if name.startswith("awq2marlin.cli.")))
"""


def test_a_conversion_imports_what_it_needs_and_no_more(tmp_path):
    """Importing is nine tenths of the CPU time of a tiny conversion."""
    write_checkpoint(tmp_path / "source", llama_recipe(128, 256, 1, 64, 32, group_size=64))
    run_python(CONVERSION, tmp_path / "source", tmp_path / "first")  # which may have to compile the kernels
    assert run_python(CONVERSION, tmp_path / "source", tmp_path / "second").splitlines() == [
        "awq2marlin filelock llvmlite numpy xxhash",
        "awq_gemm marlin_native",
        "",
    ]


def test_a_quiet_command_imports_no_printer_and_leaves_without_looking_for_cycles(tmp_path):
    write_checkpoint(tmp_path / "source", llama_recipe(128, 256, 1, 64, 32, group_size=64))
    out = run_python(
        QUIET + "import atexit; atexit._run_exitfuncs(); print(gc.get_freeze_count() > 10_000)",
        tmp_path / "source",
        tmp_path / "output",
    )
    names = [f"awq2marlin.cli.{name}" for name in ("app", "help", "options", "outcome", "terminal")]
    assert out.splitlines() == [" ".join(["0", *names]), "True"]


PLAIN_CONVERSION = """
import sys
from awq2marlin.cli import main
code = main(["convert", *sys.argv[1:], "--quiet", "--verify", "none"])
print(code, *sys.modules)
"""

#: What a conversion from a folder to a folder does not use: a short start is a part of its speed.
UNUSED = {
    "asyncio",
    "awq2marlin.pipeline.departures",
    "awq2marlin.hub.repository",
    "awq2marlin.hub.publication",
    "awq2marlin.layout.reference",
    "awq2marlin.commands.push",
    "awq2marlin.verification.headers",
    "awq2marlin.verification.values",
    "rich",
    "tqdm",
    "yaml",
}


def test_a_conversion_imports_only_what_it_uses(tmp_path):
    write_checkpoint(tmp_path / "source", llama_recipe(128, 256, 1, 64, 32, group_size=64))
    code, *imported = run_python(PLAIN_CONVERSION, tmp_path / "source", tmp_path / "output").split()
    assert code == "0"
    assert sorted(UNUSED & {*imported}) == []


NO_PROBE = """
import torch

def probe(*args, **kwargs):
    raise RuntimeError("a GPU was probed")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability",
             "get_device_name", "init", "_lazy_init"):
    setattr(torch.cuda, name, probe)

import awq2marlin
from awq2marlin import layout
layout.verify_marlin_supported(awq2marlin.SCALAR_TYPE_UINT4, 128, True)
layout.verify_marlin_supports_shape(64, 128, 128, 128)
awq2marlin.AWQMarlinConfig(4, 128, True).get_supported_act_dtypes()
layout.marlin_make_workspace("cpu")
layout.marlin_make_empty_g_idx("cpu")
layout.awq_marlin_repack(torch.zeros(16, 8, dtype=torch.int32), 16, 64, 4)
print(torch.cuda.is_initialized())
"""


def test_importing_the_layout_and_checking_support_probes_no_gpu():
    assert run_python(NO_PROBE).split() == ["False"]


def test_making_a_config_imports_no_torch():
    out = run_python(
        "import sys, awq2marlin\n"
        "config = awq2marlin.AWQMarlinConfig.from_config({'bits': 4, 'group_size': 128})\n"
        "print(config.quant_type, 'torch' in sys.modules)"
    )
    assert out.split() == ["uint4", "False"]


# --- names last -------------------------------------------------------------------------------------------

#: Other libraries are imported once; two children then import every submodule, one of them asks for the names before.
WALK = """
import contextlib, importlib, os, pkgutil, types
for library in ("torch", "transformers"):
    with contextlib.suppress(ImportError):
        importlib.import_module(library)
names = {names!r}
are_asked_for_before = os.fork() == 0
import awq2marlin
if are_asked_for_before:
    exec("from awq2marlin import " + ", ".join(names))
for module in pkgutil.walk_packages(awq2marlin.__path__, "awq2marlin."):
    if module.name.count(".") < 3:  # modules of an engine's plugin need the engine
        importlib.import_module(module.name)
for name in names:
    value = getattr(awq2marlin, name)
    assert isinstance(value, types.FunctionType), (name, value)
    assert value.__name__ == name and value.__module__.startswith("awq2marlin."), value
if not are_asked_for_before:
    assert os.wait()[1] == 0
print("callable", flush=True)
"""


def test_public_functions_stay_callable_after_every_submodule_was_imported():
    assert run_python(WALK.format(names=PUBLIC_FUNCTIONS)).split() == ["callable", "callable"]


def test_no_submodule_bears_a_public_name():
    submodules = {module.name for module in pkgutil.iter_modules(awq2marlin.__path__)}
    assert submodules.isdisjoint(awq2marlin.__all__)
    assert submodules.isdisjoint(PUBLIC_FUNCTIONS)


@pytest.mark.parametrize("name", awq2marlin.__all__)
def test_every_public_name_resolves(name):
    value = getattr(awq2marlin, name)
    if inspect.isfunction(value) or inspect.isclass(value):
        assert value.__name__ == name


def test_public_names_are_those_that_users_are_told_of():
    assert set(PUBLIC_FUNCTIONS) <= set(awq2marlin.__all__)
    assert dir(awq2marlin) == sorted(awq2marlin.__all__)
    assert len(set(awq2marlin.__all__)) == len(awq2marlin.__all__)
    namespace = {}
    exec("from awq2marlin import *", namespace)
    assert set(awq2marlin.__all__) <= set(namespace)


def test_the_whole_layout_that_users_are_told_of_is_public():
    told = {
        "AWQMarlinConfig",
        "GPTQ_MARLIN_MIN_THREAD_K",
        "GPTQ_MARLIN_MIN_THREAD_N",
        "GPTQ_MARLIN_TILE",
        "MARLIN_SUPPORTED_GROUP_SIZES",
        "SCALAR_TYPE_UINT4",
        "SCALAR_TYPE_UINT8",
        "awq_marlin_repack",
        "awq_to_marlin_zero_points",
        "get_scale_perms",
        "is_aligned",
        "marlin_make_empty_g_idx",
        "marlin_make_workspace",
        "marlin_permute_scales",
        "marlin_zero_points",
        "pack_cols",
        "replace_parameter",
        "unpack_cols",
        "verify_marlin_supported",
        "verify_marlin_supports_shape",
    }
    inverses = {
        "marlin_awq_repack",
        "marlin_to_awq_zero_points",
        "marlin_unpack_zero_points",
        "marlin_unpermute_scales",
    }
    assert sorted((told | inverses) - set(awq2marlin.__all__)) == []


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="'awq2marlin' has no attribute 'no_such_name'"):
        _ = awq2marlin.no_such_name
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from awq2marlin import no_such_name")


def test_what_type_checkers_see_is_what_is_imported():
    block = next(node for node in tree("__init__").body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is not exported as itself"
            seen[alias.name] = node.module.removeprefix("awq2marlin.")
    assert seen == awq2marlin._HOMES


# --- imports go one way -----------------------------------------------------------------------------------


@cache
def tree(module):
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8"))


@cache
def imports(module):
    """Modules of the package that a module imports, wherever in it, with the line."""
    found = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}.py:{node.lineno}: imports are absolute"
            if node.module == "awq2marlin":
                names = [alias.name for alias in node.names]
            elif (node.module or "").startswith("awq2marlin."):
                inside = node.module.removeprefix("awq2marlin.")
                is_package = PACKAGE.joinpath(*inside.split("."), "__init__.py").exists()
                names = [f"{inside}.{alias.name}" for alias in node.names] if is_package else [inside]
            else:
                continue
        elif isinstance(node, ast.Import):
            names = [alias.name.removeprefix("awq2marlin.") for alias in node.names if alias.name.startswith("awq2m")]
        else:
            continue
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def third_party(module, at_top_level=False):
    """Names of the foreign packages that a module imports."""
    nodes = tree(module).body if at_top_level else ast.walk(tree(module))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"awq2marlin"}


def floor(module):
    return module.partition(".")[0]


def test_every_module_stands_on_a_floor():
    assert {floor(module) for module in MODULES} - {"__init__"} == {*FLOORS}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_a_folder_imports_only_folders_below_it(module):
    upward = [
        f"{module}.py:{line} imports {other}"
        for other, line in imports(module).items()
        if floor(other) != floor(module) and FLOORS.index(floor(other)) > FLOORS.index(floor(module))
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    below = {module: {other for other in imports(module) if other in MODULES} for module in MODULES}
    while free := [module for module, others in below.items() if not others & below.keys()]:
        for module in free:
            del below[module]
    assert below == {}


@pytest.mark.parametrize("folder", [name for name in FLOORS if (PACKAGE / name).is_dir()])
def test_a_folder_says_what_it_is_for(folder):
    assert importlib.import_module(f"awq2marlin.{folder}").__doc__


def test_the_package_itself_imports_only_its_version():
    top = [node for node in tree("__init__").body if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in top if node.module.startswith("awq2marlin")] == ["awq2marlin._version"]


def test_verification_shares_no_code_with_the_converter_s_repack():
    assert imports("layout.reference") == {}
    used = {"layout.repack", "layout.cpu_kernels", "layout.torch_functions", "pipeline.shard", "commands.convert"}
    for module in ("commands.verify", "verification.values", "verification.headers"):
        assert used.isdisjoint(imports(module)), module


def test_file_reading_knows_no_format():
    known = {floor(other) for module in MODULES if floor(module) == "io" for other in imports(module)}
    assert known <= {"io", "errors"}


def test_only_what_computes_with_tensors_imports_torch():
    with_torch = {module for module in MODULES if "torch" in third_party(module) and "integrations" not in module}
    gemm = {f"gemm.{name}" for name in ("check", "checks", "config", "cpu", "dispatch", "driver", "launch", "linear")}
    gemm |= {"gemm.module_repack", "gemm.ops"}
    gemm |= {f"gemm.experts.{name}" for name in ("checks", "cpu", "launch", "ops")}
    assert with_torch | {"gemm.experts.launch"} == {
        *gemm,
        "layout.torch_functions",
        "layout.torch_parts",
        "commands.doctor",
    }
    assert "torch" not in {node.names[0].name for node in tree("gemm.config").body if isinstance(node, ast.Import)}


def test_every_foreign_package_is_a_declared_dependency():
    text = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    declared = set(re.findall(r'^    "([\w-]+)', text.split("\ndependencies = [")[1].split("\n]")[0], re.MULTILINE))
    declared |= {"yaml"} if "pyyaml" in declared else set()  # a module is not always called as its distribution is
    declared |= {"cuda", "distributed", "matplotlib"}  # the extras; imported where they are used
    used = {name for module in MODULES for name in third_party(module) if not module.startswith("integrations.")}
    assert used <= declared, f"not declared: {sorted(used - declared)}"


def test_a_loader_imports_its_own_engine_only_and_nothing_imports_a_loader():
    for module in MODULES:
        engine = module.split(".")[1] if module.startswith("integrations.") else ""
        assert third_party(module) & {"transformers", "vllm"} <= {engine}, module
        assert engine or not any(name.startswith("integrations") for name in imports(module)), module


# --- documentation ----------------------------------------------------------------------------------------


def definitions(node, prefix=""):
    """Public functions, classes and methods: (qualified name, node)."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_definition_has_a_docstring(module):
    assert ast.get_docstring(tree(module)), f"{module}.py has no docstring"
    missing = [
        f"{module}.py:{node.lineno} {name}"
        for name, node in definitions(tree(module))
        if not ast.get_docstring(node) and not says_enough(name, node)
    ]
    assert missing == []


def says_enough(name, node):
    """Whether a method needs no sentence: it is two statements, or a protocol says what it is for."""
    return "." in name and (len(node.body) <= 2 or name.rpartition(".")[2] in protocol_methods())


@cache
def protocol_methods():
    protocols = [
        node
        for module in MODULES
        for node in tree(module).body
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
    ]
    return {name for protocol in protocols for name, _ in definitions(protocol)}


@pytest.mark.parametrize(
    "name", [name for name in awq2marlin.__all__ if awq2marlin._HOMES.get(name) == "layout.torch_functions"]
)
def test_layout_docstrings_tell_arguments_and_errors(name):
    function = getattr(awq2marlin, name)
    text = inspect.getdoc(function)
    parameters = list(inspect.signature(function).parameters)
    undone = text.startswith("Undoes") and "Args:" not in text  # refers to the map that it undoes
    missing = [] if undone else [parameter for parameter in parameters if f"{parameter}:" not in text]
    assert missing == [], f"{name} does not describe {missing}"
    raises = "pack" in name or "permute" in name or "zero_points" in name or "verify" in name
    assert undone or not raises or "ValueError" in text, f"{name} does not say what it raises"


def test_zero_point_functions_say_that_size_k_is_the_number_of_groups():
    for name in ("marlin_zero_points", "awq_to_marlin_zero_points"):
        assert "size_k: the number of groups" in inspect.getdoc(getattr(awq2marlin, name)), name


# --- the distribution -------------------------------------------------------------------------------------


def test_the_version_is_written_once_and_is_the_distribution_s():
    version = (PACKAGE / "_version.py").read_text("utf-8").split('__version__ = "')[1].split('"')[0]
    assert awq2marlin.__version__ == version
    try:
        installed = importlib.metadata.version("awq2marlin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(NOT_INSTALLED)
    assert installed == version, "install the package again: its metadata is of another version"


def test_nothing_sends_a_reader_to_a_package_that_is_not_there():
    """There is no release: what is installed under this name from an index would be anybody's."""
    texts = [
        *PACKAGE.rglob("*.py"),
        *PACKAGE.rglob("*.html"),
        PACKAGE.parent / "README.md",
        PACKAGE.parent / "CONTRIBUTING.md",
    ]
    texts += [*(PACKAGE.parent / "docs").glob("*.md"), *(PACKAGE.parent / "tests").rglob("*.py")]
    found = [
        f"{text.name}: {line.strip()}"
        for text in texts
        for line in text.read_text("utf-8").replace("in a clone of awq2marlin", "").splitlines()
        if re.search(r"(pip|uv|pipx|poetry) .*(install|add)\b[^`(]*\bawq2marlin|awq2marlin\[\w", line)
    ]
    assert found == []


def test_the_command_is_declared():
    try:
        points = importlib.metadata.distribution("awq2marlin").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(NOT_INSTALLED)
    assert sorted((point.group, point.name, point.value) for point in points) == [
        ("console_scripts", "awq2marlin", "awq2marlin.cli:main"),
        ("sglang.srt.plugins", "awq2marlin", "awq2marlin.integrations.sglang:register"),
        ("vllm.general_plugins", "awq2marlin", "awq2marlin.integrations.vllm:register"),
    ]
    for point in points:
        assert callable(point.load())


def test_python_m_runs_the_same_command():
    out = run_python(
        "import runpy, sys; sys.argv = ['awq2marlin', '--version']\n"
        "try: runpy.run_module('awq2marlin', run_name='__main__')\n"
        "except SystemExit as end: print(end.code)"
    )
    assert out.split() == ["awq2marlin", awq2marlin.__version__, "0"]


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()
