"""The names of the files that a checkpoint has beside its shards."""

from __future__ import annotations

CONFIG_FILENAME = "config.json"
INDEX_FILENAME = "model.safetensors.index.json"
MANIFEST_FILENAME = "marlin_manifest.json"
CARD_FILENAME = "README.md"

#: Under what name the report of a verification goes to a repository with the checkpoint.
REPORT_FILENAME = "awq2marlin-report.html"

#: Files in which older tools kept the quantization config, in the order they are looked for.
LEGACY_CONFIG_FILENAMES = ("quant_config.json", "quantize_config.json")

#: A model card above this is refused: nobody reads it, and the manifest has to hold it.
MAX_CARD_BYTES = 8_000_000
