"""Products of the CPU's kernels on every set of instructions, against oneDNN's on its own copy.

    python benchmarks/products.py                         the shape of 8B's gate_up
    python benchmarks/products.py --outputs 6144 --inputs 1024 --rows 8 128

Ours read FRACTAL_NZ as a checkpoint stores it. oneDNN, as torch calls it, multiplies a copy that it
has packed for itself, which is not timed: int8 by qlinear, and bfloat16 by mkldnn linear. Both make
what a linear makes of integers: float32 times a scale for each output. The sides take turns, and
the best of --repeat rounds counts. A figure is 2 * rows * outputs * inputs operations over the
time, in thousands of millions a second; in brackets is the ratio to oneDNN.

oneDNN is exact with int8 only on some processors; the table says so where it is not on this one.
Sets of instructions that this processor lacks are named, and left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import random_model
import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import nz_pack
from qwen3_ascend.native.floats import FLOAT_PATHS, stored_runs
from qwen3_ascend.native.products import INSTRUCTIONS, Epilogue
from qwen3_ascend.runtime.backends.cpu import int8_matmul

ONEDNN = "oneDNN"

Run = Callable[[Tensor], object]
"""Multiplies activations."""


def int8_sides(outputs: int, inputs: int) -> dict[str, Run]:
    """int8 codes times int8 weights and a float32 scale for each output; by side."""
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scales = torch.rand(outputs)
    strips = nz_pack(weight.t())
    sides: dict[str, Run] = {}
    for name in INSTRUCTIONS:
        if products := native.products(name):
            sides[name] = products.of(strips, (outputs, inputs), Epilogue(scales, torch.float32))
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(outputs, dtype=torch.int32)

    def onednn(codes: Tensor) -> Tensor:
        unsigned = codes.view(torch.uint8) ^ int8_matmul.ZERO_POINT
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, int8_matmul.ZERO_POINT, packed, scales, zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result

    return {**sides, ONEDNN: onednn}


def float_sides(outputs: int, inputs: int) -> dict[str, Run]:
    """bfloat16 activations times bfloat16 weights; by side."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    stored = stored_runs(nz_pack(weight), (outputs, inputs))
    assert stored is not None
    sides: dict[str, Run] = {}
    for name in FLOAT_PATHS:
        if products := native.float_products(name):
            sides[name] = products.of(stored, torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def onednn(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return result

    return {**sides, ONEDNN: onednn}


def measure(sides: Mapping[str, Run], x: Tensor, repeat: int) -> dict[str, float]:
    """The best seconds of each side, which take turns."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeat + 1):  # the first round is as good as any, or worse
        for name, run in sides.items():
            started = time.perf_counter()
            run(x)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def table(
    sides: Mapping[str, Run], activations: Sequence[Tensor], outputs: int, repeat: int
) -> Iterator[str]:
    """A table in Markdown, a line for each number of rows."""
    yield f"| rows | {' | '.join(sides)} |"
    yield "|---" * (len(sides) + 1) + "|"
    for x in activations:
        seconds = measure(sides, x, repeat)
        operations = 2 * x.numel() * outputs
        cells = (
            f"{operations / taken / 1e9:.0f} ({seconds[ONEDNN] / taken:.2f}x)"
            for taken in seconds.values()
        )
        yield f"| {len(x)} | {' | '.join(cells)} |"


def main() -> None:
    """Prints a table for int8 and one for bfloat16."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=24576)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--repeat", type=int, default=8, help="rounds")
    chosen = parser.parse_args()
    shape = chosen.outputs, chosen.inputs
    print(f"{random_model.processor()}, {torch.get_num_threads()} threads; "
          f"{chosen.outputs} outputs of {chosen.inputs} inputs")  # fmt: skip
    exact = "exact" if int8_matmul.is_exact(int8_matmul.onednn) else "NOT exact"
    floats = [torch.randn(rows, chosen.inputs) for rows in chosen.rows]
    for kind, sides, known, activations in (
        (f"int8, where {ONEDNN} is {exact} on this processor", int8_sides(*shape), INSTRUCTIONS,
         [(30 * x).clamp(-127, 127).to(torch.int8) for x in floats]),
        ("bfloat16", float_sides(*shape), FLOAT_PATHS, [x.bfloat16() for x in floats]),
    ):  # fmt: skip
        absent = [name for name in known if name not in sides]
        print(f"\n{kind}; not on this processor: {', '.join(absent) or 'none'}\n")
        print("\n".join(table(sides, activations, chosen.outputs, chosen.repeat)), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
