"""The calibrated conversion: layer by layer, each with the inputs that the layers below it give.

For each layer in turn: its float weights are run over the calibration data, and what its linears
are fed is recorded; its weights are quantized and written as in any conversion; then the layer that
was written, read back from the staged files, makes the inputs of the next one. So a layer is
calibrated with the errors of those below it, and makes up for them where its quantizer can. One
capture a layer is as good as one before each linear (measured), and costs two passes over it.

The hidden states between two layers are in a file of the staging folder, from which a conversion
that was killed continues. Where they are lost, the layers that are written make them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import LM_HEAD, model_spec
from qwen3_ascend.convert.calibration.hidden import HiddenStates
from qwen3_ascend.convert.calibration.needs import STEP_TOKENS, wanted
from qwen3_ascend.convert.calibration.recording import Wanted, recorded_layer, seen
from qwen3_ascend.convert.calibration.written import WrittenWeights
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.float_model import Changed, FloatModel
from qwen3_ascend.convert.plan import Item
from qwen3_ascend.convert.statistics import Seen
from qwen3_ascend.files.memory import release_free_memory
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import as_float
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.streaming import LayeredModel, LayerStream, StoredModel, one_layer

if TYPE_CHECKING:
    from qwen3_ascend.convert.pipeline import Conversion


class Workshop(Protocol):
    """Where items are made: the conversion, as far as the pass knows it."""

    def remaining(self, order: Sequence[Item]) -> list[Item]:
        """The items that are not done."""

    def fit(self, number: int, statistics: Mapping[str, Seen]) -> dict[str, Seen]:
        """Lets transforms look at what the linears of a layer are fed; what they are fed then."""

    def make_stage(self, items: Sequence[Item], statistics: dict[str, Seen]) -> None:
        """Makes those items of a stage that are not done yet.

        Args:
            items: of the stage.
            statistics: of the inputs of linears, by name; each is taken out by its item.
        """


def calibrated_pass(
    conversion: Conversion,
    changed: Changed,
    stages: Sequence[Sequence[Item]],
    windows: Sequence[Sequence[int]],
    events: Events,
) -> CalibratedPass:
    """The pass of a conversion over windows of tokens.

    Args:
        conversion: of a plan that is calibrated.
        changed: what the transforms make of a source tensor.
        stages: see CalibratedPass.
        windows: token ids.
        events: is told what is under way.

    Raises:
        DeviceError: if the device cannot be used; says what to do.
    """
    plan = conversion.plan
    assert plan.calibration is not None
    config = one_layer(plan.config, plan.calibration.length)
    backend = backends.get(config, device_options(plan.calibration.record.device))
    written = WrittenWeights(plan, conversion.files, conversion.writer.staging)
    floats = FloatModel(conversion.source, backend, changed)
    stream = LayerStream(backend, config.rms_norm_eps, windows, STEP_TOKENS)
    return CalibratedPass(conversion, floats, written, stages, wanted(plan), stream, events)


def device_options(device: str) -> DeviceOptions:
    """A CPU computes in float32; an NPU in its own type."""
    return DeviceOptions(device=device, dtype="float32" if device == "cpu" else "auto")


class CalibratedPass:
    """See the module."""

    def __init__(
        self,
        workshop: Workshop,
        floats: LayeredModel,
        written: WrittenWeights,
        stages: Sequence[Sequence[Item]],
        wanted: Mapping[str, Wanted],
        stream: LayerStream[LayerKV],
        events: Events,
    ) -> None:
        """Args:
        workshop: where items are made; what an earlier run has done is taken up already.
        floats: the model before its weights are quantized, on the backend of the stream.
        written: what has been written of it so far.
        stages: the items before the first layer, of each layer, and after the last one.
        wanted: what is to be known of the inputs of which linears, by name.
        stream: of the calibration data.
        events: is told what is under way.
        """
        self._workshop, self._floats, self._weights = workshop, floats, written
        self._stages, self._wanted = stages, wanted
        self._stream, self._events = stream, events
        self._spec = model_spec(written.config)

    def run(self, staging: Path) -> None:
        """Makes all items; the states between layers are kept in a folder."""
        before, *layers, after = self._stages
        self._workshop.make_stage(before, {})
        width, steps = self._weights.config.hidden_size, self._stream.steps
        shapes = [(len(step.tokens), width) for step in steps]
        hidden = HiddenStates(staging, shapes, self._stream.backend.dtype)
        if not hidden.take_up(self._complete(layers)):
            hidden.keep(0, self._embedded())
        for number in range(hidden.layer, len(layers)):
            self._make_layer(number, layers[number], hidden)
        self._workshop.make_stage(after, self._head_statistics(hidden))

    def _embedded(self) -> Iterator[Tensor]:
        """The states before the first layer: only the rows that occur are read."""
        table, backend = self._weights.tensor(self._spec.embedding.name), self._stream.backend
        return (backend.upload(table[step.tokens.long()]) for step in self._stream.steps)

    def _complete(self, layers: Sequence[Sequence[Item]]) -> int:
        """How many layers are done, each with all its items."""
        left = (number for number, items in enumerate(layers) if self._workshop.remaining(items))
        return next(left, len(layers))

    def _make_layer(self, number: int, items: Sequence[Item], hidden: HiddenStates) -> None:
        place = f"layer {number + 1} of {len(self._spec.layers)}"
        missing = self._workshop.remaining(items)
        statistics: dict[str, Seen] = {}
        if missing:
            observed = self._observed(number, hidden, f"{place}: observed")
            statistics = self._workshop.fit(number, observed)
            del observed  # large; an item lets go of its own
        release_free_memory()
        self._workshop.make_stage(items, statistics)
        release_free_memory()
        with torch.inference_mode():
            layer = StoredModel(self._weights, self._stream.backend).layer(number)
            release_free_memory()
            hidden.keep(number + 1, self._through(layer, hidden, f"{place}: passed"))
        del layer
        release_free_memory()

    def _through(self, layer: DecoderLayer, hidden: HiddenStates, what: str) -> Iterator[Tensor]:
        """The states of each step after a layer."""
        steps = (self._stream.backend.upload(step) for step in hidden.steps)
        for states in self._stream.through(layer, steps):
            yield states
            release_free_memory()  # what a step leaves is not where the next one wants it
            self._events.working(what)

    def _observed(self, number: int, hidden: HiddenStates, what: str) -> dict[str, Seen]:
        """What the linears of a layer of floats are fed."""
        spec = self._spec.layers[number]
        with torch.inference_mode():
            layer, recorders = recorded_layer(
                self._floats.layer(number), spec, self._wanted, self._stream.backend
            )
            release_free_memory()
            for _ in self._through(layer, hidden, what) if recorders else ():
                pass
            return {name: seen(found) for name, found in recorders.items()}

    def _head_statistics(self, hidden: HiddenStates) -> dict[str, Seen]:
        """What the output projection is fed."""
        if LM_HEAD not in self._wanted:
            return {}
        recorder, stream = self._wanted[LM_HEAD].recorder(), self._stream
        with torch.inference_mode():
            norm = self._floats.final_norm()
            consumer = stream.backend.dense(norm[None])  # any that wants floats
            for states in map(stream.backend.upload, hidden.steps):
                x, _ = stream.backend.add_norm(states, None, norm, stream.epsilon, consumer)
                recorder.see(as_float(x))
            return {LM_HEAD: seen([recorder])}
