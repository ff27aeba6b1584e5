"""The models that accuracy is measured on, each with the text that scores it and the text that
calibrates; no window is part of both.

    tiny          the trained model of the tests, 5 million parameters, and held-out definitions
    tiny-outlier  the same function, with outlier channels planted
    tiny-moe      the same function, by mixtures of experts with a planted router
    smol          SmolLM2-135M-Instruct as a Qwen3, and the help topics of Python (pydoc_data)
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.outliers import write_tiny_outlier
from support.planted import write_tiny_mixture
from support.tiny_models import DATA
from tokenizers import Tokenizer

WINDOW = 512
"""Tokens of a window."""

Windows = list[list[int]]


@dataclass(frozen=True)
class Model:
    """A model to quantize.

    Attributes:
        name: of the column.
        folder: the source, in bfloat16.
        scored: windows on which candidates are held against the source.
        calibration: windows that every calibrated method is given.
        calibration_texts: the same as text, for tools that take no tokens.
        calibration_text: all of them, one after the other, as the source has them.
    """

    name: str
    folder: Path
    scored: Windows
    calibration: Windows
    calibration_texts: list[str]
    calibration_text: str

    @property
    def identity(self) -> str:
        """The name, and a hash of the weights and of what they are calibrated with."""
        digest = hashlib.sha256(json.dumps(self.calibration).encode())
        for file in ("config.json", "tokenizer.json", "model.safetensors"):
            digest.update((self.folder / file).read_bytes())
        return f"{self.name}-{digest.hexdigest()[:12]}"


def tiny(cache: Path, windows: int) -> Model:
    """The trained model that the tests ship."""
    return _on_heldout("tiny", DATA, windows)


def tiny_outlier(cache: Path, windows: int) -> Model:
    """The tiny model with planted outliers."""
    return _on_heldout("tiny-outlier", write_tiny_outlier(cache / "tiny-outlier"), windows)


def tiny_moe(cache: Path, windows: int) -> Model:
    """The tiny model with mixtures of experts."""
    return _on_heldout("tiny-moe", write_tiny_mixture(cache / "tiny-moe"), windows)


def smol(cache: Path, windows: int) -> Model:
    """The real language model; SystemExit that says what to install if its wheel is not there."""
    try:
        from support.smol import smol_qwen3
    except ModuleNotFoundError as error:
        raise SystemExit(f"smol needs {error.name}: see tests/support/smol.py") from error
    names = sorted(pydoc_data.topics.topics)
    return _model(
        "smol", smol_qwen3(cache), _topics(names[1::3]), slice(windows),
        _topics(names[0::3] + names[2::3]), slice(8),
    )  # fmt: skip


MODELS: dict[str, Callable[[Path, int], Model]] = {
    "tiny": tiny,
    "tiny-outlier": tiny_outlier,
    "tiny-moe": tiny_moe,
    "smol": smol,
}


def _on_heldout(name: str, folder: Path, windows: int) -> Model:
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    return _model(name, folder, text, slice(windows), text, slice(48, 80))


def _topics(names: Sequence[str]) -> str:
    return "\n\n".join(pydoc_data.topics.topics[name] for name in names)


def _model(
    name: str, folder: Path, scored: str, some: slice, calibration: str, others: slice
) -> Model:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    calibrating = _windows(tokenizer, calibration)[others]
    texts = [tokenizer.decode(window, skip_special_tokens=False) for window in calibrating]
    tokens = [token for window in calibrating for token in window]
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    scoring = _windows(tokenizer, scored)[some]
    assert _windows(tokenizer, whole) == calibrating, "the text gives other tokens when it is cut"
    return Model(name, folder, scoring, calibrating, texts, whole)


def _windows(tokenizer: Tokenizer, text: str) -> Windows:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
