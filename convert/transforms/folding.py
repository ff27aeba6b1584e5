"""Factors of what a layer's linears read, folded into what writes it: norms, v and up.

Calibration has seen the inputs x of the four linears of a layer. A transform with data finds
factors s for them: the linear reads x / s, and its inputs are multiplied by s. The division costs
nothing at run time, because a norm's gain, v or up take it over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.convert.transforms.changes import Changes, Floats, Gain
from qwen3_ascend.convert.transforms.parts import LayerParts, ModelParts
from qwen3_ascend.native import Kernels


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What is known of the inputs of the four linears of a dense layer."""

    qkv: InputStatistics
    output: InputStatistics
    gate_up: InputStatistics
    down: InputStatistics


@dataclass(frozen=True, eq=False)
class Folding:
    """A layer on its way: each method gives another one.

    Attributes:
        model, layer: whose it is; with one MLP.
        floats: gives the weights of the layer, as the source has them.
        kernels: to rotate with, if earlier changes do.
        changes: of the layer so far.
        inputs: of its linears after these changes.
    """

    model: ModelParts
    layer: LayerParts
    floats: Floats
    kernels: Kernels
    changes: Changes
    inputs: LayerInputs

    def weight(self, *names: str) -> Tensor:
        """Linears as they have become, stacked: float32 [N, K]."""
        return torch.cat([self.changes.weight(n, self.floats, self.kernels).float() for n in names])

    def qkv(self, factors: Tensor) -> Folding:
        """With the input of q, k and v divided by factors [hidden]."""
        layer = self.layer
        changes, exact = self._norm(layer.input_norm, layer.attention_readers, factors)
        inputs = replace(self.inputs, qkv=self.inputs.qkv.divided(exact))
        return replace(self, changes=changes, inputs=inputs)

    def gate_up(self, factors: Tensor) -> Folding:
        """With the input of gate and up divided by factors [hidden]."""
        layer = self.layer
        changes, exact = self._norm(layer.post_attention_norm, layer.mlp_readers, factors)
        inputs = replace(self.inputs, gate_up=self.inputs.gate_up.divided(exact))
        return replace(self, changes=changes, inputs=inputs)

    def output(self, factors: Tensor) -> Folding:
        """With the input of o divided by factors [kv heads * head_dim], one for each value."""
        spread = self.spread(factors)
        changes = self.changes.scaled("outputs", 1.0 / factors, self.layer.value)
        changes = changes.scaled("inputs", spread, self.layer.output)
        inputs = replace(self.inputs, output=self.inputs.output.divided(spread))
        return replace(self, changes=changes, inputs=inputs)

    def down(self, factors: Tensor) -> Folding:
        """With the input of down divided by factors [intermediate]."""
        (mlp,) = self.layer.mlps
        changes = self.changes.scaled("outputs", 1.0 / factors, mlp.up)
        changes = changes.scaled("inputs", factors, mlp.down)
        inputs = replace(self.inputs, down=self.inputs.down.divided(factors))
        return replace(self, changes=changes, inputs=inputs)

    def heads(self, inputs: Tensor) -> Tensor:
        """What belongs to the inputs of o [heads * head_dim], by the value that they are made of:
        [query heads of a group, kv heads * head_dim]."""
        groups = inputs.view(self.model.num_kv_heads, -1, self.model.head_dim)
        return groups.transpose(0, 1).flatten(1)

    def spread(self, factors: Tensor) -> Tensor:
        """The inverse: factors of values as those of the inputs of o."""
        groups = factors.view(self.model.num_kv_heads, 1, self.model.head_dim)
        heads = self.model.num_heads // self.model.num_kv_heads
        return groups.expand(-1, heads, -1).flatten()

    def _norm(self, norm: str, readers: tuple[str, ...], factors: Tensor) -> tuple[Changes, Tensor]:
        """Into a norm's gain, which bfloat16 rounds; and what the factors have become by that."""
        gain = self.changes.weight(norm, self.floats, self.kernels)[0].float()
        new = Gain.replacing(gain, gain / factors)
        return self.changes.regained(norm, new, *readers), new.factors
