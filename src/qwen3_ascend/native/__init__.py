"""The converter's inner loops: compiled where a compiler was at hand, torch where not.

    kernels = native.best()

Both have the same methods (see `Kernels`) and write the same bytes.
"""

from __future__ import annotations

from qwen3_ascend.native.fallback import TorchKernels
from qwen3_ascend.native.floats import (
    FloatProducts,
    StoredWeight,
    float_products,
    stored_codes,
    stored_runs,
)
from qwen3_ascend.native.kernels import Kernels, NativeKernels, NotFinite
from qwen3_ascend.native.layer import Fed, Feed, LayerKernels, layer_kernels
from qwen3_ascend.native.library import NativeUnavailable, open_library
from qwen3_ascend.native.mixture import (
    FloatExperts,
    GroupExperts,
    Int8Experts,
    MixtureKernels,
    mixture_kernels,
)
from qwen3_ascend.native.products import Epilogue, Products, products
from qwen3_ascend.native.rows import Rows, RowStep

__all__ = [
    "Epilogue",
    "Fed",
    "Feed",
    "FloatExperts",
    "FloatProducts",
    "GroupExperts",
    "Int8Experts",
    "Kernels",
    "LayerKernels",
    "MixtureKernels",
    "NativeKernels",
    "NativeUnavailable",
    "NotFinite",
    "Products",
    "RowStep",
    "Rows",
    "StoredWeight",
    "TorchKernels",
    "best",
    "describe",
    "float_products",
    "layer_kernels",
    "load",
    "mixture_kernels",
    "open_library",
    "products",
    "stored_codes",
    "stored_runs",
]


def load(path: str | None = None) -> NativeKernels | None:
    """The compiled kernels, or None where there are none; `describe()` tells why.

    `path` forces baseline, avx2 or avx512; the default is $QWEN3_ASCEND_CPU, else the best one.
    """
    try:
        return NativeKernels(open_library(path))
    except NativeUnavailable:
        return None


def best() -> Kernels:
    """The compiled kernels, or those in torch."""
    return load() or TorchKernels()


def describe() -> str:
    """One line for logs and `doctor`: which kernels a conversion would run on here, and why."""
    try:
        return f"native kernels, {open_library().path_name} path"
    except NativeUnavailable as reason:
        return f"torch kernels ({reason})"
