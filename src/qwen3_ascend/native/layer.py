"""What a decoder layer computes on a CPU beside its linears: each operation is one call.

    kernels = native.layer_kernels()
    fed, total = kernels.add_norm(hidden, delta, weight, epsilon, Feed())

csrc/layer.h says what each operation is; runtime/backends/reference.py defines it. Tensors are
contiguous, and activations bfloat16 or float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen3_ascend.native.library import PATHS, Library, NativeUnavailable, open_library
from qwen3_ascend.native.tape import empty, keep
from qwen3_ascend.native.threads import kernel_threads

DTYPES = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 3}
"""Numbers of csrc/kernels.h."""

FLOAT, PER_TOKEN, STATIC = 0, 1, 2
"""Forms of csrc/layer.h in which a linear is fed."""

SPLIT_KEYS = 1024
"""Of csrc/layer.h: a request of one token attends to so many keys at a time."""

CACHE_LINE = 64
"""Bytes; the border of a scratch."""

_INT, _LONG, _POINTER, _FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


@dataclass(frozen=True)
class Feed:
    """How a linear wants its input.

    Attributes:
        form: FLOAT (rounded to the type of activations), PER_TOKEN or STATIC.
        reciprocal, offset: of STATIC: code = round(x * reciprocal + offset).
    """

    form: int = FLOAT
    reciprocal: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Fed:
    """An input as a linear wants it.

    Attributes:
        values: [T, K] in the type of activations, or int8 codes.
        scales: float32 [T] of PER_TOKEN, else None.
    """

    values: Tensor
    scales: Tensor | None


class CacheBlocks(Protocol):
    """Keys and values of a layer: see LayerKV of the runtime, whose fields these are."""

    @property
    def keys(self) -> Tensor:
        """[blocks, block_size, kv_heads, head_dim], of activations' type or int8."""

    @property
    def values(self) -> Tensor:
        """So."""

    @property
    def key_scales(self) -> Tensor | None:
        """float32 [blocks, block_size, kv_heads] of codes."""

    @property
    def value_scales(self) -> Tensor | None:
        """So."""


class _Feed(ctypes.Structure):
    _fields_ = (
        ("form", _INT),
        ("dtype", _INT),
        ("out", _POINTER),
        ("scales", _POINTER),
        ("reciprocal", _FLOAT),
        ("offset", _FLOAT),
    )


class _AddNorm(ctypes.Structure):
    _fields_ = (
        ("dtype", _INT),
        ("rows", _LONG),
        ("columns", _LONG),
        ("hidden", _POINTER),
        ("delta", _POINTER),
        ("weight", _POINTER),
        ("epsilon", _FLOAT),
        ("total", _POINTER),
        ("feed", _Feed),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("dtype", _INT),
        ("kv_heads", _LONG),
        ("head_dim", _LONG),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("key_scales", _POINTER),
        ("value_scales", _POINTER),
    )


class _NormRotate(ctypes.Structure):
    _fields_ = (
        ("dtype", _INT),
        ("rows", _LONG),
        ("heads", _LONG),
        ("qkv", _POINTER),
        ("query_weight", _POINTER),
        ("key_weight", _POINTER),
        ("epsilon", _FLOAT),
        ("cosines", _POINTER),
        ("sines", _POINTER),
        ("slots", _POINTER),
        ("query", _POINTER),
        ("cache", _Cache),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("dtype", _INT),
        ("requests", _LONG),
        ("heads", _LONG),
        ("block_size", _LONG),
        ("query", _POINTER),
        ("cache", _Cache),
        ("block_table", _POINTER),
        ("table_width", _LONG),
        ("lengths", _POINTER),
        ("starts", _POINTER),
        ("out", _POINTER),
        ("partials", _POINTER),
        ("most_splits", _LONG),
    )


class _Gated(ctypes.Structure):
    _fields_ = (
        ("dtype", _INT),
        ("rows", _LONG),
        ("columns", _LONG),
        ("gate_up", _POINTER),
        ("feed", _Feed),
    )


class Scratch:
    """Floats that grow with what is asked for and are kept, since fresh memory costs more than a
    small operation. For one caller at a time."""

    def __init__(self) -> None:
        self._floats = torch.empty(0)

    def pointer(self, count: int) -> int:
        """The address of at least `count` floats, on the border of a cache line."""
        border = CACHE_LINE // self._floats.element_size()
        if self._floats.numel() < count + border:
            self._floats = torch.empty(count + border)
        keep(self._floats)
        return -(-self._floats.data_ptr() // CACHE_LINE) * CACHE_LINE


class LayerKernels:
    """The operations by one set of instructions, with scratch memory: for one caller at a time."""

    def __init__(self, library: Library, path: str) -> None:
        self.library, self.path = library, path
        self._path = PATHS[path]
        self._rows, self._attention, self._partials = Scratch(), Scratch(), Scratch()
        self._floats: dict[tuple[str, tuple[int, ...]], int] = {}

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, feed: Feed
    ) -> tuple[Fed, Tensor]:
        """(RMS norm of hidden + delta, fed; hidden + delta), of [T, hidden] each.

        Args:
            hidden, delta: [T, hidden]; the sum is rounded before it is normed.
            weight: [hidden], of the same type.
            epsilon: added to the mean of squares.
            feed: what the linear behind it wants.
        """
        rows, columns = hidden.shape
        total = hidden if delta is None else empty(*hidden.shape, dtype=hidden.dtype)
        fed = _fed(feed, rows, columns, hidden.dtype)
        job = _AddNorm(
            DTYPES[hidden.dtype], rows, columns, *_pointers(hidden, delta, weight), epsilon,
            None if delta is None else total.data_ptr(), _feed(feed, fed, hidden.dtype),
        )  # fmt: skip
        self._run("add_norm", job, columns)
        return fed, total

    def norm_rotate(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor],
        epsilon: float,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        cache: CacheBlocks,
    ) -> Tensor:
        """Norms and rotates queries and keys, and writes keys and values to the cache.

        Args:
            qkv: [T, (heads + 2 * kv_heads) * head_dim].
            norms: weights [head_dim] of queries and of keys.
            epsilon: of the norms.
            rotary: cosines and sines, float32 [T, ..., head_dim].
            slots: int32 [T], where keys and values go.
            cache: of this layer.

        Returns:
            Queries [T, heads, head_dim].
        """
        kv_heads, head_dim = cache.keys.shape[-2:]
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        query = empty(qkv.shape[0], heads, head_dim, dtype=qkv.dtype)
        job = _NormRotate(
            DTYPES[qkv.dtype], qkv.shape[0], heads, *_pointers(qkv, *norms), epsilon,
            *_pointers(*rotary, slots, query), _cache(cache),
        )  # fmt: skip
        self._run("norm_rotate", job, head_dim)
        return query

    def attention(
        self,
        query: Tensor,
        cache: CacheBlocks,
        block_table: Tensor,
        lengths: Tensor,
        starts: Tensor,
        feed: Feed,
    ) -> Fed:
        """Causal attention of requests whose queries are their last tokens.

        Args:
            query: [T, heads, head_dim].
            cache: of this layer, with the keys and values of these tokens too.
            block_table: int32 [B, longest], the blocks of each request.
            lengths: int32 [B], tokens of each in the cache.
            starts: int32 [B + 1], the rows of each.
            feed: what the linear behind it wants.
        """
        rows, heads, head_dim = query.shape
        _, block_size, kv_heads, _ = cache.keys.shape
        out = empty(*query.shape, dtype=query.dtype)
        splits = -(-block_table.shape[1] * block_size // SPLIT_KEYS)
        partials = len(lengths) * splits * heads * (head_dim + 2) if splits > 1 else 0
        job = _Attention(
            DTYPES[query.dtype], len(lengths), heads, block_size, *_pointers(query), _cache(cache),
            *_pointers(block_table), block_table.shape[1], *_pointers(lengths, starts, out),
            self._partials.pointer(partials) if partials else None, splits,
        )  # fmt: skip
        rounded = Fed(out.view(rows, heads * head_dim), None)
        fed = rounded if feed.form == FLOAT else _fed(feed, rows, heads * head_dim, query.dtype)
        threads = kernel_threads()
        shape = threads, heads // kv_heads, head_dim
        self.library.run(
            "attention", self._path, threads, ctypes.byref(job),
            ctypes.byref(_feed(feed, fed, query.dtype)),
            self._attention.pointer(self._count("attention_scratch", self._path, *shape)),
            self._row_scratch(threads, heads * head_dim),
        )  # fmt: skip
        return fed

    def gated(self, gate_up: Tensor, feed: Feed) -> Fed:
        """silu(gate) * up of [T, 2 * inner], fed."""
        rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
        fed = _fed(feed, rows, columns, gate_up.dtype)
        job = _Gated(
            DTYPES[gate_up.dtype], rows, columns, *_pointers(gate_up),
            _feed(feed, fed, gate_up.dtype),
        )  # fmt: skip
        self._run("gated", job, columns)
        return fed

    def fed(self, values: Tensor, feed: Feed) -> Fed:
        """Values [T, K], fed."""
        if feed.form == FLOAT:
            return Fed(values, None)
        rows, columns = values.shape
        fed, threads = _fed(feed, rows, columns, values.dtype), kernel_threads()
        (pointer,) = _pointers(values)
        self.library.run(
            "feed", self._path, threads, ctypes.byref(_feed(feed, fed, values.dtype)), pointer,
            rows, columns, self._row_scratch(threads, columns),
        )  # fmt: skip
        return fed

    def widen(self, values: Tensor) -> Tensor:
        """bfloat16 [T, N] as float32."""
        (pointer,) = _pointers(values)
        out = empty(*values.shape)
        count = values.numel()
        self.library.run("widen", self._path, kernel_threads(), pointer, count, out.data_ptr())
        return out

    def largest_places(self, values: Tensor) -> Tensor:
        """int64 [T], where the first of the largest is in each row of float32 [T, N]; where
        something is not a number, the first of that, as torch.argmax has it."""
        (pointer,), (rows, columns) = _pointers(values), values.shape
        places = empty(rows, dtype=torch.int64)
        self.library.run(
            "largest_places", self._path, kernel_threads(), pointer, rows, columns,
            places.data_ptr(),
        )  # fmt: skip
        return places

    def _run(self, name: str, job: ctypes.Structure, columns: int) -> None:
        threads = kernel_threads()
        scratch = self._row_scratch(threads, columns)
        self.library.run(name, self._path, threads, ctypes.byref(job), scratch)

    def _row_scratch(self, threads: int, columns: int) -> int:
        return self._rows.pointer(self._count("row_scratch", threads, columns))

    def _count(self, name: str, *arguments: int) -> int:
        """What a function of the library says, which is asked once for the same arguments."""
        asked = name, arguments
        if asked not in self._floats:
            self._floats[asked] = self.library.plain_call(name, *arguments)
        return self._floats[asked]


def _pointers(*tensors: Tensor | None) -> Sequence[int | None]:
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), "kernels take contiguous tensors"
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _fed(feed: Feed, rows: int, columns: int, dtype: torch.dtype) -> Fed:
    if feed.form == FLOAT:
        return Fed(empty(rows, columns, dtype=dtype), None)
    codes = empty(rows, columns, dtype=torch.int8)
    return Fed(codes, empty(rows) if feed.form == PER_TOKEN else None)


def _feed(feed: Feed, fed: Fed, dtype: torch.dtype) -> _Feed:
    pointers = _pointers(fed.values, fed.scales)
    return _Feed(feed.form, DTYPES[dtype], *pointers, feed.reciprocal, feed.offset)


def _cache(cache: CacheBlocks) -> _Cache:
    kv_heads, head_dim = cache.keys.shape[-2:]
    tensors = _pointers(cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return _Cache(DTYPES[cache.keys.dtype], kv_heads, head_dim, *tensors)


def layer_kernels() -> LayerKernels | None:
    """The fastest operations that run here; None without compiled kernels.

    Raises:
        ValueError: if $QWEN3_ASCEND_CPU names a path that does not exist.
    """
    try:
        library = open_library()
    except NativeUnavailable:
        return None
    fits = library.plain_call("has_float_path", PATHS[library.path_name])
    return LayerKernels(library, library.path_name if fits else "baseline")
