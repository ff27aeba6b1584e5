"""The fallback door, open only outside strict mode.

Open: every device kernel of aten and npu is wrapped.  torch_npu's own C++ runs first; when it
asked for an operator without a stand-in, the aten operator runs on CPU copies instead, as one
launch that the trace marks as a fallback.

Closed (strict mode, the default): nothing is wrapped and such a call raises, naming the operator.
The wheel has a fallback of its own, for aten operators that it has no kernel for: it copies to the
host, computes there and only warns.  That is refused as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .. import runtime, tensors, trace
from ..tensors import DeviceTensor

# These only make, alias or move tensors: torch_npu does them without any operator.
STRUCTURAL = frozenset(
    (
        "empty",
        "empty_strided",
        "as_strided",
        "view",
        "_reshape_alias",
        "resize_",
        "set_",
        "record_stream",
        "is_pinned",
        "_pin_memory",
        "_local_scalar_dense",
        "copy_",
        "_copy_from",
        "_copy_from_and_resize",
        "_to_copy",
        "to",
        "clone",
        "contiguous",
        "unfold",
        "alias",
        "slice",
        "expand",
        "is_set_to",
        "reshape",
        "_has_compatible_shallow_copy_type",
        "set_data",
    )
)
COMPOSED = (
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)
_libraries: list[torch.library.Library] = []
_lacking: set[str] = set()  # operators already known to lack a stand-in: C++ exceptions are slow


_open = False


def open_door() -> None:
    """Wraps all kernels of the wheel, and gives those it lacks to the CPU."""
    global _open
    _unregister()
    libraries = _new_libraries()
    for schema in _computing_schemas():
        library = libraries[schema.name.split("::")[0]]
        operator = _operator(schema)
        if operator is not None and _has_kernel(schema, "PrivateUse1"):
            original = torch.library.get_kernel(operator, "PrivateUse1")
            library.impl(
                operator,
                _wrapper(operator, original),
                "PrivateUse1",
                with_keyset=True,
                allow_override=True,
            )
        elif operator is not None and _would_reach_the_wheels_fallback(schema):
            library.impl(operator, functools.partial(_on_cpu, operator), "PrivateUse1")
    _open = True


def close_door() -> None:
    global _open
    if _libraries and not _open:
        return
    _unregister()
    libraries = _new_libraries()
    for schema in _computing_schemas():
        if not _has_kernel(schema, "PrivateUse1") and _would_reach_the_wheels_fallback(schema):
            operator = _operator(schema)
            if operator is not None:
                libraries["aten"].impl(
                    operator, functools.partial(_refuse, operator), "PrivateUse1"
                )
    _open = False


def _new_libraries() -> dict[str, torch.library.Library]:
    libraries = {name: torch.library.Library(name, "IMPL") for name in ("aten", "npu")}
    _libraries.extend(libraries.values())
    return libraries


def _unregister() -> None:
    while _libraries:
        _libraries.pop()._destroy()


def _computing_schemas() -> Iterator[Any]:
    for schema in torch._C._jit_get_all_schemas():
        namespace, base = schema.name.split("::")
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if namespace in ("aten", "npu") and base not in STRUCTURAL and not views:
            yield schema


def _full_name(schema: Any) -> str:
    return schema.name + (f".{schema.overload_name}" if schema.overload_name else "")


def _has_kernel(schema: Any, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(_full_name(schema), key)
    except RuntimeError:  # known to the script compiler only
        return False


def _would_reach_the_wheels_fallback(schema: Any) -> bool:
    """A kernel for the CPU but none that torch composes for every device."""
    return (
        schema.name.startswith("aten::")
        and _has_kernel(schema, "CPU")
        and not any(_has_kernel(schema, key) for key in COMPOSED)
    )


def _operator(schema: Any) -> Any:
    namespace, base = schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    return getattr(packet, schema.overload_name or "default", None)


def _refuse(operator: Any, *_args: Any, **_kwargs: Any) -> None:
    raise RuntimeError(f"strict mode: torch_npu has no kernel for {operator}, it would use the CPU")


def _on_cpu(operator: Any, *args: Any, **kwargs: Any) -> Any:
    return run_on_cpu(operator, args, kwargs)


def _wrapper(operator: Any, original: Any) -> Callable[..., object]:
    name = str(operator)
    tensor_places = [
        place
        for place, argument in enumerate(operator._schema.arguments)
        if str(argument.type) in ("Tensor", "Optional[Tensor]")
    ]

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        args = _wrap_numbers(args, tensor_places)
        if name in _lacking:
            return run_on_cpu(operator, args, kwargs)
        runtime.library.sim_take_missing()
        try:
            return original.call_boxed(keyset, *args, **kwargs)
        except RuntimeError:
            if runtime.library.sim_take_missing() is None or operator.namespace != "aten":
                raise
        _lacking.add(name)
        return run_on_cpu(operator, args, kwargs)

    return call


def _wrap_numbers(args: tuple[Any, ...], places: list[int]) -> tuple[Any, ...]:
    """A number given for a tensor argument reaches Python kernels bare."""
    changed = list(args)
    for place in places:
        if place < len(args) and isinstance(args[place], (bool, int, float)):
            double = torch.float64 if isinstance(args[place], float) else None
            changed[place] = torch.tensor(args[place], dtype=double)
    return tuple(changed)


def _on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def _to(device: str, value: object) -> object:
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device(device)
    return None if isinstance(value, torch.Generator) else value


def run_on_cpu(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator on CPU views of device memory, queued on the current stream."""
    flat, spec = tree_flatten((args, kwargs))
    described = [tensors.of(value) if _on_device(value) else value for value in flat]

    def on_cpu() -> Any:
        values = [
            value.read() if isinstance(value, DeviceTensor) else _to("cpu", value)
            for value in described
        ]
        call_args, call_kwargs = tree_unflatten(values, spec)
        return operator(*call_args, **call_kwargs)

    written = _written_arguments(operator, args, kwargs)
    if written is not None:
        _launch(operator, described, on_cpu)
        return written
    outputs = _allocate_outputs(operator, flat, spec)
    if outputs is None:  # the shapes depend on the data: the host has to wait, as on a device
        torch.npu.current_stream().synchronize()
        with torch._C._AutoDispatchBelowAutograd():
            result = on_cpu()
        return tree_map(lambda v: v.to("npu") if isinstance(v, torch.Tensor) else v, result)
    targets = [tensors.of(value) for value in tree_flatten(outputs)[0] if _on_device(value)]

    def run() -> None:
        results = [v for v in tree_flatten(on_cpu())[0] if isinstance(v, torch.Tensor)]
        for target, result in zip(targets, results, strict=True):
            target.write(result)

    _launch(operator, described, run)
    return outputs


def _launch(operator: Any, described: list[object], run: Callable[[], None]) -> None:
    arguments = [value for value in described if isinstance(value, DeviceTensor)]
    name = str(operator)
    trace.note(runtime.launch(name, run), "fallback", name, arguments)


def _written_arguments(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments an in-place or out= operator returns; None for one that makes new tensors."""
    written = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[place] if place < len(args) else kwargs[argument.name])
    if not written:
        return None
    return written[0] if len(operator._schema.returns) <= 1 else tuple(written)


def _allocate_outputs(operator: Any, flat: list[Any], spec: Any) -> Any:
    def on_meta(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        return _to("meta", value)

    try:
        args, kwargs = tree_unflatten([on_meta(value) for value in flat], spec)
        shapes = operator(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return None
    return tree_map(
        lambda v: (
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="npu")
            if isinstance(v, torch.Tensor)
            else v
        ),
        shapes,
    )
