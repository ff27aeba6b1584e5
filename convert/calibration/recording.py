"""Statistics of the inputs of a layer's linears, taken while a LayerStream computes the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import LayerSpec, LinearSpec
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.convert.quantizers import Needs
from qwen3_ascend.convert.statistics import InputStatistics, Seen
from qwen3_ascend.convert.triangle import Triangle
from qwen3_ascend.runtime.backends.base import Backend, DeviceExperts, DeviceLinear, Mixture
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.watched import WatchedLinear
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, Mlp


@dataclass
class Recorder:
    """The inputs x [T, K] of one linear, or of one expert, step by step.

    Attributes:
        hessian: whether x'x is wanted.
        input: what the linear will be fed once it is quantized: where that is codes with a scale
            for each token, x'x is taken of what those codes stand for, since this is what the
            quantized weight will be multiplied with. (A static scale depends on the range that is
            being recorded here.)
    """

    hessian: bool
    input: Input
    _tokens: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _products: Triangle | None = None

    def see(self, x: Tensor) -> None:
        """Takes the inputs [T, K] of one step into account; on the device where they are."""
        values = x.float()
        self._tokens += values.shape[0]
        self._take("least", values.amin(0), torch.minimum)
        self._take("largest", values.amax(0), torch.maximum)
        self._take("magnitude", values.abs().sum(0), torch.add)
        if self.input is Input.INT8_PER_TOKEN:
            codes, scale = quantize_tokens(values)
            values = codes.float() * scale[:, None]
        if self.hessian:
            if self._products is None:
                self._products = Triangle.zeros(values.shape[1], device=values.device)
            self._products.add_products(values)
        else:
            self._take("squares", values.square().sum(0), torch.add)

    @property
    def tokens(self) -> int:
        """How many it has seen."""
        return self._tokens

    def statistics(self) -> InputStatistics:
        """Of everything that was seen, on the CPU; at least one token. Nothing stays here."""
        sums, self._sums = self._sums, {}
        products, self._products = self._products, None
        hessian = None if products is None else products.mean(self._tokens)
        squares = sums["squares"].cpu() / self._tokens if hessian is None else hessian.diagonal()
        return InputStatistics(
            tokens=self._tokens,
            least=sums["least"].cpu(),
            largest=sums["largest"].cpu(),
            mean_magnitude=sums["magnitude"].cpu() / self._tokens,
            mean_square=squares,
            hessian=hessian,
        )

    def _take(self, name: str, found: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> None:
        before = self._sums.get(name)
        self._sums[name] = found if before is None else merge(before, found)


@dataclass(frozen=True)
class Wanted:
    """What is to be known of the inputs of a linear.

    Attributes:
        needs: how much.
        input: see Recorder.
    """

    needs: Needs
    input: Input

    def recorder(self) -> Recorder:
        """One that has seen nothing."""
        return Recorder(self.needs >= Needs.HESSIAN, self.input)


def recorded_layer(
    layer: DecoderLayer,
    spec: LayerSpec,
    wanted: Mapping[str, Wanted],
    backend: Backend[LayerKV],
) -> tuple[DecoderLayer, dict[str, tuple[Recorder, ...]]]:
    """A layer of floats that records, and the recorders of each of its linears by name: one, or
    those of the experts.

    Args:
        layer: its weights on the device.
        spec: its names.
        wanted: by name of the linear; those that it leaves out are not recorded.
        backend: that computes the layer.
    """
    recorders = {
        linear.name: tuple(wanted[linear.name].recorder() for _ in range(linear.experts or 1))
        for linear in spec
        if isinstance(linear, LinearSpec) and linear.name in wanted
    }

    def record(spec: LinearSpec, linear: DeviceLinear) -> DeviceLinear:
        if spec.name not in recorders:
            return linear
        (recorder,) = recorders[spec.name]
        return WatchedLinear(linear, recorder.see)

    def record_experts(spec: LinearSpec, experts: DeviceExperts) -> DeviceExperts:
        found = recorders.get(spec.name)
        if found is None:
            return experts
        return backend.watched_experts(experts, lambda number, x: found[number].see(x))

    gate_up, down = spec.mlp.gate_up, spec.mlp.down
    mlp: Mlp | Mixture
    if isinstance(layer.mlp, Mixture):
        mlp = replace(
            layer.mlp,
            gate_up=record_experts(gate_up, layer.mlp.gate_up),
            down=record_experts(down, layer.mlp.down),
        )
    else:
        mlp = replace(
            layer.mlp, gate_up=record(gate_up, layer.mlp.gate_up), down=record(down, layer.mlp.down)
        )
    recording = replace(
        layer, qkv=record(spec.qkv, layer.qkv), output=record(spec.output, layer.output), mlp=mlp
    )
    return recording, recorders


def seen(recorders: Sequence[Recorder]) -> Seen:
    """What the recorders of a linear have seen."""
    return tuple(recorder.statistics() if recorder.tokens else None for recorder in recorders)
