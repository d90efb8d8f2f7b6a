"""SGLang serves Marlin-native checkpoints: installed beside SGLang, this package is found by it.

SGLang calls `register` in each of its processes, through the entry point group ``sglang.srt.plugins``, whatever model
it serves. Nothing here is imported before, and a failure leaves SGLang as it was.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Makes the quantization method ``marlin_native`` known to SGLang.

    May be called more than once. Never raises: if it is impossible, a warning is logged. Whether this SGLang has all
    that the plugin needs is looked up when a checkpoint asks for the method.
    """
    try:
        import awq2marlin.integrations.sglang.hooks  # noqa: F401 - importing it registers the method
    except Exception:
        # Every SGLang process comes through here, most of them for other models.
        logging.getLogger("sglang.awq2marlin").warning(
            "awq2marlin could not register the quantization method marlin_native; other models are not affected",
            exc_info=True,
        )
