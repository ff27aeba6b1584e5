"""Mixtures of experts on a CPU: each operation is one call, whatever experts are chosen.

    routed = kernels.route(logits, per_token, normalize)
    y = experts(kernels.gather(fed, routed), routed)
    out = kernels.combine(y, routed)

csrc/mixture.h says what each operation is; runtime/backends/reference.py defines it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.native import tape
from qwen3_ascend.native.floats import FLOAT_PATHS, FloatProducts, StoredWeight
from qwen3_ascend.native.floats import MOST_BLOCK_ROWS as MOST_FLOAT_ROWS
from qwen3_ascend.native.layer import DTYPES, Fed
from qwen3_ascend.native.library import Grouped, Library, NativeUnavailable, open_library
from qwen3_ascend.native.products import INSTRUCTIONS, MOST_BLOCK_ROWS, Products
from qwen3_ascend.native.tape import empty
from qwen3_ascend.native.threads import kernel_threads

MOST_EXPERTS = 1024
"""Of csrc/mixture.h."""

OF_EXPERTS = {"float_product": "float_experts", "code_product": "code_experts"}
"""The kernel that multiplies with the weights of all experts, by that of a weight by itself."""

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _Routing(ctypes.Structure):
    _fields_ = (
        ("tokens", _LONG),
        ("experts", _LONG),
        ("per_token", _LONG),
        ("normalize", _INT),
        ("weights", _POINTER),
        ("places", _POINTER),
        ("starts", _POINTER),
        ("sources", _POINTER),
    )


class _ExpertRows(ctypes.Structure):
    _fields_ = (("experts", _LONG), ("starts", _POINTER), ("weight_bytes", _LONG))


@dataclass(frozen=True, eq=False)
class Routed:
    """Which experts each token is given to. A routed row is a token at one of its experts.

    Attributes:
        weights: float32 [T, per_token], descending.
        places: int32 [T, per_token], the routed row of each.
        starts: int32 [experts + 1], the routed rows of each expert.
        sources: int32 [T * per_token], the token of each routed row.
        normalize: whether weights were divided by their sum.
    """

    weights: Tensor
    places: Tensor
    starts: Tensor
    sources: Tensor
    normalize: bool

    def structure(self) -> _Routing:
        """For the kernels; the tensors have to be kept."""
        tensors = (self.weights, self.places, self.starts, self.sources)
        pointers = (tensor.data_ptr() for tensor in tensors)
        return _Routing(*self.weights.shape[:1], len(self.starts) - 1, *self.weights.shape[1:],
                        self.normalize, *pointers)  # fmt: skip


class MixtureKernels:
    """The operations of mixtures beside their products."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def route(self, logits: Tensor, per_token: int, normalize: bool) -> Routed:
        """Gives each token to the experts of its greatest logits, equal ones in their order.

        Args:
            logits: bfloat16 or float32 [T, experts]; weights are rounded to their type.
            per_token: experts of a token.
            normalize: whether the weights of a token are divided by their sum.
        """
        tokens, experts = logits.shape
        routed = Routed(
            empty(tokens, per_token),
            empty(tokens, per_token, dtype=torch.int32),
            empty(experts + 1, dtype=torch.int32),
            empty(tokens * per_token, dtype=torch.int32),
            normalize,
        )
        structure = routed.structure()
        self._library.run(
            "route", kernel_threads(), ctypes.byref(structure), DTYPES[logits.dtype],
            _pointer(logits),
        )  # fmt: skip
        return routed

    def gather(self, fed: Fed, routed: Routed) -> Fed:
        """The rows of an input at every routed row.

        Args:
            fed: [T, K], codes with a scale for each row, or floats.
            routed: see `route`.
        """
        rows, values = len(routed.sources), fed.values
        gathered = empty(rows, values.shape[1], dtype=values.dtype)
        scales = None if fed.scales is None else empty(rows)
        self._library.run(
            "gather", kernel_threads(), routed.sources.data_ptr(), rows,
            values.shape[1] * values.element_size(), _pointer(values), gathered.data_ptr(),
            *(None if each is None else _pointer(each) for each in (fed.scales, scales)),
        )  # fmt: skip
        return Fed(gathered, scales)

    def combine(self, outputs: Tensor, routed: Routed) -> Tensor:
        """[T, N] of the outputs of all routed rows: a token's times their weights, added up."""
        out = empty(routed.weights.shape[0], outputs.shape[1], dtype=outputs.dtype)
        structure = routed.structure()
        self._library.run(
            "combine", kernel_threads(), ctypes.byref(structure), DTYPES[outputs.dtype],
            outputs.shape[1], _pointer(outputs), out.data_ptr(),
        )  # fmt: skip
        return out


class Int8Experts:
    """Products of int8 codes with the weights of their experts, which stay in FRACTAL_NZ."""

    def __init__(
        self, products: Products, strips: Tensor, shape: tuple[int, int], scales: Tensor,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Args:
        products: whose kernels multiply.
        strips: int8 FRACTAL_NZ of [experts, K, N], contiguous.
        shape: (N, K) of each.
        scales: float32 [experts, N], of the outputs.
        dtype: of the results.
        """
        products.of(strips[0], shape)  # which checks
        self._library, self._instructions = products.library, INSTRUCTIONS[products.instructions]
        self._strips, self._shape, self._scales, self._dtype = strips, shape, scales, dtype

    def __call__(self, fed: Fed, routed: Routed) -> Tensor:
        """[rows, N] of codes at every routed row, [rows, K]."""
        (outputs, inputs), rows = self._shape, len(fed.values)
        out = empty(rows, outputs, dtype=self._dtype)
        padded = -(-inputs // 16) * 16
        scratch = tape.scratch((rows + MOST_BLOCK_ROWS) * (padded + 4))
        assert fed.scales is not None, "experts of integers were fed floats"
        experts = _expert_rows(self._strips, routed)
        self._library.run(
            "int8_experts", self._instructions, kernel_threads(), ctypes.byref(experts),
            self._strips.data_ptr(), outputs, inputs, _pointer(fed.values), scratch.data_ptr(),
            _pointer(fed.scales), _pointer(self._scales), out.data_ptr(), DTYPES[self._dtype],
        )  # fmt: skip
        return out


class FloatExperts:
    """Products of floats with the weights of their experts, bfloat16 or codes, as they are
    stored."""

    def __init__(
        self, products: FloatProducts, weight: Tensor, first: StoredWeight, dtype: torch.dtype
    ) -> None:
        """Args:
        products: whose kernels multiply.
        weight: [experts, ...], contiguous.
        first: that of the first expert; what it shares with the others lies as [experts, ...] too,
            and is kept by the caller.
        dtype: of the results.
        """
        self._library, self._path = products.library, FLOAT_PATHS[products.path]
        self._weight, self._first, self._dtype = weight, first, dtype
        self._kernel = OF_EXPERTS[first.kernel]

    def __call__(self, fed: Fed, routed: Routed) -> Tensor:
        """[rows, N] of floats at every routed row, [rows, K]."""
        (outputs, inputs), x = self._first.shape, fed.values
        out = empty(len(x), outputs, dtype=self._dtype)
        scratch = _float_scratch(len(x), inputs)
        experts = _expert_rows(self._weight, routed)
        self._library.run(
            self._kernel, self._path, kernel_threads(), ctypes.byref(experts),
            *self._first.place, DTYPES[x.dtype], _pointer(x), scratch.data_ptr(), out.data_ptr(),
            DTYPES[self._dtype],
        )  # fmt: skip
        return out


class GroupExperts:
    """Products of int8 codes with the groups of int4 codes of their experts, as w4a8 defines
    them."""

    def __init__(
        self, products: FloatProducts, weight: Tensor, first: StoredWeight,
        shared: tuple[Tensor, Tensor], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Args:
        products: whose kernels multiply.
        weight: [experts, ...], contiguous.
        first: that of the first expert, int4 without scales.
        shared: the scales, float32 [experts, ceil(K / 256), N], and the shift, float32
            [experts, N].
        dtype: of the results.
        """
        self._library, self._path = products.library, FLOAT_PATHS[products.path]
        self._weight, self._first, self._shared, self._dtype = weight, first, shared, dtype

    def __call__(self, fed: Fed, routed: Routed) -> Tensor:
        """[rows, N] of codes at every routed row, [rows, K]."""
        (outputs, inputs), rows = self._first.shape, len(fed.values)
        out = empty(rows, outputs, dtype=self._dtype)
        scratch = _float_scratch(2 * rows, inputs)
        assert fed.scales is not None, "experts of integers were fed floats"
        experts = _expert_rows(self._weight, routed)
        grouped = Grouped(*map(_pointer, (*self._shared, fed.scales)))
        self._library.run(
            "group_experts", self._path, kernel_threads(), ctypes.byref(experts),
            *self._first.place, ctypes.byref(grouped), _pointer(fed.values), scratch.data_ptr(),
            out.data_ptr(), DTYPES[self._dtype],
        )  # fmt: skip
        return out


def _float_scratch(rows: int, inputs: int) -> Tensor:
    padded = -(-inputs // 16) * 16
    return tape.scratch(4 * (rows + MOST_FLOAT_ROWS) * padded)


def _expert_rows(weight: Tensor, routed: Routed) -> _ExpertRows:
    each = weight[0].numel() * weight.element_size()
    return _ExpertRows(weight.shape[0], routed.starts.data_ptr(), each)


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "kernels take contiguous tensors"
    return tensor.data_ptr()


def mixture_kernels() -> MixtureKernels | None:
    """The operations; None without compiled kernels."""
    try:
        return MixtureKernels(open_library())
    except NativeUnavailable:
        return None
