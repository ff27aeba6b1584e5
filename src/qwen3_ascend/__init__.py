"""Take Qwen3 from the Hub to an Ascend NPU.

The public names, imported when first used, so that `import qwen3_ascend` does not load torch:

    load                 a converted checkpoint -> an LLM that generates
    SamplingParams       how tokens are chosen
    convert_checkpoint   a Hugging Face model -> a checkpoint
    Recipe               which scheme each linear gets
    ConvertOptions       everything else that may be chosen about a conversion
    Events               what a conversion tells while it runs
    UserError            what a user can mend, and its kinds: OptionError, ConfigError,
                         SourceError (DamagedSourceError), CheckpointError, RecipeError,
                         RequestError, DeviceError
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_ascend.lazy import lazy_names
from qwen3_ascend.version import __version__

if TYPE_CHECKING:
    from qwen3_ascend.convert import ConvertOptions, Events, Recipe, convert_checkpoint
    from qwen3_ascend.errors import (
        CheckpointError,
        ConfigError,
        DamagedSourceError,
        DeviceError,
        OptionError,
        RecipeError,
        RequestError,
        SourceError,
        UserError,
    )
    from qwen3_ascend.runtime import SamplingParams, load

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConvertOptions",
    "DamagedSourceError",
    "DeviceError",
    "Events",
    "OptionError",
    "Recipe",
    "RecipeError",
    "RequestError",
    "SamplingParams",
    "SourceError",
    "UserError",
    "__version__",
    "convert_checkpoint",
    "load",
]

_CONVERT = ("ConvertOptions", "Events", "Recipe", "convert_checkpoint")
_RUNTIME = ("SamplingParams", "load")
_ERRORS = tuple(name for name in __all__ if name.endswith("Error"))

__getattr__, __dir__ = lazy_names(
    __name__,
    {"__version__": "qwen3_ascend.version"}
    | dict.fromkeys(_CONVERT, "qwen3_ascend.convert")
    | dict.fromkeys(_RUNTIME, "qwen3_ascend.runtime")
    | dict.fromkeys(_ERRORS, "qwen3_ascend.errors"),
)
