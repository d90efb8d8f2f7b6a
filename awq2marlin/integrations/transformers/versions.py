"""Which versions of Transformers are supported: the loader uses interfaces that change between them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

#: The first version supported, and the first that is not.
FIRST, END = (5, 17), (5, 24)


def check_version() -> None:
    """Checks the installed version of Transformers.

    Raises:
        ImportError: if there is none, or one that this loader was not written for.
    """
    supported = f"Transformers {FIRST[0]}.{FIRST[1]} to {END[0]}.{END[1] - 1}"
    advice = "pip install 'awq2marlin[transformers]' brings one"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(f"Transformers is not installed; this loader needs {supported}: {advice}") from None
    numbers = tuple(int(part) if part.isdigit() else -1 for part in found.split(".")[:2])
    if not FIRST <= numbers < END:
        raise ImportError(
            f"Transformers {found} is installed; this loader supports {supported}, whose loading interfaces it "
            f"uses: {advice}. Without a loader Transformers builds garbage from a Marlin-native checkpoint"
        )
