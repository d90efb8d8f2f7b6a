"""Convert quantized checkpoints to the Marlin layout offline: streamed, verified, reversible byte for byte.

    from awq2marlin import convert, verify, revert, push, inspect

Importing this package imports neither torch nor NumPy nor Numba; each name brings what it needs when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from awq2marlin._version import __version__ as __version__

if TYPE_CHECKING:
    from awq2marlin.batch.record import ItemResult as ItemResult
    from awq2marlin.batch.run import BatchProgress as BatchProgress
    from awq2marlin.batch.run import BatchResult as BatchResult
    from awq2marlin.batch.run import convert_many as convert_many
    from awq2marlin.commands.convert import ConvertResult as ConvertResult
    from awq2marlin.commands.convert import convert as convert
    from awq2marlin.commands.demo import DemoResult as DemoResult
    from awq2marlin.commands.demo import demo as demo
    from awq2marlin.commands.doctor import DoctorResult as DoctorResult
    from awq2marlin.commands.doctor import doctor as doctor
    from awq2marlin.commands.inspect import InspectResult as InspectResult
    from awq2marlin.commands.inspect import ModuleInfo as ModuleInfo
    from awq2marlin.commands.inspect import inspect as inspect
    from awq2marlin.commands.push import push as push
    from awq2marlin.commands.revert import RestoredFile as RestoredFile
    from awq2marlin.commands.revert import RevertResult as RevertResult
    from awq2marlin.commands.revert import revert as revert
    from awq2marlin.commands.verify import VerifyResult as VerifyResult
    from awq2marlin.commands.verify import verify as verify
    from awq2marlin.errors import Awq2MarlinError as Awq2MarlinError
    from awq2marlin.errors import BatchError as BatchError
    from awq2marlin.errors import CheckpointError as CheckpointError
    from awq2marlin.errors import DifferenceError as DifferenceError
    from awq2marlin.errors import ExecutorError as ExecutorError
    from awq2marlin.errors import HubError as HubError
    from awq2marlin.errors import KernelUnavailableError as KernelUnavailableError
    from awq2marlin.errors import OutputError as OutputError
    from awq2marlin.errors import Problem as Problem
    from awq2marlin.errors import UnavailableError as UnavailableError
    from awq2marlin.gemm.check import GemmCheck as GemmCheck
    from awq2marlin.gemm.check import GemmRun as GemmRun
    from awq2marlin.gemm.config import AWQMarlinConfig as AWQMarlinConfig
    from awq2marlin.gemm.experts.ops import marlin_experts as marlin_experts
    from awq2marlin.gemm.experts.ops import marlin_moe_gemm as marlin_moe_gemm
    from awq2marlin.gemm.experts.ops import warm_up_experts as warm_up_experts
    from awq2marlin.gemm.linear import AWQMarlinLinearMethod as AWQMarlinLinearMethod
    from awq2marlin.gemm.ops import marlin_gemm as marlin_gemm
    from awq2marlin.gemm.ops import repack_awq as repack_awq
    from awq2marlin.gemm.ops import warm_up as warm_up
    from awq2marlin.hub.identity import PushedFile as PushedFile
    from awq2marlin.hub.identity import PushResult as PushResult
    from awq2marlin.hub.publication import PushTarget as PushTarget
    from awq2marlin.layout.marlin import GPTQ_MARLIN_MIN_THREAD_K as GPTQ_MARLIN_MIN_THREAD_K
    from awq2marlin.layout.marlin import GPTQ_MARLIN_MIN_THREAD_N as GPTQ_MARLIN_MIN_THREAD_N
    from awq2marlin.layout.marlin import GPTQ_MARLIN_TILE as GPTQ_MARLIN_TILE
    from awq2marlin.layout.marlin import MARLIN_SUPPORTED_GROUP_SIZES as MARLIN_SUPPORTED_GROUP_SIZES
    from awq2marlin.layout.marlin import SCALAR_TYPE_UINT4 as SCALAR_TYPE_UINT4
    from awq2marlin.layout.marlin import SCALAR_TYPE_UINT8 as SCALAR_TYPE_UINT8
    from awq2marlin.layout.marlin import ScalarType as ScalarType
    from awq2marlin.layout.marlin import is_aligned as is_aligned
    from awq2marlin.layout.modules import ModulePlan as ModulePlan
    from awq2marlin.layout.torch_functions import awq_marlin_repack as awq_marlin_repack
    from awq2marlin.layout.torch_functions import awq_to_marlin_zero_points as awq_to_marlin_zero_points
    from awq2marlin.layout.torch_functions import get_scale_perms as get_scale_perms
    from awq2marlin.layout.torch_functions import marlin_awq_repack as marlin_awq_repack
    from awq2marlin.layout.torch_functions import marlin_make_empty_g_idx as marlin_make_empty_g_idx
    from awq2marlin.layout.torch_functions import marlin_make_workspace as marlin_make_workspace
    from awq2marlin.layout.torch_functions import marlin_permute_scales as marlin_permute_scales
    from awq2marlin.layout.torch_functions import marlin_to_awq_zero_points as marlin_to_awq_zero_points
    from awq2marlin.layout.torch_functions import marlin_unpack_zero_points as marlin_unpack_zero_points
    from awq2marlin.layout.torch_functions import marlin_unpermute_scales as marlin_unpermute_scales
    from awq2marlin.layout.torch_functions import marlin_zero_points as marlin_zero_points
    from awq2marlin.layout.torch_functions import pack_cols as pack_cols
    from awq2marlin.layout.torch_functions import replace_parameter as replace_parameter
    from awq2marlin.layout.torch_functions import unpack_cols as unpack_cols
    from awq2marlin.layout.torch_functions import verify_marlin_supported as verify_marlin_supported
    from awq2marlin.layout.torch_functions import verify_marlin_supports_shape as verify_marlin_supports_shape
    from awq2marlin.progress import Progress as Progress

#: Where each public name is defined. No module of the package bears a public function's name, so that
#: importing a module never hides a function.
_HOMES: dict[str, str] = {
    name: module
    for module, names in {
        "batch.run": ["BatchProgress", "BatchResult", "convert_many"],
        "batch.record": ["ItemResult"],
        "gemm.config": ["AWQMarlinConfig"],
        "commands.convert": ["ConvertResult", "convert"],
        "commands.demo": ["DemoResult", "demo"],
        "errors": [
            "Awq2MarlinError",
            "BatchError",
            "CheckpointError",
            "DifferenceError",
            "ExecutorError",
            "HubError",
            "KernelUnavailableError",
            "OutputError",
            "Problem",
            "UnavailableError",
        ],
        "commands.inspect": ["InspectResult", "ModuleInfo", "inspect"],
        "layout.torch_functions": [
            "awq_marlin_repack",
            "awq_to_marlin_zero_points",
            "get_scale_perms",
            "marlin_awq_repack",
            "marlin_make_empty_g_idx",
            "marlin_make_workspace",
            "marlin_permute_scales",
            "marlin_to_awq_zero_points",
            "marlin_unpack_zero_points",
            "marlin_unpermute_scales",
            "marlin_zero_points",
            "pack_cols",
            "replace_parameter",
            "unpack_cols",
            "verify_marlin_supported",
            "verify_marlin_supports_shape",
        ],
        "layout.marlin": [
            "GPTQ_MARLIN_MIN_THREAD_K",
            "GPTQ_MARLIN_MIN_THREAD_N",
            "GPTQ_MARLIN_TILE",
            "MARLIN_SUPPORTED_GROUP_SIZES",
            "SCALAR_TYPE_UINT4",
            "SCALAR_TYPE_UINT8",
            "ScalarType",
            "is_aligned",
        ],
        "commands.doctor": ["DoctorResult", "doctor"],
        "gemm.check": ["GemmCheck", "GemmRun"],
        "gemm.experts.ops": ["marlin_experts", "marlin_moe_gemm", "warm_up_experts"],
        "gemm.linear": ["AWQMarlinLinearMethod"],
        "gemm.ops": ["marlin_gemm", "repack_awq", "warm_up"],
        "layout.modules": ["ModulePlan"],
        "progress": ["Progress"],
        "hub.publication": ["PushTarget"],
        "commands.revert": ["RestoredFile", "RevertResult", "revert"],
        "hub.identity": ["PushResult", "PushedFile"],
        "commands.push": ["push"],
        "commands.verify": ["VerifyResult", "verify"],
    }.items()
    for name in names
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'awq2marlin' has no attribute {name!r}")
    value = getattr(import_module(f"awq2marlin.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names."""
    return __all__
