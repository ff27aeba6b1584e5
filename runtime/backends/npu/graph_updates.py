"""Whether torch_npu updates the context lengths of a captured attention.

`NPUGraph.update` ignores what it does not know, and a replay then waits for ever or attends over
the lengths of the capture. Three generations of wheels say in three ways what they know:

1. since about CANN 9.1, each operator's handler answers `get_update_specs`;
2. for CANN 9.0, handlers exist, and keep a table of positions (`UPDATE_SPECS`, `_OP_ARG_SPECS`);
3. before, the names of the operators stand in the code of torch_npu/npu/graphs.py.

In all of them a keyword argument of a recorded operator is replaced whatever its name; tables are
needed for what is passed by position.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu

from qwen3_ascend.runtime.backends.npu.device import in_one_line

HANDLERS = "torch_npu.npu._npugraph_handlers.npugraph_handler"


@dataclass(frozen=True)
class Support:
    """Something that a machine offers or not.

    Attributes:
        what: it is.
        usable: whether it is there.
        detail: how it was found, or what is missing.
    """

    what: str
    usable: bool
    detail: str


@dataclass(frozen=True)
class UpdatedArgument:
    """The argument of a captured operator that each replay replaces.

    Attributes:
        operator: as torch_npu records it, such as "_npu_paged_attention.default".
        key: its name, under which `NPUGraph.update` is given it.
        place: among the positional arguments; None where it is passed as a keyword.
    """

    operator: str
    key: str
    place: int | None

    @property
    def by_keyword(self) -> bool:
        """Whether the operator is called with it as a keyword."""
        return self.place is None


CONTEXT_LENS_PLACE = 7

FUSED_LENGTHS = UpdatedArgument(
    "npu_fused_infer_attention_score.out", "actual_seq_lengths_kv", place=None
)
PAGED_LENGTHS = UpdatedArgument(
    "_npu_paged_attention.default", "context_lens", place=CONTEXT_LENS_PLACE
)
"""Context lengths of a captured decode step, of the two kernels of attention."""


def update_support(argument: UpdatedArgument) -> Support:
    """Whether a replay can be given another value of an argument; never raises."""
    what = f"graph update of {argument.key} of {argument.operator}"
    try:
        torch_npu.npu.NPUGraph.update  # noqa: B018 (absent from wheels that capture, but never update)
        source, known = _known_keys(argument)
    except Exception as error:
        return Support(what, False, f"torch_npu {torch_npu.__version__}: {in_one_line(error)}")
    if argument.key in known:
        return Support(what, True, source)
    keys = ", ".join(dict.fromkeys(known)) or "none"
    detail = f"torch_npu {torch_npu.__version__} does not update it ({source} knows: {keys})"
    return Support(what, False, detail)


def bound_support() -> Support:
    """Whether a capture can be told itself which calls replays are to change (graph_calls.py).

    The same functions are below `NPUGraph.update` in every wheel that has it.
    """
    what = "graph updates by calls that were bound at capture"
    names = (
        "graph_task_group_begin", "graph_task_group_end", "graph_task_update_begin",
        "graph_task_update_end", "ExternalEvent",
    )  # fmt: skip
    missing = [f"npu.{name}" for name in names if not hasattr(torch_npu.npu, name)]
    missing += [name for name in ("_weak_ref_tensor",) if not hasattr(torch_npu._C, name)]
    if missing:
        detail = f"torch_npu {torch_npu.__version__} has no {', '.join(missing)}"
        return Support(what, False, detail)
    return Support(what, True, "task groups and external events are there")


def _known_keys(argument: UpdatedArgument) -> tuple[str, tuple[str, ...]]:
    """(where it is said, the keys that are updated of an operator)."""
    handlers = _handlers()
    if handlers is None:
        return "npu/graphs.py", _keys_in_code(argument)
    handler = handlers.get(argument.operator)
    if handler is None:
        return "its table of handlers", ()
    keywords = _keywords(argument) if argument.by_keyword else ()
    if hasattr(handler, "get_update_specs"):
        source, spec = "get_update_specs", handler.get_update_specs(argument.operator)
    else:
        table = getattr(handler, "UPDATE_SPECS", None) or getattr(handler, "_OP_ARG_SPECS", {})
        source, spec = "its table of handlers", table.get(argument.operator)
    return source, (*_keys_of(spec), *keywords)


def _handlers() -> dict[str, Any] | None:
    """The handlers of captured operators by name; None before they existed."""
    try:
        return importlib.import_module(HANDLERS)._NPU_GRAPH_OP_HANDLERS
    except ImportError:
        return None


def _keys_in_code(argument: UpdatedArgument) -> tuple[str, ...]:
    """Of a wheel without handlers: a name that is not in the code is not recorded."""
    code = inspect.getsource(torch_npu.npu.graphs)
    if f'"{argument.operator}"' not in code:
        return ()
    if argument.by_keyword:
        return _keywords(argument)
    return (argument.key,) if f'"{argument.key}"' in code else ()


def _keywords(argument: UpdatedArgument) -> tuple[str, ...]:
    """The key, if it is the name of an argument of the operator."""
    name, overload = argument.operator.split(".")
    schema = getattr(getattr(torch.ops.npu, name), overload)._schema
    return tuple(each.name for each in schema.arguments if each.name == argument.key)


def _keys_of(spec: Any) -> tuple[str, ...]:
    """The keys of (position, key), or of a list of (kind, place, key)."""
    if spec is None:
        return ()
    return (spec[-1],) if isinstance(spec, tuple) else tuple(key for *_, key in spec)
