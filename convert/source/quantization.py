"""What a source that is quantized already says of its linears.

See convert/exchange.py for the formats. Each says by its own means which linears are quantized, and
how; what can neither be taken nor decoded is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_ascend.checkpoint.architecture import LM_HEAD, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.schemes import BF16, Scheme
from qwen3_ascend.convert.encodings import FLOAT, Encoding
from qwen3_ascend.convert.exchange import QUANTIZATION_CONFIG
from qwen3_ascend.convert.recipe import SCHEMA, Recipe, Rule

AS_SOURCE = "as-source"
"""Name of the recipe that keeps what a source holds."""


@dataclass(frozen=True)
class Quantization:
    """The linears of a source that are quantized.

    Attributes:
        format: name of the format, as the manifest states it; None if nothing is quantized.
        encodings: how each quantized linear lies in the source, by its name in transformers.
        notes: what is to be known of them, for people.
    """

    format: str | None = None
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def encoding(self, linear: str) -> Encoding:
        """How the source holds a linear."""
        return self.encodings.get(linear, FLOAT)

    def without(self, linear: str) -> Quantization:
        """The same but for one linear."""
        kept = {name: found for name, found in self.encodings.items() if name != linear}
        return replace(self, encodings=kept)

    @property
    def has_codes(self) -> bool:
        """Whether there are codes to be taken."""
        return any(encoding.scheme is not None for encoding in self.encodings.values())

    def recipe(self, linears: Iterable[str]) -> Recipe:
        """The recipe that takes every code that is there, and keeps floats as bfloat16.

        Args:
            linears: the names of all linears that a recipe decides on.
        """
        schemes = {name: self.encoding(name).scheme or BF16() for name in linears}
        ((common, _),) = Counter(schemes.values()).most_common(1)
        others = [Rule(name, scheme) for name, scheme in schemes.items() if scheme != common]
        return _recipe(f"what the {self.format} source holds", [*others, Rule("*", common)])


NOT_QUANTIZED = Quantization()


def quant_method(config: Mapping[str, Any]) -> str | None:
    """What a config.json says that its weights were quantized by; None if it says nothing."""
    said = config.get(QUANTIZATION_CONFIG)
    method = said.get("quant_method") if isinstance(said, dict) else None
    return method if isinstance(method, str) else None


def linear_names(config: Qwen3Config) -> tuple[str, ...]:
    """The linears of a model by their names in transformers, the output projection included."""
    names = [source for spec in model_spec(config).linears for source in spec.all_sources]
    return tuple(dict.fromkeys([*names, LM_HEAD]))


def _recipe(description: str, rules: Collection[Rule]) -> Recipe:
    said: dict[str, Any] = {
        "schema": SCHEMA,
        "name": AS_SOURCE,
        "description": description,
        "rules": [{"match": rule.match, "scheme": _spelled(rule.scheme)} for rule in rules],
    }
    return Recipe(AS_SOURCE, description, tuple(rules), said)


def _spelled(scheme: Scheme) -> str | dict[str, Any]:
    """A scheme as a recipe's YAML has it."""
    return scheme.to_json() if scheme.parameters else scheme.name
