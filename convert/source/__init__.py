"""Where the weights come from: a folder, Hugging Face's Hub, or ModelScope."""

from __future__ import annotations

from qwen3_ascend.convert.source.source import Source, open_source

__all__ = ["Source", "open_source"]
