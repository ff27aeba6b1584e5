"""Names of tensors as various programs save them, brought to those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from qwen3_ascend.checkpoint import architecture
from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.errors import SourceError
from qwen3_ascend.files.safetensors import TensorSlot

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
class Stored:
    """Where a tensor of a model lies in its source.

    Attributes:
        name: of the tensor in its file.
        expert: which matrix of it, if it holds those of all experts; None for the whole tensor.
        part, parts: which of as many equal parts of the rows of that matrix.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def slot(self, whole: TensorSlot) -> TensorSlot:
        """Type, shape and bytes of the tensor, of those of the one that holds it."""
        if self.expert is None:
            return whole
        experts, rows, columns = whole.shape
        nbytes = whole.nbytes // experts // self.parts
        start = whole.start + (self.expert * self.parts + self.part) * nbytes
        return TensorSlot(whole.dtype, (rows // self.parts, columns), start, start + nbytes)

    def of(self, whole: Tensor) -> Tensor:
        """The tensor, a view of the one that holds it."""
        if self.expert is None:
            return whole
        rows = whole.shape[1] // self.parts
        return whole[self.expert, self.part * rows : (self.part + 1) * rows]


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


FUSED_EXPERTS = {
    ".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".mlp.experts.down_proj": ("down_proj",),
}
"""How the names of tensors end that hold the weights of all experts, [experts, N, K], and the
linears that are stacked in each matrix; source: Qwen3MoeExperts of transformers 5."""


def divided(original: Mapping[str, str], experts: int) -> dict[str, Stored]:
    """Where each tensor of a model lies, weights of experts that are stored together by the names
    of each.

    Args:
        original: see Names.
        experts: of a layer; 0 for a dense model, in which no such names are looked for.
    """
    found, ends = dict[str, Stored](), tuple(FUSED_EXPERTS) if experts else ()
    for name, stored in original.items():
        if not name.endswith(ends):
            found[name] = Stored(stored)
            continue
        end = next(end for end in ends if name.endswith(end))
        prefix, linears = name.removesuffix(end), FUSED_EXPERTS[end]
        for expert in range(experts):
            for part, linear in enumerate(linears):
                each = f"{prefix}.mlp.experts.{expert}.{linear}.weight"
                if each in original:
                    raise SourceError(f"{stored} and {original[each]} hold the same weights twice")
                found[each] = Stored(stored, expert, part, len(linears))
    return found


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
