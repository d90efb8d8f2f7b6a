"""The one JSON object that every command prints with ``--json``; its shape is documented in docs/json.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from awq2marlin.cli.by_type import ByType
from awq2marlin.errors import STATUS, Problem

if TYPE_CHECKING:
    from awq2marlin.batch.run import BatchResult
    from awq2marlin.commands.convert import ConvertResult
    from awq2marlin.commands.demo import DemoResult
    from awq2marlin.commands.doctor import DoctorResult
    from awq2marlin.commands.inspect import InspectResult, ModuleInfo
    from awq2marlin.commands.revert import RevertResult
    from awq2marlin.commands.verify import VerifyResult
    from awq2marlin.gemm.check import GemmRun
    from awq2marlin.hub.identity import PushResult
    from awq2marlin.layout.modules import ModulePlan
    from awq2marlin.verification.differences import Differences

SCHEMA_VERSION = 1


@dataclass
class Report:
    """What a command did, in the shape of its JSON object.

    Attributes:
        command: its name; empty if the command line could not be understood.
        source: the folder read; empty if unknown.
        output: the folder written or compared with; empty if there is none.
        files: ``{name, bytes, sha256}`` of every file written or found; ``sha256`` is null but for `revert`.
        modules: ``{name, K, N, layout, padded, verified, reason}`` of every quantized module that was looked at;
            `inspect` adds ``group_size``, ``aligned`` and ``bytes``.
        bytes: bytes written, compared or found.
        seconds: wall time.
        warnings: what is to know of the source, and which files are left behind.
        left_behind: files of the source that do not belong to the checkpoint, with the reason.
        details: what only this command has to say.
    """

    command: str
    source: str = ""
    output: str = ""
    files: list[dict[str, Any]] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    left_behind: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def document(self, exit_code: int, problems: Sequence[Problem] = ()) -> dict[str, Any]:
        """Returns the JSON object.

        Args:
            exit_code: the process's.
            problems: what went wrong.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "status": STATUS[exit_code],
            "exit_code": exit_code,
            "source": self.source,
            "output": self.output,
            "files": self.files,
            "modules": self.modules,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "warnings": self.warnings,
            "left_behind": self.left_behind,
            "details": self.details,
            "errors": [
                {"file": each.file, "tensor": each.tensor, "code": each.code, "message": each.message}
                for each in problems
            ],
        }


#: Returns the report of a result.
report_of: ByType[Report] = ByType()


def _files(sizes: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "bytes": size, "sha256": None} for name, size in sizes]


def _module(module: ModulePlan, verified: frozenset[str], layout: str) -> dict[str, Any]:
    from awq2marlin.formats.registry import KEPT  # loaded long ago, where there is a module

    return {
        "name": module.name,
        "K": module.size_k,
        "N": module.size_n,
        "layout": layout if module.converted else KEPT.layout_name,
        "padded": [module.padded_k, module.padded_n] if module.is_padded else None,
        "verified": module.name in verified,
        "reason": module.reason,
    }


def _gemm(run: GemmRun | None) -> dict[str, Any]:
    """Returns the keys ``device`` and ``gemm`` of the details; null where the GEMM was not asked."""
    if run is None:
        return {"device": None, "gemm": None}
    return {"device": run.device_name, "gemm": [asdict(check) for check in run.checks]}


@report_of.register
def _conversion(result: ConvertResult) -> Report:
    """Returns the report of a conversion."""
    verified = frozenset(result.verified)
    return Report(
        "convert",
        str(result.source),
        str(result.output),
        files=_files([*result.shards.items(), *result.files.items()]),
        modules=[_module(module, verified, result.layout) for module in result.modules],
        bytes=result.output_bytes,
        seconds=result.seconds,
        warnings=[*result.warnings, *result.lacks, *result.hindrances],
        left_behind=dict(result.left_behind),
        details={
            "dry_run": result.dry_run,
            "converted": len(result.converted),
            "kept": len(result.kept),
            "verified": len(result.verified),
            "resumed": list(result.resumed),
            "source_bytes": result.source_bytes,
            "written_bytes": result.written_bytes,
            "side_files": list(result.files),
            "left_behind_bytes": dict(result.left_behind_bytes),
            **_gemm(result.gemm),
            "pushed": report_of(result.pushed).details if result.pushed is not None else None,
            "unserved": result.unserved or None,
            "serving": [asdict(each) for each in result.serving],
        },
    )


@report_of.register
def _batch(result: BatchResult) -> Report:
    """Returns the report of a batch."""
    return Report(
        "batch",
        str(result.file or ""),
        bytes=sum(item.written for item in result.items if not item.earlier),
        seconds=result.seconds,
        details={
            "dry_run": result.dry_run,
            "done": len(result.done),
            "failed": len(result.failed),
            "earlier": sum(item.earlier for item in result.items),
            "record": str(result.record) if result.record else None,
            "disks": [{**each._asdict(), "folder": str(each.folder)} for each in result.disks],
            "items": [item.document() for item in result.items],
        },
    )


@report_of.register
def _verification(result: VerifyResult) -> Report:
    """Returns the report of a verification that went on to the end."""
    from awq2marlin.formats.registry import DEFAULT_TARGET  # loaded long ago, where there is a result

    differing = {each.name for each in result.differences.modules} if result.differences else set()
    verified = frozenset(module.name for module in result.modules) - differing
    layout = result.formats[1].layout if result.formats else DEFAULT_TARGET.layout_name
    sides = ("source", "output")
    return Report(
        "verify",
        str(result.source),
        str(result.output),
        modules=[_module(module, verified, layout) for module in result.modules],
        bytes=result.bytes,
        seconds=result.seconds,
        warnings=list(result.notes),
        details={
            "modules_verified": len(result.modules),
            "modules_converted": result.modules_total,
            "other_tensors": result.tensors,
            "side_files": result.files,
            **_gemm(result.gemm),
            "kind": result.kind,
            "formats": {side: each.name for side, each in zip(sides, result.formats, strict=False)},
            "of_the_format": {side: list(each.not_compared) for side, each in zip(sides, result.formats, strict=False)},
            "differences": _differences(result.differences),
        },
    )


def _differences(differences: Differences | None) -> dict[str, Any] | None:
    """Returns the key ``differences`` of a comparison; null for a conversion, which ends at the first."""
    if differences is None:
        return None
    return {
        "values": asdict(differences.values),
        "zero_points": asdict(differences.zero_points),
        "scales": asdict(differences.scales),
        "modules": [
            {
                "name": each.name,
                "values": asdict(each.values),
                "zero_points": asdict(each.zero_points),
                "scales": asdict(each.scales),
                "padding": each.padding,
            }
            for each in differences.modules
        ],
        "others": len(differences.others),
    }


@report_of.register
def _reversion(result: RevertResult) -> Report:
    """Returns the report of a reversion."""
    return Report(
        "revert",
        str(result.source),
        str(result.output),
        files=[{"name": file.name, "bytes": file.size, "sha256": file.sha256 or None} for file in result.files],
        bytes=result.bytes,
        seconds=result.seconds,
        warnings=[*result.lacks, *result.hindrances],
        left_behind=dict(result.left_behind),
        details={"dry_run": result.dry_run, "resumed": list(result.resumed), "restores": result.restores},
    )


def _module_info(module: ModuleInfo) -> dict[str, Any]:
    return {
        "name": module.name,
        "K": module.size_k,
        "N": module.size_n,
        "group_size": module.group_size,
        "layout": module.layout,
        "aligned": module.aligned,
        "padded": list(module.padded) if module.padded else None,
        "verified": False,
        "reason": module.reason,
        "bytes": module.bytes,
    }


@report_of.register
def _inspection(result: InspectResult) -> Report:
    """Returns the report of an inspection."""
    return Report(
        "inspect",
        str(result.path),
        files=_files(result.shards.items()),
        modules=[_module_info(module) for module in result.modules],
        bytes=result.bytes,
        warnings=list(result.warnings),
        left_behind=dict(result.left_behind),
        details={
            "format": result.format,
            "model_type": result.model_type,
            "bits": result.bits,
            "group_size": result.group_size,
            "zero_point": result.zero_point,
            "largest_tensor_parallel_size": result.largest_tensor_parallel_size,
            "tensor_parallel_sizes": list(result.parallel_sizes.sizes),
            "tensor_parallel_limit": asdict(result.parallel_sizes.limit),
            "expert_parallel_sizes": list(result.parallel_sizes.with_expert_parallel),
            "tensors": result.tensors,
            "dtypes": dict(result.dtypes),
            "convertible": result.is_convertible,
            "reason": result.reason,
            "unquantized_modules": list(result.unquantized_modules),
            "side_files": list(result.files),
            "left_behind_bytes": dict(result.left_behind_bytes),
            "serving": [asdict(each) for each in result.serving],
        },
    )


@report_of.register
def _push(result: PushResult) -> Report:
    """Returns the report of an upload."""
    return Report(
        "push",
        str(result.source),
        result.repo_id,
        files=[{"name": file.name, "bytes": file.size, "sha256": file.sha256} for file in result.files],
        bytes=result.uploaded_bytes,
        seconds=result.seconds,
        left_behind=dict(result.left_behind),
        details={
            "dry_run": result.dry_run,
            "revision": result.revision,
            "url": result.url,
            "commit": result.commit,
            "pull_request": result.pull_request,
            "created": result.created,
            "uploaded": [file.name for file in result.files if file.uploaded],
            "removed": list(result.removed),
        },
    )


@report_of.register
def _demonstration(result: DemoResult) -> Report:
    """Returns the report of a demonstration."""
    report = report_of(result.conversion)
    report.command = "demo"
    report.files = report_of(result.reversion).files
    report.seconds = result.seconds
    report.details |= {
        "folder": str(result.folder) if result.kept else None,
        "modules_verified": len(result.verification.modules),
        "identical_files": result.identical,
    }
    return report


@report_of.register
def _doctor(result: DoctorResult) -> Report:
    """Returns the report of a look at the machine."""
    machine = result.machine
    return Report(
        "doctor",
        details={
            "ready": result.ready,
            "torch": result.torch_version,
            "torch_cuda": result.torch_cuda,
            "driver": machine.driver_version,
            "devices": [asdict(device) for device in machine.devices],
            "cuda_core": machine.cuda_core_version,
            "nvrtc": machine.nvrtc_version,
            "kernels": str(machine.kernels_dir) if machine.kernels_dir else None,
            "cache": str(machine.cache_dir),
            "cached_kernels": machine.cached_kernels,
            "cached_bytes": machine.cached_bytes,
            "missing": [asdict(lack) for lack in machine.lacks],
        },
    )
