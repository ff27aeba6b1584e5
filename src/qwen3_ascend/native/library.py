"""Find the compiled kernels, check that they are the ones we speak to, choose a processor path.

The library is plain C without Python in it, so one file serves every Python version; ctypes lets
go of the interpreter lock during a call, so a thread pool runs the kernels in parallel.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3_ascend.native.tape import note

ABI = 13
LIBRARY = Path(__file__).with_name("_kernels.so")
PATHS = {"baseline": 0, "avx2": 1, "avx512": 2}

STATUS = {2: "an argument the kernel refuses", 3: "a processor path that does not run here"}

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_MATRIX = [_INT, _POINTER, _LONG, _LONG, _LONG]  # dtype, data, rows, columns, row stride
_STEPS = [_POINTER, _LONG, _POINTER]  # steps, how many, scratch
_ROTATION = [_POINTER, _LONG, _LONG, ctypes.c_float]  # base, size, order, factor
_FLOATS = _MATRIX[1:]  # the same of float32
# dtype of rows, rows, how many, row stride; scratch; bias; result and its dtype
_ROWS = [_INT, _POINTER, _LONG, _LONG, *[_POINTER] * 3, _INT]
_SIGNATURES: dict[str, list[type]] = {
    "find_not_finite": [_INT, *_MATRIX, _POINTER],
    "quantize_w8a8_nz": [_INT, *_MATRIX, *_STEPS, *[_POINTER] * 5],
    "error_w8a8_nz": [_INT, *_MATRIX, *[_POINTER] * 4],
    "pack_nz_rows": [_INT, _INT, _INT, *_MATRIX[1:], _POINTER, _LONG, _LONG, _POINTER],
    "unpack_nz_rows": [_INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG],
    "change_rows": [_INT, *_MATRIX, *_STEPS],
    "rotate_outputs": [_INT, *_MATRIX, _POINTER, *_ROTATION, _LONG, *[_POINTER] * 2],
    "square_sums": [_INT, *_MATRIX, _INT, _POINTER],
    "error_bf16": [_INT, *_MATRIX, _POINTER, _POINTER, _POINTER],
    "round_rows": [_INT, *_MATRIX, *_STEPS, *[_POINTER] * 4],
    "search_scales": [_INT, *_FLOATS, _POINTER, _LONG, _INT, _INT, _POINTER, _LONG, _POINTER],
    "compensate_block": [_INT, *_FLOATS, *[_POINTER] * 2, _LONG, _INT, _INT, *[_POINTER] * 2],
    "has_instructions": [_INT],
    # instructions, threads; weight, outputs, inputs; codes, rows, row stride; scratch; added,
    # row scales, output scales, bias; result and its dtype
    "int8_product": [
        _INT,
        _INT,
        _POINTER,
        _LONG,
        _LONG,
        _POINTER,
        _LONG,
        _LONG,
        *[_POINTER] * 6,
        _INT,
    ],
    # path, threads; the job, its scratch
    "has_float_path": [_INT],
    "row_scratch": [_INT, _LONG],
    "attention_scratch": [_INT, _INT, _LONG, _LONG],
    "add_norm": [_INT, _INT, _POINTER, _POINTER],
    "norm_rotate": [_INT, _INT, _POINTER, _POINTER],
    "gated": [_INT, _INT, _POINTER, _POINTER],
    "attention": [_INT, _INT, *[_POINTER] * 4],
    "feed": [_INT, _INT, *[_POINTER] * 2, _LONG, _LONG, _POINTER],
    "widen": [_INT, _INT, _POINTER, _LONG, _POINTER],
    "largest_places": [_INT, _INT, _POINTER, _LONG, _LONG, _POINTER],
    # path, threads; weight, outputs, inputs, output stride, run stride; ROWS
    "float_product": [_INT, _INT, _POINTER, *[_LONG] * 4, *_ROWS],
    # path, threads; weight, outputs, inputs; ROWS
    "code_product": [_INT, _INT, _POINTER, *[_LONG] * 2, *_ROWS],
    # the same; scales, shift and row scales; ROWS without their dtype
    "group_product": [_INT, _INT, _POINTER, *[_LONG] * 2, _POINTER, *_ROWS[1:]],
    # threads; routing, dtype, logits
    "route": [_INT, _POINTER, _INT, _POINTER],
    # threads; sources, rows, bytes of a row; from, to; scales, result
    "gather": [_INT, _POINTER, _LONG, _LONG, *[_POINTER] * 4],
    # threads; routing, dtype, columns; outputs, result
    "combine": [_INT, _POINTER, _INT, _LONG, _POINTER, _POINTER],
    # instructions, threads; experts; weight, outputs, inputs; codes; scratch; row scales, output
    # scales; result and its dtype
    "int8_experts": [_INT, _INT, *[_POINTER] * 2, _LONG, _LONG, *[_POINTER] * 5, _INT],
    # path, threads; experts; weight, outputs, inputs, output stride, run stride; dtype of rows,
    # rows; scratch; result and its dtype
    "float_experts": [_INT, _INT, *[_POINTER] * 2, *[_LONG] * 4, _INT, *[_POINTER] * 3, _INT],
    # the same without strides
    "code_experts": [_INT, _INT, *[_POINTER] * 2, *[_LONG] * 2, _INT, *[_POINTER] * 3, _INT],
    # the same; scales, shift and row scales in the place of the dtype of rows
    "group_experts": [_INT, _INT, *[_POINTER] * 2, *[_LONG] * 2, *[_POINTER] * 4, _INT],
}
_COUNTS = frozenset({"row_scratch", "attention_scratch"})
"""Functions that give an int64, not a status."""


class Step(ctypes.Structure):
    """`struct step` of csrc/kernels.h."""

    _fields_ = (
        ("outputs", _POINTER),
        ("inputs", _POINTER),
        ("base", _POINTER),
        ("size", _LONG),
        ("order", _LONG),
        ("factor", ctypes.c_float),
    )


class StoredCodes(ctypes.Structure):
    """`struct stored_codes` of csrc/floats.h."""

    _fields_ = (
        ("data", _POINTER),
        ("bits", _INT),
        ("stored_outputs", _LONG),
        ("strip_outputs", _LONG),
        ("strip_stride", _LONG),
        ("input_stride", _LONG),
        ("scales", _POINTER),
        ("offsets", _POINTER),
        ("group", _LONG),
        ("rounded", _INT),
    )


class Grouped(ctypes.Structure):
    """`struct grouped` of csrc/floats.h."""

    _fields_ = (("scales", _POINTER), ("shift", _POINTER), ("row_scales", _POINTER))


class NativeUnavailable(Exception):
    """There are no compiled kernels to use; the text says why."""


@dataclass(frozen=True)
class Library:
    """The loaded shared library and the processor path that every call names."""

    handle: ctypes.CDLL
    path_name: str

    def call(self, name: str, *arguments: object) -> int:
        """Call `qwen3_ascend_<name>` on the chosen path; returns its status."""
        return self.plain_call(name, PATHS[self.path_name], *arguments)

    def plain_call(self, name: str, *arguments: object) -> int:
        """Call `qwen3_ascend_<name>`; returns its status, or the count that it gives."""
        return int(self._functions[name](*arguments))

    def run(self, name: str, *arguments: object) -> None:
        """Call `qwen3_ascend_<name>`, and note it on the tape if there is one.

        Raises:
            RuntimeError: if the kernel refuses its arguments.
        """
        function = self._functions[name]
        status = function(*arguments)
        if status:
            raise RuntimeError(f"{name}: {STATUS.get(status, f'status {status}')}")
        note(function, *arguments)

    @functools.cached_property
    def _functions(self) -> dict[str, ctypes._NamedFuncPointer]:
        return {name: self._function(name) for name in _SIGNATURES}

    def _function(self, name: str) -> ctypes._NamedFuncPointer:
        function = self.handle[f"qwen3_ascend_{name}"]
        function.argtypes = _SIGNATURES[name]
        if name in _COUNTS:
            function.restype = _LONG
        return function


def open_library(path: str | None = None) -> Library:
    """Load the library. Raises NativeUnavailable, or ValueError for an unknown path name."""
    if os.environ.get("QWEN3_ASCEND_NATIVE") == "0":
        raise NativeUnavailable("switched off by QWEN3_ASCEND_NATIVE=0")
    wanted = path or os.environ.get("QWEN3_ASCEND_CPU")
    if wanted and wanted not in PATHS:
        raise ValueError(f"unknown processor path {wanted!r}: choose from {', '.join(PATHS)}")
    handle = _open_file(LIBRARY)
    for name in [wanted] if wanted else reversed(PATHS):
        if handle.qwen3_ascend_has_path(PATHS[name]):
            return Library(handle, name)
    raise NativeUnavailable(f"this processor has no {wanted}")


@functools.cache
def _mapped(file: Path) -> ctypes.CDLL:
    """The system maps a library once; so does this, since every linear of a model asks."""
    return ctypes.CDLL(str(file))


@dataclass(frozen=True)
class InstructionSets:
    """Sets of instructions that there are kernels for.

    Attributes:
        question: the function that says whether a set runs here.
        numbers: of the sets, in C.
        best: their names, the best one first.
        of_path: which are taken, in order, where $QWEN3_ASCEND_CPU names a path.
    """

    question: str
    numbers: Mapping[str, int]
    best: Sequence[str]
    of_path: Mapping[str, Sequence[str]]

    def choose(self, wanted: str | None = None) -> tuple[Library, str] | None:
        """The library and the best set that runs here, or the wanted one; None if none does.

        Raises:
            ValueError: if the environment names a path that does not exist.
        """
        try:
            library = open_library()
        except NativeUnavailable:
            return None
        forced = os.environ.get("QWEN3_ASCEND_CPU")
        tried = (wanted,) if wanted else self.of_path[forced] if forced else self.best
        for name in tried:
            if library.plain_call(self.question, self.numbers[name]):
                return library, name
        return None


def _open_file(file: Path) -> ctypes.CDLL:
    if not file.exists():
        raise NativeUnavailable("not compiled: no C compiler when the package was built")
    try:
        handle = _mapped(file)
        abi = int(handle.qwen3_ascend_abi())
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{file.name} does not load: {error}") from error
    if abi != ABI:
        raise NativeUnavailable(f"{file.name} has interface {abi}, not {ABI}: build it again")
    return handle
