"""Loads Marlin-native checkpoints in Transformers: import this module, then call ``from_pretrained`` as ever.

    import awq2marlin.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("Llama-3-8B-AWQ-marlin")

The import registers the quantization method ``marlin_native``. Without it Transformers stops, from 4.52 on; see
`awq2marlin.formats.plain_transformers`.
"""

from __future__ import annotations

from awq2marlin.integrations.transformers.versions import check_version

check_version()  # before anything that another version may lack is imported

from awq2marlin.integrations.transformers.quantizer import (  # noqa: E402
    MarlinNativeConfig as MarlinNativeConfig,
)
from awq2marlin.integrations.transformers.quantizer import (  # noqa: E402
    MarlinNativeQuantizer as MarlinNativeQuantizer,
)

__all__ = ["MarlinNativeConfig", "MarlinNativeQuantizer"]
