"""Why tests are skipped. One sentence for each thing that is missing, so that a run can say once what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

NO_GPU = "There is no CUDA GPU here, or PyTorch was installed without CUDA."
OLD_GPU = "The GPU here is older than compute capability 8.0, which the kernels need."
ONE_GPU = "There is only one GPU here."
HAS_GPU = "There is a GPU here, and these tests are about machines without one."
NO_COMPILER = "The run-time compiler of the kernels is not installed; pip install '.[cuda]' brings it."
NO_DASK = "Dask is not installed; pip install '.[dask]' brings it."
NO_VLLM = "vLLM is not installed; CI installs it, as .ci/run shows, and then fails if these tests are skipped."
NO_SGLANG = "SGLang is not installed; CI installs it, as .ci/run shows, and then fails if these tests are skipped."
OLD_VLLM = "The vLLM here is older, and what these tests call came later."
NO_COMPRESSED_TENSORS = (
    "compressed-tensors is not installed; CI installs it, as .ci/run shows, and then fails if these tests are skipped."
)
NO_REAL_MODEL = "The real checkpoints that these tests compare with are not part of the repository."
NO_MOUNT = "Mounting a file system needs rights that this user does not have."
IS_ROOT = "Root may write everywhere, so nothing can be forbidden here."
NO_MODES = "This system knows no owners and modes of files."
NOT_INSTALLED = "The package is not installed, so it has no metadata to compare with."
OTHER_FILE_SYSTEM = "The file system here cannot hold what these tests need."


def why_no_gpu() -> str | None:
    """Returns why kernels cannot run here; None if they can."""
    import torch

    if not torch.cuda.is_available():
        return NO_GPU
    return OLD_GPU if torch.cuda.get_device_capability() < (8, 0) else None


def summary(reports: Iterable[Any]) -> Iterator[str]:
    """Yields a line for each reason, with the number of tests that it kept from running, the most first.

    Args:
        reports: of pytest, on tests that were skipped.
    """
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    for reason, count in reasons.most_common():
        yield f"{count:6} {reason}"
