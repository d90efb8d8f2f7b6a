"""Compilation at run time: the cache, the messages, and what the doctor sees. Needs neither GPU nor driver."""

import copy
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from awq2marlin.errors import KernelUnavailableError, UnavailableError
from awq2marlin.gemm import compile_matrix, jit, machine, source
from awq2marlin.gemm.source import KernelSource, repack_source
from awq2marlin.io.code_cache import CACHE_VARIABLE
from tests.skips import IS_ROOT, NO_COMPILER, NO_MODES

needs_compiler = pytest.mark.skipif(
    machine.machine_facts().nvrtc_version is None,
    reason=NO_COMPILER,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return jit.kernel_cache()


@needs_compiler
def test_key_depends_on_source_architecture_headers_and_compiler(monkeypatch):
    kernel = repack_source(4)
    keys = {jit.key_of(kernel, "sm_80"), jit.key_of(kernel, "sm_90a")}
    keys.add(jit.key_of(repack_source(8), "sm_80"))
    monkeypatch.setattr(jit, "headers_digest", lambda: b"other headers")
    keys.add(jit.key_of(kernel, "sm_80"))
    monkeypatch.setattr(jit, "compiler_version", lambda: "99.0")
    keys.add(jit.key_of(kernel, "sm_80"))
    assert len(keys) == 5


def test_headers_digest_sees_every_header(tmp_path, monkeypatch):
    for path in source.kernels_dir().glob("*.cuh"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(source, "kernels_dir", lambda: tmp_path)
    before = source.headers_digest.__wrapped__()
    assert before == source.headers_digest()
    with (tmp_path / "ptx.cuh").open("a") as file:
        file.write("\n")
    assert source.headers_digest.__wrapped__() != before


@needs_compiler
def test_first_use_says_what_it_compiles_and_the_second_is_silent(cache, capsys):
    first = jit.build(repack_source(4), "sm_80")
    assert "compiled Repack<4> for sm_80 in " in (said := capsys.readouterr().err)
    assert str(cache.folder) in said
    assert jit.build(repack_source(4), "sm_80") == first
    assert capsys.readouterr().err == ""


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_a_caller_may_ask_to_be_told_instead(capsys):
    said = []
    with jit.on_compile(said.append):
        jit.build(repack_source(4), "sm_80")
    (text,) = said
    assert text.startswith("compiled Repack<4> for sm_80 in ")
    assert capsys.readouterr().err == ""


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_source_that_does_not_compile_is_refused_with_the_compilers_words():
    with pytest.raises(KernelUnavailableError, match=r"broken does not compile for sm_80(.|\n)*undefined"):
        jit.build(KernelSource("broken", "int x = undefined;"), "sm_80")


def _build(kernel):
    return jit.build(kernel, "sm_80")


@needs_compiler
def test_processes_share_a_cache(cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_build, [repack_source(4)] * 4)
    assert len(set(results)) == 1
    assert len(cache.files()) == 1


def _build_and_tell(kernel):
    said = []
    with jit.on_compile(said.append):
        jit.build(kernel, "sm_80")
    return len(said)


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_of_several_processes_one_compiles_and_the_others_wait():
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert sum(pool.map(_build_and_tell, [repack_source(4)] * 3, chunksize=1)) == 1


@needs_compiler
def test_many_kernels_are_compiled_side_by_side_and_each_once(cache, monkeypatch):
    entered = threading.Barrier(2)
    compile_one = jit.compile_kernel

    def compile_beside_another(source, arch):
        entered.wait(60)  # breaks unless two are in here at once
        return compile_one(source, arch)

    monkeypatch.setattr(jit, "default_workers", lambda: 2)
    monkeypatch.setattr(jit, "compile_kernel", compile_beside_another)
    sources, said = [repack_source(4), repack_source(8)], []
    with jit.on_compile(said.append):
        codes = jit.build_all(sources, "sm_80")
    assert sorted(each.split(" for ")[0] for each in said) == ["compiled Repack<4>", "compiled Repack<8>"]
    assert codes == {source: jit.build(source, "sm_80") for source in sources}
    assert len(cache.files()) == 2


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_one_that_does_not_compile_is_refused_among_others():
    with pytest.raises(KernelUnavailableError, match="broken does not compile for sm_80"):
        jit.build_all([repack_source(4), KernelSource("broken", "int x = undefined;")], "sm_80")


def test_a_kernel_that_is_unavailable_is_a_kind_of_both():
    error = KernelUnavailableError("one line\nand another")
    assert isinstance(error, UnavailableError)
    assert isinstance(error, RuntimeError)
    assert [problem.code for problem in error.problems] == ["no-kernel"]
    for each in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(each) == "one line\nand another"
        assert each.problems == error.problems


def test_missing_compiler_names_the_command_that_mends_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelUnavailableError, match=r"pip install '\.\[cuda\]'"):
        jit.compiler_version.__wrapped__()


def test_machine_facts_list_what_is_missing(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(machine, "compiler_version", jit.compiler_version.__wrapped__)
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    facts = machine.machine_facts()
    assert facts.nvrtc_version is None
    assert facts.devices == ()
    assert facts.cache_dir == cache.folder
    assert all(lack.what and lack.remedy for lack in facts.lacks)
    assert any("NVRTC" in lack.what for lack in facts.lacks)


def test_machine_facts_count_the_cache(cache):
    cache.put("key", b"x" * 68)
    facts = machine.machine_facts()
    assert (facts.cached_kernels, facts.cached_bytes) == (1, 100)


def test_a_device_name_ends_at_its_first_zero_byte():
    class Driver:
        class CUdevice_attribute:  # noqa: N801
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 9
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 0
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 132

        cuDeviceGetName = staticmethod(lambda _length, _index: (0, b"NVIDIA H200\0\0\0  "))  # noqa: N815
        cuDeviceGetAttribute = staticmethod(lambda which, _index: (0, which))  # noqa: N815
        cuDeviceTotalMem = staticmethod(lambda _index: (0, 1 << 37))  # noqa: N815

    facts = machine._device_facts(Driver, 0)
    assert facts == machine.DeviceFacts(0, "NVIDIA H200", (9, 0), 1 << 37, 132, is_supported=True)


@pytest.mark.skipif(os.geteuid() == 0, reason=IS_ROOT)
def test_machine_facts_tell_of_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert any(CACHE_VARIABLE in lack.remedy for lack in machine.machine_facts().lacks)


def test_machine_facts_tell_of_a_cache_that_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert any(str(tmp_path / "file") in lack.what for lack in machine.machine_facts().lacks)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason=NO_MODES)
def test_machine_facts_tell_of_a_cache_that_others_may_write(cache):
    cache.put("key", b"machine code")
    cache.folder.chmod(0o777)
    assert any("Other users can write to" in lack.what for lack in machine.machine_facts().lacks)


def driver_that_says(code, version=12080):
    """A stand-in for the bindings: no device, and a code for the first call."""
    result = SimpleNamespace(CUDA_ERROR_NO_DEVICE=100)
    return SimpleNamespace(
        CUresult=result,
        cuInit=lambda _flags: (code,),
        cuDriverGetVersion=lambda: (0, version),
        cuDeviceGetCount=lambda: (0, 0),
    )


@pytest.fixture
def driver(monkeypatch):
    def install(fake):
        bindings = ModuleType("cuda.bindings")
        bindings.driver = fake
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)

    return install


def test_hidden_gpus_are_not_a_missing_driver(driver):
    driver(driver_that_says(100))
    version, devices, lack = machine._driver_facts()
    assert (version, devices) == (None, ())
    assert "no GPU" in lack.what
    assert "CUDA_VISIBLE_DEVICES" in lack.remedy


def test_a_driver_that_fails_is_told_with_its_code(driver):
    driver(driver_that_says(999))
    assert "999" in machine._driver_facts()[2].what


def test_a_compiler_newer_than_the_driver_is_a_lack(driver, monkeypatch):
    driver(driver_that_says(0))
    monkeypatch.setattr(machine, "compiler_version", lambda: "13.1")
    assert any("NVRTC 13.1" in lack.what and "12.8" in lack.what for lack in machine.machine_facts().lacks)
    monkeypatch.setattr(machine, "compiler_version", lambda: "12.9")
    assert not any("12.9" in lack.what for lack in machine.machine_facts().lacks)


def test_resources_are_read_from_the_assemblers_report():
    log = "8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\nUsed 168 registers, used 2 barriers"
    resources = jit._read_resources(log)
    assert resources == jit.Resources(registers=168, stack_bytes=8, spill_bytes=28, is_serialized=False)
    assert len(compile_matrix.faults_of(resources)) == 2


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_one_of_each_kernel_compiles_without_spills(arch):
    jobs = [job for job in compile_matrix.matrix() if job[1] == arch]
    for kernel in compile_matrix._one_of_each(kernel for kernel, _ in jobs):
        resources = jit.compile_kernel(kernel, arch).resources
        assert compile_matrix.faults_of(resources) == []
        assert resources.registers > 0
