"""The same from Python: typed results, names that stay callable, and an import that brings nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import awq2marlin
from awq2marlin.checkpoint.synthetic import write_checkpoint
from tests.e2e import oracle
from tests.e2e.inputs import edit_json, layer, plain


def in_a_fresh_process(code: str) -> str:
    root = str(Path(awq2marlin.__file__).parents[1])
    prepared = f"import sys; sys.path.insert(0, {root!r}); {code}"
    return subprocess.run([sys.executable, "-c", prepared], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_no_torch_numpy_or_numba() -> None:
    code = "import awq2marlin; print(sorted({'torch', 'numpy', 'numba', 'typer', 'rich'} & set(sys.modules)))"
    assert in_a_fresh_process(code) == "[]\n"


def test_converting_verifying_and_reverting_import_no_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "awq", plain())
    paths = [str(tmp_path / name) for name in ("awq", "marlin", "back")]
    code = (
        f"from awq2marlin import convert, inspect, revert, verify; a, m, b = {paths!r}; "
        "convert(a, m); verify(a, m); revert(m, b); inspect(m); print('torch' in sys.modules)"
    )
    assert in_a_fresh_process(code) == "False\n"


def test_every_public_name_is_there() -> None:
    assert [name for name in awq2marlin.__all__ if not hasattr(awq2marlin, name)] == []
    assert dir(awq2marlin) == sorted(awq2marlin.__all__)


def test_results_are_typed(tmp_path: Path) -> None:
    source, output, back = tmp_path / "awq", tmp_path / "marlin", tmp_path / "back"
    write_checkpoint(source, plain(layer(0, hidden=192, kv=64, inter=512), shards=2))
    sizes = {name: (source / name).stat().st_size for name in oracle.shard_names(source)}

    planned = awq2marlin.convert(source, output, dry_run=True)
    assert isinstance(planned, awq2marlin.ConvertResult)
    assert (planned.dry_run, planned.verified, output.exists()) == (True, (), False)

    done = awq2marlin.convert(str(source), output)
    assert isinstance(done, awq2marlin.ConvertResult)
    assert (done.source, done.output, done.dry_run, done.resumed) == (source, output, False, ())
    assert (len(done.converted), len(done.kept), len(done.modules)) == (3, 4, 7)
    assert (done.modules, done.shards, done.output_bytes) == (planned.modules, planned.shards, planned.output_bytes)
    assert done.shards == {name: (output / name).stat().st_size for name in sizes}
    assert (done.source_bytes, done.output_bytes) == (sum(sizes.values()), sum(done.shards.values()))
    assert done.verified == tuple(module.name for module in done.converted)
    assert done.files == {"generation_config.json": 25}
    assert done.seconds > 0

    compared = awq2marlin.verify(source, str(output))
    assert isinstance(compared, awq2marlin.VerifyResult)
    assert (compared.modules, compared.modules_total) == (tuple(done.converted), 3)

    found = awq2marlin.inspect(output)
    assert isinstance(found, awq2marlin.InspectResult)
    assert (found.format, found.bits, found.group_size, found.shards) == ("marlin_native", 4, 64, done.shards)
    assert all(isinstance(module, awq2marlin.ModuleInfo) for module in found.modules)

    reverted = awq2marlin.revert(output, back)
    assert isinstance(reverted, awq2marlin.RevertResult)
    assert all(isinstance(file, awq2marlin.RestoredFile) for file in reverted.files)
    assert {file.name: file.sha256 for file in reverted.files} == oracle.file_hashes(source)
    assert reverted.bytes == sum(path.stat().st_size for path in source.iterdir())


def test_progress_is_told_to_whom_it_is_given(tmp_path: Path) -> None:
    told: list[tuple[str, object]] = []

    class Listener:
        def start(self, what: str, total: int) -> None:
            told.append((what, total))

        def advance(self, count: int) -> None:
            told.append(("bytes", count))

        def finish(self) -> None:
            told.append(("finish", None))

        def note(self, text: str) -> None:
            told.append(("note", text))

    write_checkpoint(tmp_path / "awq", plain())
    for stage, run in (
        (
            "convert",
            lambda: awq2marlin.convert(tmp_path / "awq", tmp_path / "marlin", verify="none", progress=Listener()),
        ),
        ("verify", lambda: awq2marlin.verify(tmp_path / "awq", tmp_path / "marlin", progress=Listener())),
        ("revert", lambda: awq2marlin.revert(tmp_path / "marlin", tmp_path / "back", progress=Listener())),
    ):
        told.clear()
        run()
        assert told[0][0] == stage
        assert told[-1] == ("finish", None)
        assert sum(count for what, count in told if what == "bytes" and isinstance(count, int)) == told[0][1]


def test_a_model_type_that_is_no_text_is_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "awq", plain())
    for value in (None, 7, ["llama"]):
        edit_json("config.json", lambda config, value=value: config.update(model_type=value))(tmp_path / "awq")
        assert awq2marlin.inspect(tmp_path / "awq").model_type == ""
