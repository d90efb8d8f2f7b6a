"""What the tests of every engine's plugin ask: its registration, its needs, its refusals."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import awq2marlin
from awq2marlin.integrations.serving.needs import numbers
from tests.integrations.serving.harness import refusal


def problem_of(call, *arguments, **options):
    """Returns the only problem with which a call refuses its arguments."""
    (problem,) = refusal(call, *arguments, **options)
    return problem


def run_python(code):
    """Runs code in a process that has imported no part of an engine; returns its last line."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(awq2marlin.__file__).parent.parent), *sys.path]),
    }
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def assert_registering_never_raises(register, absent, caplog):
    """Asserts that a plugin says once that it could not register, where modules cannot be imported."""
    with mock.patch.dict("sys.modules", dict.fromkeys(absent)):  # importing them fails
        register()
    (record,) = caplog.records
    assert "could not register" in record.message
    assert record.levelname == "WARNING"


def assert_has_all_and_was_tried(engine, needs, version):
    """Asserts that the installed version of an engine is one that is served."""
    assert [each for need in needs for each in need.lacks(engine.package)] == []
    assert numbers(version, len(engine.tried[0])) in engine.tried


def assert_imports_are_looked_up(plugin, engine, always, experts, others):
    """Asserts that no ImportError and no AttributeError of the engine's names can come from the middle of a load.

    Args:
        plugin: its package.
        engine: what it serves.
        always: what it looks up of every checkpoint.
        experts: what it looks up before it serves experts, in ``experts.py`` and ``_experts_method``.
        others: names that it need not: what registering takes is reported by that.
    """
    for path in Path(plugin.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        after = [tree] if path.name == "experts.py" else _functions(tree, "_experts_method")
        of_experts = {node for each in after for node in ast.walk(each)}
        places = {}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == engine.package):
                continue
            needs = (*always, *experts) if node in of_experts else always
            names = [name for name in node.names if name.name not in others]
            lost = [name.name for name in names if not _is_looked_up(engine, needs, f"{node.module}.{name.name}")]
            assert lost == [], (path.name, node.module)
            places |= {name.asname or name.name: (f"{node.module}.{name.name}", needs) for name in names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in places:
                place, needs = places[node.value.id]
                is_known = node.attr.startswith("__") or _is_looked_up(engine, needs, f"{place}.{node.attr}")
                assert is_known, (path.name, place, node.attr)


def _functions(tree, name):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]


def _is_looked_up(engine, needs, place):
    """Returns whether a name of the engine is among what is looked up, or a module that holds something of it."""
    found = {f"{engine.package}.{need.module}.{need.name}" for need in needs}
    found |= {f"{engine.package}.{need.module}.{need.name}.{each}" for need in needs for each in need.attributes}
    return any(f"{each}.".startswith(f"{place}.") for each in found)
