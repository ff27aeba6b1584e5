"""rotate: orthogonal changes of basis, without data (QuaRot, arXiv 2404.00456; SpinQuant).

R1 turns the residual stream: what writes it (embedding, o, down) turns its outputs, what reads it
(q, k, v, gate, up, the router, the head) its inputs. An RMS norm commutes with a rotation once its
gain is 1, so gains go into the linears that read the norm. R2 turns the values of each head, and
the inputs of o back. Queries and keys have norms of their own, and nothing is moved across those.

A channel that is far larger than the others is spread over all of them, in weights and in
activations. Rows that cle could still make alike are mixed, so cle comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from qwen3_ascend.convert.transforms.base import Transform
from qwen3_ascend.convert.transforms.changes import Changes, Floats, Gain
from qwen3_ascend.convert.transforms.hadamard import Rotation, base_matrix
from qwen3_ascend.convert.transforms.parts import EndParts, LayerParts, ModelParts, Unit
from qwen3_ascend.native import Kernels

RESIDUAL = "residual"
"""The name that the signs of R1 are drawn by."""


@dataclass(frozen=True)
class RotateModel(Transform):
    """See the module."""

    unties: bool = True

    @override
    def touches(self, model: ModelParts, unit: Unit) -> Mapping[str, int]:
        for size in (model.hidden_size, model.head_dim):
            base_matrix(size)  # refuses a size that there is none of
        if isinstance(unit, EndParts):
            return dict.fromkeys((unit.embedding, unit.final_norm, unit.head), 1)
        norms = (unit.input_norm, unit.post_attention_norm)
        return {
            **dict.fromkeys((*norms, *unit.attention_readers, *unit.mlp_readers), 1),
            unit.value: model.head_dim,
            **dict.fromkeys(unit.writers, model.hidden_size),
        }

    @override
    def consults(self, model: ModelParts, unit: Unit) -> tuple[str, ...]:
        if isinstance(unit, EndParts):
            return (unit.final_norm,)
        return unit.input_norm, unit.post_attention_norm

    @override
    def change(
        self, model: ModelParts, unit: Unit, floats: Floats, changes: Changes, kernels: Kernels
    ) -> Changes:
        def absorbed(changes: Changes, norm: str, *readers: str) -> Changes:
            gain = changes.weight(norm, floats, kernels)[0].float()
            return changes.regained(norm, Gain.replacing(gain, torch.ones_like(gain)), *readers)

        residual = Rotation(model.hidden_size, RESIDUAL)
        if isinstance(unit, EndParts):
            changes = absorbed(changes, unit.final_norm, unit.head)
            return changes.rotated("inputs", residual, unit.embedding, unit.head)
        changes = absorbed(changes, unit.input_norm, *unit.attention_readers)
        changes = absorbed(changes, unit.post_attention_norm, *unit.mlp_readers)
        changes = changes.rotated("inputs", residual, *unit.attention_readers, *unit.mlp_readers)
        changes = changes.rotated("outputs", residual, *unit.writers)
        return _values_rotated(model, unit, changes)


def _values_rotated(model: ModelParts, layer: LayerParts, changes: Changes) -> Changes:
    rotation = Rotation(model.head_dim, layer.value)
    changes = changes.rotated("outputs", rotation, layer.value)
    return changes.rotated("inputs", rotation, layer.output)
