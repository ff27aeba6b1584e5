"""Measures what a model loses if one of its linears alone is quantized.

The model of floats goes through the texts once, for its own predictions. Then, layer by layer, each
linear becomes each of its rungs; the hidden states that this gives go through the float layers
above, and the predictions are compared. Cheap guesses (error of the weights, error of the outputs,
the place in the model) were no better than chance at five bits a weight, so nothing is guessed.

In memory are one layer and its quantized linears, the hidden states of all rungs of one layer, and
a few hundred rows of logits. The cost is that of half a pass over the model for each rung.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import LayerSpec, model_spec
from qwen3_ascend.checkpoint.linear import BIAS, Linear, quantize, stored_bias
from qwen3_ascend.checkpoint.schemes.grid import IntegerScheme
from qwen3_ascend.convert.bits.ladder import Ladder, Rung
from qwen3_ascend.convert.bits.sensitivities import Loss
from qwen3_ascend.convert.calibration.recording import Wanted, recorded_layer, seen
from qwen3_ascend.convert.quantizers import QUANTIZERS
from qwen3_ascend.convert.recipe import NEAREST
from qwen3_ascend.convert.statistics import InputStatistics, Seen, are_finite
from qwen3_ascend.convert.weights import chunk_outputs
from qwen3_ascend.errors import SourceError
from qwen3_ascend.native import Kernels
from qwen3_ascend.runtime.backends.base import DeviceLinear
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, Mlp
from qwen3_ascend.runtime.streaming import LayeredModel, LayerStream

States = list[Tensor]
"""The hidden states [T, hidden] of each step of a stream."""

Tell = Callable[[str], None]
"""Is told what is under way."""


class Measuring:
    """See the module."""

    def __init__(
        self,
        floats: LayeredModel,
        stream: LayerStream[LayerKV],
        wanted: Mapping[str, Wanted],
        kernels: Kernels,
        tell: Tell,
    ) -> None:
        """Args:
        floats: the model, on the backend of the stream.
        stream: of the texts.
        wanted: what the quantizers have to know of the inputs of which linears, by name.
        kernels: to quantize with.
        tell: is called before each layer that is computed.
        """
        self._floats, self._stream, self._wanted = floats, stream, wanted
        self._kernels, self._tell = kernels, tell
        self._layers = model_spec(floats.config).layers

    @torch.inference_mode()
    def run(self, ladders: Sequence[Ladder]) -> Iterator[Mapping[str, Sequence[Loss]]]:
        """What each linear of a layer loses, layer by layer, by its name.

        Args:
            ladders: of the linears that are wanted; layers without any are only passed.

        Raises:
            SourceError: if the model, or what quantization makes of it, gives no numbers.
        """
        by_name = {ladder.item.name: ladder for ladder in ladders}
        reference = self._stream.read(self._floats, lambda: self._tell("predictions of the model"))
        states = self._stream.embed(self._floats.embedding())
        for number, spec in enumerate(self._layers):
            here = [by_name[name] for name in _places(spec) if name in by_name]
            layer, recorders = recorded_layer(
                self._floats.layer(number), spec, self._wanted, self._stream.backend
            )
            self._tell(f"layer {number + 1} of {len(self._layers)}")
            after = [*self._stream.through(layer, states)]
            if here:
                known = {name: seen(found) for name, found in recorders.items()}
                _require_finite(name for name, found in known.items() if not are_finite(found))
                changed = [
                    [*self._stream.through(variant, states)]
                    for variant in self._variants(number, here, known)
                ]
                yield self._losses(here, self._finished(number + 1, changed), reference)
            states = after

    def _variants(
        self, number: int, ladders: Sequence[Ladder], known: Mapping[str, Seen]
    ) -> Iterator[DecoderLayer]:
        """A layer with one of its linears quantized, for each rung but those that lose nothing."""
        layer, spec = self._floats.layer(number), self._layers[number]
        for ladder in ladders:
            name = ladder.item.name
            for rung in _lossy(ladder):
                (inputs,) = known.get(name, (None,))
                made = self._quantized(_linear(layer, _places(spec)[name]), rung, inputs)
                yield _with(layer, _places(spec)[name], made)

    def _quantized(
        self, linear: DeviceLinear, rung: Rung, known: InputStatistics | None
    ) -> DeviceLinear:
        """A linear of floats [N, K] as a rung has it."""
        scheme = rung.scheme
        assert isinstance(scheme, IntegerScheme)
        weight = linear.weight.float().cpu()
        bias = getattr(linear, "bias", None)  # every linear of floats has it; see Backend.dense
        bias = None if bias is None else bias.cpu()
        if rung.quantizer == NEAREST:
            return self._stream.backend.linear(quantize(scheme, weight, bias, rung.layout))
        choose = QUANTIZERS[rung.quantizer].prepare(scheme.grid, known, self._kernels)
        chosen = [choose(rows) for rows in weight.split(chunk_outputs(weight.shape[1]))]
        integers = torch.cat([part.integers for part in chosen])
        scales = torch.cat([part.scales for part in chosen])
        tensors = scheme.pack(scheme.codes(integers, scales), rung.layout)
        if bias is not None:
            tensors = {**tensors, BIAS: stored_bias(bias)}
        made = Linear(scheme, tuple(weight.shape), rung.layout, tensors)
        return self._stream.backend.linear(made)

    def _finished(self, first: int, variants: list[States]) -> list[States]:
        """The states of all variants after the layers that are left."""
        for number in range(first, len(self._layers)):
            layer = self._floats.layer(number)
            self._tell(f"layer {first} of {len(self._layers)}")
            for index, states in enumerate(variants):
                variants[index] = [*self._stream.through(layer, states)]
        return variants

    def _losses(
        self, ladders: Sequence[Ladder], finished: Sequence[States], reference: States
    ) -> dict[str, list[Loss]]:
        divergences = iter(self._divergences(finished, reference))
        found = {
            ladder.item.name: [
                Loss.of(rung, next(divergences) if rung in _lossy(ladder) else 0.0)
                for rung in ladder.rungs
            ]
            for ladder in ladders
        }
        _require_finite(
            name
            for name, losses in found.items()
            if not all(math.isfinite(loss.kl) for loss in losses)
        )
        return found

    def _divergences(self, variants: Sequence[States], reference: States) -> list[float]:
        """Mean KL(reference || variant) over all tokens, in nats, of each variant."""
        norm, head = self._floats.final_norm(), self._floats.head()
        sums, tokens = [0.0] * len(variants), 0
        for step, states in enumerate(reference):
            streams = [
                self._stream.logits(found, norm, head)
                for found in (states, *(variant[step] for variant in variants))
            ]
            for expected, *others in zip(*streams, strict=True):
                log_p = expected.log_softmax(-1)
                p = log_p.exp()
                tokens += len(p)
                for index, logits in enumerate(others):
                    sums[index] += float((p * (log_p - logits.log_softmax(-1))).sum())
        return [found / tokens for found in sums]


def _require_finite(wrong: Iterable[str]) -> None:
    """SourceError naming the first linear of these."""
    for name in wrong:
        raise SourceError(
            f"{name} is fed, or leads to, values that are not finite: nothing can be measured of "
            f"such a model"
        )


def _lossy(ladder: Ladder) -> list[Rung]:
    return [rung for rung in ladder.rungs if isinstance(rung.scheme, IntegerScheme)]


def _places(spec: LayerSpec) -> dict[str, str]:
    """Where a linear of a layer is, by its name."""
    return {
        spec.qkv.name: "qkv",
        spec.output.name: "output",
        spec.mlp.gate_up.name: "gate_up",
        spec.mlp.down.name: "down",
    }


def _linear(layer: DecoderLayer, place: str) -> DeviceLinear:
    found: DeviceLinear = getattr(layer if place in ("qkv", "output") else layer.mlp, place)
    return found


def _with(layer: DecoderLayer, place: str, linear: DeviceLinear) -> DecoderLayer:
    if place == "qkv":
        return replace(layer, qkv=linear)
    if place == "output":
        return replace(layer, output=linear)
    assert isinstance(layer.mlp, Mlp), "layers with experts are refused before"
    if place == "gate_up":
        return replace(layer, mlp=replace(layer.mlp, gate_up=linear))
    return replace(layer, mlp=replace(layer.mlp, down=linear))
