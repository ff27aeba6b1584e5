"""Take Qwen3 from the Hub to an Ascend NPU.

The public names, imported when first used, so that `import qwen3_ascend` does not load torch:

    load                 a converted checkpoint -> an LLM that generates
    convert_checkpoint   a Hugging Face model -> a checkpoint
    Recipe               which scheme each linear gets
    SamplingParams       how tokens are chosen
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwen3_ascend.version import __version__

if TYPE_CHECKING:
    from qwen3_ascend.convert import convert_checkpoint
    from qwen3_ascend.convert.recipe import Recipe
    from qwen3_ascend.runtime import load
    from qwen3_ascend.runtime.engine.request import SamplingParams

_HOMES = {
    "load": "qwen3_ascend.runtime",
    "convert_checkpoint": "qwen3_ascend.convert",
    "Recipe": "qwen3_ascend.convert.recipe",
    "SamplingParams": "qwen3_ascend.runtime.engine.request",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = ["Recipe", "SamplingParams", "__version__", "convert_checkpoint", "load"]
