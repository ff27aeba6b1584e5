"""Where the weights come from: a folder, Hugging Face's Hub, or ModelScope."""

from __future__ import annotations

from qwen3_ascend.convert.source.source import HUBS, Source, open_source

__all__ = ["HUBS", "Source", "open_source"]
