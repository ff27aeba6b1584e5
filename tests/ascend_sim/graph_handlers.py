"""How torch_npu tells which arguments NPUGraph.update can replace: three generations of wheels.

In all of them the update assigns the keyword arguments that a captured call was given by name.
They differ in how positional ones are found, and in where somebody who wants to know can look.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Iterator
from typing import Any

from .absences import changed_attribute
from .cann import Handlers

HANDLERS = "torch_npu.npu._npugraph_handlers"
PAGED = "_npu_paged_attention.default"
HARD_CODED = '''
class _GraphDispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    """What torch_npu 2.8.0.post2 has in npu/graphs.py, shortened to its names."""

    def update_capture_record(self, cpu_update_input):
        if record.op_cache_entry.__name__ in [
            "npu_fused_infer_attention_score", "npu_fused_infer_attention_score.out"
        ]:
            position, key = 6, "actual_seq_lengths_kv"
'''
HARD_CODED_PAGED = """
        elif record.op_cache_entry.__name__ == "_npu_paged_attention.default":
            position, key = 7, "context_lens"
"""


@contextlib.contextmanager
def graph_handlers(generation: Handlers) -> Iterator[None]:
    """The ways in which a wheel tells what NPUGraph.update can replace.

    "method": handlers with get_update_specs (2.9.0.post6, 2.10.0.post4 and newer).
    "table": handlers without it; `_OP_ARG_SPECS` of the simple handler names the positions, those
        of the fused attention are in code only (2.9.0.post2, 2.10.0).
    "hard_coded": no module of handlers; the names stand in the source of npu/graphs.py
        (2.8.0.post2, 2.9.0).
    "hard_coded_without_paged": so, and _npu_paged_attention is not among them: it is captured as
        any other kernel and attends over the lengths of the capture for ever (2.7.1).
    """
    with contextlib.ExitStack() as changes:
        if generation != "method":
            changes.enter_context(_without_specs())
        if generation == "hard_coded_without_paged":
            changes.enter_context(_unregistered(PAGED))
        if generation.startswith("hard_coded"):
            changes.enter_context(_without_modules(HANDLERS))
            paged = "" if generation.endswith("without_paged") else HARD_CODED_PAGED
            changes.enter_context(_source_of_graphs(HARD_CODED + paged))
        yield


def _registry() -> dict[str, Any]:
    """torch_npu's handlers by operator name; empty for a wheel that has none."""
    import torch_npu

    registry: dict[str, Any]
    registry = getattr(torch_npu.npu.graphs, "_NPU_GRAPH_OP_HANDLERS", {})
    return registry


def _update_by_place(specs: dict[str, list[tuple[str, int, str]]]) -> Any:
    """update_args of a handler that keeps its places to itself."""

    def update_args(cls: Any, record: Any, update_input: dict[str, Any]) -> None:
        for _, place, key in specs.get(record.op_cache_entry.__name__, []):
            if key in update_input and len(record.args) > place:
                record.args[place] = update_input[key]

    return classmethod(update_args)


@contextlib.contextmanager
def _without_specs() -> Iterator[None]:
    """Handlers work as before, but nobody can ask them for their specs."""
    handlers = dict.fromkeys(_registry().values())
    bases = dict.fromkeys(base for each in handlers for base in each.__mro__[1:-1])
    told = {each: each.UPDATE_SPECS for each in handlers if hasattr(each, "UPDATE_SPECS")}
    with contextlib.ExitStack() as changes:
        for each, specs in told.items():
            change = _update_by_place(specs)
            changes.enter_context(changed_attribute(each, "update_args", change))
            if PAGED in specs:
                table = {name: (places[0][1], places[0][2]) for name, places in specs.items()}
                changes.enter_context(changed_attribute(each, "_OP_ARG_SPECS", table))
        for each in (*told, *bases):
            for name in ("UPDATE_SPECS", "get_update_specs"):
                changes.enter_context(changed_attribute(each, name, None))
        yield


@contextlib.contextmanager
def _unregistered(operator: str) -> Iterator[None]:
    handler = _registry().pop(operator, None)
    try:
        yield
    finally:
        if handler is not None:
            _registry()[operator] = handler


@contextlib.contextmanager
def _without_modules(prefix: str) -> Iterator[None]:
    """Importing a package or anything in it raises ModuleNotFoundError."""
    if importlib.util.find_spec(prefix) is None:
        yield
        return
    parent, _, last = prefix.rpartition(".")
    hidden = {name: module for name, module in sys.modules.items() if name.startswith(prefix)}
    with changed_attribute(sys.modules[parent], last, None):
        sys.modules.update(dict.fromkeys((prefix, *hidden)))  # type: ignore[arg-type]
        try:
            yield
        finally:
            del sys.modules[prefix]
            sys.modules.update(hidden)


@contextlib.contextmanager
def _source_of_graphs(text: str) -> Iterator[None]:
    """inspect.getsource(torch_npu.npu.graphs) gives `text`, unless the wheel itself is that old."""
    import torch_npu

    path = inspect.getsourcefile(torch_npu.npu.graphs)
    if path is None or not _registry():
        yield
        return
    before = linecache.cache.get(path)
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    try:
        yield
    finally:
        linecache.cache.pop(path)
        if before is not None:
            linecache.cache[path] = before
