"""Names of tensors as various programs save them, brought to those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from qwen3_ascend.checkpoint import architecture
from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.errors import SourceError

EMBEDDING = f"{architecture.EMBEDDING}.weight"
HEAD = f"{LM_HEAD}.weight"

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "base_model.model.": "peft",
}
"""Prefixes that a wrapper puts before every name, and the wrapper."""

PARENTS = ("model.language_model.", "language_model.", "model.text_model.", "llm.", "thinker.")
"""Prefixes of a language model within a larger one."""

FLAT = ("embed_tokens.", "layers.", "norm.")
"""Beginnings of the names of a backbone that was saved without its language model."""


@dataclass(frozen=True)
class Names:
    """The tensors of a source.

    Attributes:
        original: name in the file, by the name that transformers gives the tensor.
        is_backbone: whether it was saved without a language model's head.
        notes: what was decided.
    """

    original: Mapping[str, str]
    is_backbone: bool
    notes: tuple[str, ...]


def canonical(names: Collection[str], tied: bool) -> Names:
    """The names that transformers gives these tensors.

    Args:
        names: as they are in the files.
        tied: whether config.json ties the output projection to the embedding, which may then be
            stored under either name, as transformers takes it.

    Raises:
        SourceError: if two tensors come to the same name, or the language model is a part of a
            larger model.
    """
    original = {name: name for name in names}
    notes: list[str] = []
    for prefix, wrapper in WRAPPERS.items():
        original = _without(prefix, original, notes, f"left by {wrapper}")
    if any("_orig_mod." in name for name in original):
        notes.append("_orig_mod. (left by torch.compile) is left out of the tensors' names")
        original = _renamed(original, lambda name: name.replace("_orig_mod.", ""))
    _refuse_parents(original)
    is_backbone = bool(original) and any(name.startswith(FLAT) for name in original)
    if is_backbone:
        original = _renamed(original, lambda n: f"model.{n}" if n.startswith(FLAT) else n)
        notes.append("the source is a backbone: names without 'model.' at their beginning")
    if tied and EMBEDDING not in original and HEAD in original:
        original = _renamed(original, lambda name: EMBEDDING if name == HEAD else name)
        notes.append(f"the tied embedding is stored as {HEAD}")
    return Names(original, is_backbone and HEAD not in original, tuple(notes))


def _without(
    prefix: str, original: Mapping[str, str], notes: list[str], why: str
) -> dict[str, str]:
    """The names without a prefix that all of them have."""
    if not original or not all(name.startswith(prefix) for name in original):
        return dict(original)
    notes.append(f"every tensor's name begins with {prefix} ({why}), which is left out")
    return _renamed(original, lambda name: name.removeprefix(prefix))


def _renamed(original: Mapping[str, str], rename: Callable[[str], str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, stored in original.items():
        new = rename(name)
        if new in found:
            raise SourceError(
                f"{found[new]} and {stored} are the same tensor ({new}) under two names: remove "
                f"the one that is not meant"
            )
        found[new] = stored
    return found


def _refuse_parents(original: Collection[str]) -> None:
    for prefix in PARENTS:
        if any(name.startswith(prefix) for name in original):
            raise SourceError(
                f"names of tensors begin with {prefix}, as in a vision-language or other larger "
                f"model; save its language model by itself, as Qwen3ForCausalLM, and convert that"
            )
