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
        key: under which `NPUGraph.update` is given it.
        by_keyword: whether the operator is called with it as a keyword.
    """

    operator: str
    key: str
    by_keyword: bool


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
