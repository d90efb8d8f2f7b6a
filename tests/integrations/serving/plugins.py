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


def assert_imports_are_looked_up(plugin, engine, needs, others):
    """Asserts that no ImportError can come from the middle of a load.

    Args:
        plugin: its package.
        engine: what it serves.
        needs: what it looks up.
        others: names that it need not: what registering takes is reported by that.
    """
    known = {(f"{engine.package}.{need.module}", need.name.partition(".")[0]) for need in needs}
    known |= {(engine.package, need.module) for need in needs if "." not in need.module}
    for path in Path(plugin.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == engine.package:
                used = {(node.module, name.name) for name in node.names if name.name not in others}
                assert used <= known, (path.name, used - known)
