"""How the attention of a captured step is given the context lengths of each replay.

A captured kernel keeps its host arguments. torch_npu can replace a group of captured tasks by those
that another call issues (graph_task_update_begin and _end); an event that the graph waits for holds
the kernel back until then. There are two ways to this:

- `BoundCalls` makes the groups itself and binds each layer's call once, at capture. An update is
  then, for each layer, four calls into torch_npu and no search for anything.
- `DispatchedCalls` leaves it to `NPUGraph.update`, which records operators that it knows as they
  pass, and for each layer of each update copies dictionaries and looks its handler up.

What is bound holds no memory: tensors of a captured step live in the pool of the graphs, and a
reference from each layer would keep as many queries and outputs of each batch size apart as there
are layers (for 36 layers of 4096 columns, 590 KB a row of each batch size, 18 MB for 1 to 16 and
2.5 GB for 1 to 256). torch_npu's weak references know the address alone, which stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch_npu

from qwen3_ascend.runtime.backends.npu.graph_updates import UpdatedArgument
from qwen3_ascend.runtime.backends.npu.side_stream import SideStream

Values = dict[str, Any]
"""Arguments of a captured call by name, as one replay wants them; all layers share them."""


class CapturedGraph(Protocol):
    """A graph that is launched in two halves: between them the device waits for the second."""

    def launch(self) -> None:
        """Starts a replay on the current stream."""

    def update(self, values: Values) -> None:
        """Gives the replay its values. If this raises, the device waits for ever."""


class CapturedCalls(Protocol):
    """A way to capture calls whose arguments replays replace."""

    def issue(
        self, operator: Callable[..., Any], arguments: tuple[Any, ...], keywords: Values
    ) -> None:
        """Issues a call inside `capture`."""

    def capture(self, pool: Any) -> AbstractContextManager[CapturedGraph]:
        """Captures what is issued within, into the memory of a pool of graphs."""


class PlainGraph:
    """A graph that needs nothing but its launch."""

    def __init__(self) -> None:
        self.graph = torch_npu.npu.NPUGraph()

    def launch(self) -> None:
        """See CapturedGraph."""
        self.graph.replay()

    def update(self, values: Values) -> None:
        """See CapturedGraph: there is nothing to give it."""


@contextmanager
def plain_capture(pool: Any) -> Iterator[CapturedGraph]:
    """Captures what is issued within, as it is."""
    captured = PlainGraph()
    with torch_npu.npu.graph(captured.graph, pool=pool):
        yield captured


class DispatchedGraph:
    """A graph whose calls torch_npu has recorded."""

    def __init__(self) -> None:
        self.graph = torch_npu.npu.NPUGraph()

    def launch(self) -> None:
        """See CapturedGraph. An event must not be recorded before the last replay has reset it, so
        the stream of the updates waits for what was issued before."""
        mode, current = self.graph.graph_dispatch_mode, torch_npu.npu.current_stream()
        if mode.update_stream == current:  # see BoundGraph
            mode.update_stream = torch_npu.npu.Stream()
        mode.update_stream.wait_stream(current)
        self.graph.replay()

    def update(self, values: Values) -> None:
        """See CapturedGraph."""
        self.graph.update(cpu_update_input=[values])


class DispatchedCalls:
    """Calls that torch_npu records by itself."""

    def issue(
        self, operator: Callable[..., Any], arguments: tuple[Any, ...], keywords: Values
    ) -> None:
        """See CapturedCalls."""
        operator(*arguments, **keywords)

    @contextmanager
    def capture(self, pool: Any) -> Iterator[CapturedGraph]:
        """See CapturedCalls."""
        captured = DispatchedGraph()
        with torch_npu.npu.graph(captured.graph, pool=pool, auto_dispatch_capture=True):
            yield captured


@dataclass(frozen=True)
class BoundCall:
    """A captured call of one layer.

    Attributes:
        handle: of its task group.
        event: that the group waits for.
        operator: called again by an update.
        arguments, keywords: with weak references to tensors of the device.
    """

    handle: Any
    event: Any
    operator: Callable[..., Any]
    arguments: list[Any]
    keywords: Values


@dataclass(frozen=True)
class BoundGraph:
    """A graph and the calls of its layers, in their order.

    Attributes:
        side: has the stream of the updates. On that of the steps, an update would stand behind
            the replay that waits for it.
        updated: the argument that each update replaces.
        graph: torch_npu's.
        calls: one for each layer.
    """

    side: SideStream
    updated: UpdatedArgument
    graph: Any = field(default_factory=lambda: torch_npu.npu.NPUGraph())
    calls: list[BoundCall] = field(default_factory=list)

    def launch(self) -> None:
        """See CapturedGraph, and DispatchedGraph for the wait."""
        self.side.beside_current().wait_stream(torch_npu.npu.current_stream())
        self.graph.replay()

    def update(self, values: Values) -> None:
        """See CapturedGraph."""
        place, stream = self.updated.place, self.side.beside_current()
        begin, end = torch_npu.npu.graph_task_update_begin, torch_npu.npu.graph_task_update_end
        named = {key: value for key, value in values.items() if place is None or key != self._key}
        with torch_npu.npu.stream(stream):
            for call in self.calls:
                if place is not None:
                    call.arguments[place] = values[self._key]
                call.keywords.update(named)
                begin(stream, call.handle)
                call.operator(*call.arguments, **call.keywords)
                end(stream)
                call.event.record(stream)

    @property
    def _key(self) -> str:
        return self.updated.key


class BoundCalls:
    """Calls that are bound at capture."""

    def __init__(self, updated: UpdatedArgument) -> None:
        """`updated` is the argument of these calls that replays replace."""
        self._updated, self._side = updated, SideStream()
        self._calls: list[BoundCall] = []

    def issue(
        self, operator: Callable[..., Any], arguments: tuple[Any, ...], keywords: Values
    ) -> None:
        """See CapturedCalls."""
        stream, event = torch_npu.npu.current_stream(), torch_npu.npu.ExternalEvent()
        event.wait(stream)
        event.reset(stream)
        torch_npu.npu.graph_task_group_begin(stream)
        operator(*arguments, **keywords)
        handle = torch_npu.npu.graph_task_group_end(stream)
        named = {key: _weakly(value) for key, value in keywords.items()}
        self._calls.append(BoundCall(handle, event, operator, _weakly(list(arguments)), named))

    @contextmanager
    def capture(self, pool: Any) -> Iterator[CapturedGraph]:
        """See CapturedCalls."""
        captured = BoundGraph(self._side, self._updated)
        self._calls = captured.calls
        with torch_npu.npu.graph(captured.graph, pool=pool):
            yield captured


def _weakly(value: Any) -> Any:
    """The same, with references to tensors of the device that keep no memory."""
    if isinstance(value, list):
        return [_weakly(each) for each in value]
    on_device = isinstance(value, torch.Tensor) and value.device.type == "npu"
    return torch_npu._C._weak_ref_tensor(value) if on_device else value
