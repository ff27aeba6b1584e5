"""sensitivities.json: what a model loses if one of its linears alone is quantized.

It takes long to measure and serves every number of bits, so it is a file of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen3_ascend.convert.bits.ladder import Rung
from qwen3_ascend.errors import OptionError, os_errors
from qwen3_ascend.files.json_file import (
    Count,
    Finite,
    Name,
    check_keys,
    indented,
    plain,
    read_json_object,
    typed,
)

SENSITIVITIES = "sensitivities.json"
"""Its name in a checkpoint that was made of it."""

FORMAT = "qwen3-ascend sensitivities"


@dataclass(frozen=True)
class Loss:
    """One thing that a linear was made, all others being floats.

    Attributes:
        scheme: its name and parameters.
        quantizer: who found its codes.
        bits: stored of the linear, in all.
        kl: mean KL divergence of the predicted tokens from those of the floats, in nats.
    """

    scheme: Mapping[str, Any]
    quantizer: Name
    bits: Count
    kl: Finite

    @classmethod
    def of(cls, rung: Rung, kl: float) -> Loss:
        """What was measured of a rung."""
        return cls(rung.scheme.to_json(), rung.quantizer, rung.bits, kl)


@dataclass(frozen=True)
class Sensitivities:
    """What was measured of a model.

    Attributes:
        identity: the model, the recipe and the texts, in words; see `identity`.
        tokens: that were read.
        linears: by the name of a linear, what it may become with growing bits, the recipe's scheme
            first. Those of later layers are missing while it is being measured.
    """

    identity: Mapping[str, str]
    tokens: Count
    linears: Mapping[str, tuple[Loss, ...]] = field(default_factory=dict)
    format: str = FORMAT

    def and_of(self, linear: str, losses: Sequence[Loss]) -> Sensitivities:
        """With one more linear."""
        return replace(self, linears={**self.linears, linear: tuple(losses)})

    @os_errors(OptionError)
    def save(self, path: Path) -> None:
        """Writes a file, or replaces one, in one step."""
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_bytes(indented(plain(self)))
        os.replace(fresh, path)

    @classmethod
    def load(cls, path: Path) -> Sensitivities:
        """Reads a file; UserError, in one line, if it is not what `save` writes."""
        if not path.exists():
            raise OptionError(
                f"sensitivities: {path} does not exist; measure first, with "
                f"`qwen3-ascend sensitivity`"
            )
        data = read_json_object(path)
        try:
            found = typed(data, cls, str(path))
            check_keys(data, plain(found), str(path))
        except ValueError as error:
            raise OptionError(str(error)) from error
        if found.format != FORMAT:
            raise OptionError(f"{path} says that it is {found.format!r}, not {FORMAT!r}")
        return found
