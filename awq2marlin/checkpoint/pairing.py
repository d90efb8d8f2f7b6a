"""The same model in two formats: which modules are converted, and whether every header agrees with that.

`verify` pairs the source's headers with the output's; `revert` pairs the headers in the manifest with the
converted files'. Both are hostile until they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from awq2marlin.checkpoint.counterparts import Counterparts
from awq2marlin.checkpoint.opening import Checkpoint
from awq2marlin.errors import printable, refuse
from awq2marlin.formats.base import Format, Quantization, require_modules
from awq2marlin.formats.names import CONFIG_FILENAME
from awq2marlin.io.safetensors import TensorIndex, TensorInfo
from awq2marlin.layout.marlin import paddings
from awq2marlin.layout.modules import Linear, ModulePlan
from awq2marlin.layout.scheme import Scheme


def pair(
    index: TensorIndex, format: Format, quantization: Quantization, converted: Checkpoint, *, same_files: bool = True
) -> Counterparts:
    """Returns what became of every module, after checking that all headers agree.

    Args:
        index: headers of the source.
        format: the source's.
        quantization: of the source.
        converted: the converted checkpoint.
        same_files: whether tensors must lie in files of the same names and in the same order.

    Raises:
        CheckpointError: if files, tensors, their order, types or shapes are not those that the conversion of the
            source has, or the config's lists name what is not there.
    """
    counterparts = counterparts_of(index, format, quantization, converted)
    if converted.format.has_module_lists:
        _known_modules(converted, counterparts.modules)
    expected = expected_tensors(index, counterparts)
    _same_names(expected, converted)
    if same_files:
        _same_files(expected, converted)
    _same_shapes(expected, converted, same_files=same_files)
    return counterparts


def counterparts_of(
    index: TensorIndex, format: Format, quantization: Quantization, converted: Checkpoint
) -> Counterparts:
    """Returns what became of every module, as the converted checkpoint's config says; arguments as for `pair`.

    Raises:
        CheckpointError: if the source's modules do not agree, or the config contradicts them.
    """
    expected, found = converted.format.target_scheme(quantization.scheme), converted.quantization.scheme
    if found != expected:
        keys = [key for key in ("bits", "group_size", "zero_point") if getattr(found, key) != getattr(expected, key)]
        message = (
            f"quantization_config differs from what the source implies, in {', '.join(keys)}: it says {found}, the "
            f"source has {expected}; download the checkpoint again"
        )
        raise refuse("config", message, file=converted.quantization.origin)
    modules, problems = format.find(index.tensors, quantization, index.shard_of)
    require_modules(modules, problems, quantization)
    fates = {name: _fate(module, quantization.scheme, converted) for name, module in modules.items()}
    return Counterparts(format, converted.format, quantization.scheme, fates, modules)


def expected_tensors(index: TensorIndex, counterparts: Counterparts) -> dict[str, list[TensorInfo]]:
    """Returns the tensors that every file of a converted checkpoint has, in order, by the file's name.

    Args:
        index: headers of the source.
        counterparts: what became of its modules.
    """
    return {
        shard: [row.target for row in counterparts.rows(shard, header) if row.target is not None]
        for shard, header in index.headers.items()
    }


def _same_names(expected: Mapping[str, list[TensorInfo]], converted: Checkpoint) -> None:
    needed, there = _files_of_names(expected, converted)
    for name in sorted({*needed, *there}):
        if name not in there:
            raise refuse(
                "missing-tensor",
                "the source has this tensor, the converted checkpoint does not",
                file=needed[name][0],
                tensor=name,
            )
        if name not in needed:
            raise refuse(
                "extra-tensor",
                "the converted checkpoint has this tensor, the source does not",
                file=there[name][0],
                tensor=name,
            )


def _same_files(expected: Mapping[str, list[TensorInfo]], converted: Checkpoint) -> None:
    needed, there = _files_of_names(expected, converted)
    for name in sorted(needed):
        if needed[name] != there[name]:
            places = " and ".join(map(printable, needed[name]))
            raise refuse("moved-tensor", f"in the source it is in {places}", file=there[name][0], tensor=name)
    for shard in sorted({*expected, *converted.shards}):
        if shard not in expected or shard not in converted.shards:
            raise refuse("missing-file", "only one of source and converted checkpoint has this file", file=shard)
        if [tensor.name for tensor in expected[shard]] != [tensor.name for tensor in converted.shards[shard].by_offset]:
            raise refuse("moved-tensor", "the tensors are in a different order than in the source", file=shard)


def _same_shapes(expected: Mapping[str, list[TensorInfo]], converted: Checkpoint, *, same_files: bool) -> None:
    for shard, tensors in expected.items():
        there = converted.shards[shard].tensors if same_files else converted.tensors
        for tensor in tensors:
            found = there[tensor.name]
            if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                raise refuse(
                    "wrong-shape",
                    f"expected {tensor.dtype} {list(tensor.shape)}, found {found.dtype} {list(found.shape)}",
                    file=shard,
                    tensor=tensor.name,
                )


def _named(tensors: Iterable[TensorInfo]) -> list[str]:
    return [tensor.name for tensor in tensors]


def _files_of_names(
    expected: Mapping[str, list[TensorInfo]], converted: Checkpoint
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Returns the files of every tensor: those that need it, and those that have it."""
    needed = {file: _named(tensors) for file, tensors in expected.items()}
    return _places(needed), _places({file: header.tensors for file, header in converted.shards.items()})


def _places(names: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Returns the files of every name, in the files' order; two files may hold a tensor of one name."""
    places: dict[str, list[str]] = {}
    for file in sorted(names):
        for name in names[file]:
            places.setdefault(name, []).append(file)
    return places


def _known_modules(converted: Checkpoint, modules: Mapping[str, ModulePlan]) -> None:
    """Refuses lists of the config that name what is not there, or not what is."""
    quantization = converted.quantization
    for key, known, what in (
        ("awq_modules", set(modules), "quantized module"),
        ("padded_modules", set(modules), "quantized module"),
        ("unquantized_modules", set(converted.unquantized_modules), "module in full precision"),
    ):
        unknown = sorted(set(getattr(quantization, key)) - known)
        if unknown:
            raise refuse(
                "unknown-module",
                f"{key} lists {printable(unknown[0])}, but the checkpoint has no such {what}",
                file=CONFIG_FILENAME,
                tensor=unknown[0],
            )
    forgotten = sorted(set(converted.unquantized_modules) - quantization.unquantized_modules)
    if forgotten:
        raise refuse(
            "contradiction",
            "the module is in full precision, but unquantized_modules does not list it",
            file=CONFIG_FILENAME,
            tensor=forgotten[0],
        )
    both = sorted(quantization.awq_modules & set(quantization.padded_modules))
    if both:
        raise refuse(
            "contradiction",
            "both awq_modules and padded_modules list it",
            file=CONFIG_FILENAME,
            tensor=both[0],
        )


def _fate(module: Linear, scheme: Scheme, converted: Checkpoint) -> ModulePlan:
    """Returns what became of a module, as the converted checkpoint's lists and shapes say."""
    if module.name in converted.quantization.awq_modules:
        return ModulePlan.of(module, "kept")
    format, padded = converted.format, (module.size_k, module.size_n)
    true_sizes = converted.quantization.padded_modules.get(module.name)
    qweight = converted.tensors.get(format.tensor_name(module.name, "qweight"))
    file = converted.shard_of[qweight.name] if qweight else CONFIG_FILENAME
    if true_sizes is not None:
        if true_sizes != padded:
            raise refuse(
                "contradiction",
                f"padded_modules says {list(true_sizes)}, the source has {list(padded)}",
                file=CONFIG_FILENAME,
                tensor=module.name,
            )
        if qweight is not None and len(qweight.shape) == 2:
            padded = format.sizes({"qweight": qweight}, scheme)
        if padded not in paddings(*true_sizes):
            raise refuse(
                "unaligned",
                f"K={padded[0]}, N={padded[1]} is not how a source of K={true_sizes[0]}, N={true_sizes[1]} is padded",
                file=file,
                tensor=module.name,
            )
    if format.unaligned_reason(*padded, scheme):
        message = f"K={padded[0]}, N={padded[1]} cannot be {format.title}"
        raise refuse("unaligned", message, file=file, tensor=module.name)
    return ModulePlan.of(module, padded=padded)
