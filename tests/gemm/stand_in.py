"""A driver that launches nothing: it reads what a launch hands over where CUDA's driver would, as the kernel would."""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from awq2marlin.gemm import driver, launch, ops
from awq2marlin.gemm.checks import remembered
from awq2marlin.gemm.experts import launch as experts_launch
from awq2marlin.gemm.experts import ops as experts_ops
from awq2marlin.gemm.source import ENTRY_POINT, KernelSource, kernels_dir

STREAM = 77


class Launched(NamedTuple):
    """What the driver was handed.

    Attributes:
        kernel: its name.
        grid: blocks in each dimension.
        threads: of a block.
        shared_bytes: of a block.
        cluster: blocks of a cluster.
        overlaps: whether it may be set up before the stream's last kernel is through.
        stream: its handle.
        arguments: the kernel's, by name: numbers, and maps as bytes.
    """

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    cluster: int
    overlaps: int
    stream: int
    arguments: dict[str, bytes | int]


class StandIn:
    """Stands in for the driver and its one GPU; tensors of the CPU, whose addresses are as good, for those there.

    Attributes:
        launched: what was launched, in order.
        answer: what the driver says to a launch.
    """

    def __init__(self, monkeypatch, capability=(9, 0), multiprocessors=132) -> None:
        real = pytest.importorskip("cuda.bindings.driver")
        self.launched: list[Launched] = []
        self.answer = real.CUresult.CUDA_SUCCESS
        self._api = SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("_")})
        self._api.cuLaunchKernelEx = self._launch
        self._api.cuTensorMapEncodeTiled = self._encode
        self._loaded: list[KernelSource] = []
        device = driver.Device(0, capability, multiprocessors)
        for module in (driver, launch, experts_launch, ops):
            monkeypatch.setattr(module, "device_of", lambda _: device)
        for name, stand_in in {
            "_driver": lambda: self._api,
            "_loaded": self._load,
            "_bind_thread": lambda _: None,
            "_stream_of": lambda _: STREAM,
        }.items():
            monkeypatch.setattr(driver, name, stand_in)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        forget_prepared_calls(monkeypatch)
        driver.tensor_map.cache_clear()

    def _load(self, source, device, shared_bytes):  # noqa: ARG002
        self._loaded.append(source)
        return SimpleNamespace(handle=len(self._loaded))

    def _launch(self, config, kernel, pointers, extra):
        assert extra == 0
        if self.answer == 0:
            self.launched.append(self._read(config, self._loaded[int(kernel) - 1], pointers))
        return (self.answer,)

    def _read(self, config, source, pointers):
        assert (config.blockDimY, config.blockDimZ) == (1, 1)
        names, found = self._api.CUlaunchAttributeID, {}
        assert len(config.attrs) == config.numAttrs
        for each in config.attrs:
            if each.id == names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
                assert (each.value.clusterDim.y, each.value.clusterDim.z) == (1, 1)
                found["cluster"] = each.value.clusterDim.x
            else:
                assert each.id == names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                found["overlaps"] = each.value.programmaticStreamSerializationAllowed
        arguments = {}
        for i, (name, kind) in enumerate(parameters_of(source)):
            place = ctypes.c_void_p.from_address(pointers + 8 * i).value
            if kind is bytes:
                arguments[name] = ctypes.string_at(place, 128)
            else:
                arguments[name] = kind.from_address(place).value or 0
        return Launched(
            source.name,
            (config.gridDimX, config.gridDimY, config.gridDimZ),
            config.blockDimX,
            config.sharedMemBytes,
            found.get("cluster", 1),
            found.get("overlaps", 0),
            int(config.hStream),
            arguments,
        )

    def _encode(self, kind, rank, address, sizes, strides, box, *rest):  # noqa: ARG002
        """Makes a map that says what it was made from."""
        assert rank == 2
        numbers = (address, *map(int, sizes), *map(int, strides), *map(int, box))
        made = self._api.CUtensorMap()
        ctypes.memmove(made.getPtr(), (ctypes.c_uint64 * len(numbers))(*numbers), 8 * len(numbers))
        return self._api.CUresult.CUDA_SUCCESS, made


def forget_prepared_calls(monkeypatch) -> None:
    """Has a test begin as a new process does."""
    for module, name in ((ops, "_prepared"), (experts_ops, "_prepared_gemm"), (experts_ops, "_prepared_block")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name).__wrapped__))


def parameters_of(source: KernelSource) -> list[tuple[str, type]]:
    """Returns a kernel's parameters with their types, by the sources: bytes for a tensor map."""
    text = re.search(rf"{ENTRY_POINT}\((.*?)\)", source.text, re.DOTALL)[1]
    while "_PARAMETERS" in text:
        text = re.sub(r"MARLIN_\w+_PARAMETERS", lambda macro: _macros()[macro[0]], text, count=1)
    found = []
    for parameter in text.split(","):
        kind = bytes if "TensorMap" in parameter else ctypes.c_void_p if "*" in parameter else None
        kind = kind or (ctypes.c_int64 if "i64" in parameter else ctypes.c_int)
        found.append((re.findall(r"\w+", parameter)[-1], kind))
    return found


def _macros() -> dict[str, str]:
    text = "\n".join(path.read_text("utf-8") for path in kernels_dir().glob("*.cuh")).replace("\\\n", " ")
    return dict(re.findall(r"#define (MARLIN_\w+_PARAMETERS) +(.*)", text))
