"""What vLLM calls our checkpoints."""

from __future__ import annotations

PLUGIN = "qwen3-ascend"
"""The quantization and the load format, as `--quantization` and `--load-format` name them."""
