"""Linears on the CPU read weights where they lie: no second copy is made, whatever the scheme."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import ND
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import BF16, EXAMPLES, W8A16, Input, Scheme
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.runtime.backends.cpu.float_linears import (
    StoredFloatLinear,
    dense,
    load_float,
)
from qwen3_ascend.runtime.backends.reference import FloatLinear

compiled = pytest.mark.skipif(native.float_products() is None, reason="not compiled")
FLOATS = [scheme for scheme in EXAMPLES if scheme.input is Input.FLOAT]

WATCHED = """
import re, torch
from pathlib import Path
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import EXAMPLES, Input
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.runtime.backends.base import QuantizedActivation, StaticActivation
from qwen3_ascend.runtime.backends.cpu.float_linears import dense
from qwen3_ascend.runtime.backends.cpu.linears import LINEARS

SHAPE, DTYPE = (8192, 4096), torch.bfloat16

def resident(which):
    return int(re.search(rf"{which}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def fed(scheme, rows):
    codes = torch.ones(rows, SHAPE[1], dtype=torch.int8)
    if scheme.input is Input.FLOAT:
        return codes.to(DTYPE)
    if scheme.input is Input.INT8_STATIC:
        return StaticActivation(codes)
    return QuantizedActivation(codes, torch.ones(rows))

def stored(scheme):
    layout = ASCEND_A2_A3.layout(scheme, "", SHAPE)
    forms = scheme.forms(SHAPE, layout).items()
    tensors = {suffix: torch.ones(form.shape, dtype=form.dtype) for suffix, form in forms}
    return Linear(scheme, SHAPE, layout, tensors)

def taken(scheme, make):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    linear = make()
    for rows in (1, 6):
        linear(fed(scheme, rows))
    return resident("VmHWM") - before

torch.set_num_threads(2)
torch.ones(256, 256).bfloat16() @ torch.ones(256, 256).bfloat16()  # what libraries keep
for scheme in (EXAMPLES[0], *EXAMPLES):  # the first one twice, to have everything loaded
    linear = stored(scheme)
    nbytes = sum(tensor.nbytes for tensor in linear.tensors.values())
    print(f"{scheme}|{nbytes}|{taken(scheme, lambda: LINEARS[type(scheme)](linear, DTYPE))}")
table = torch.ones(SHAPE, dtype=DTYPE)
print(f"dense|{table.nbytes}|{taken(EXAMPLES[0], lambda: dense(table, None))}")
"""


@compiled
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_no_linear_keeps_or_makes_a_copy() -> None:
    """At the peak of loading it and of two products: activations, and sums of codes, take less than
    a third of what a weight has. A copy would have as much again, or more."""
    command = [sys.executable, "-c", WATCHED]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # nothing freed is kept
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()][1:]
    assert len(lines) == len(EXAMPLES) + 1
    assert [line for line in lines if int(line[2]) > int(line[1]) / 3] == []


def linear_of(scheme: Scheme, outputs: int = 64, inputs: int = 256, bias: bool = False) -> Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    added = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    return quantize(scheme, weight, added, ASCEND_A2_A3.layout(scheme, "", weight.shape))


@compiled
@pytest.mark.parametrize("scheme", FLOATS, ids=str)
def test_floats_are_read_as_they_lie(scheme: Scheme) -> None:
    linear = linear_of(scheme)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load_float(linear, dtype)
        assert isinstance(loaded, StoredFloatLinear)
        assert loaded.weight.data_ptr() == linear.weight.data_ptr()


def assert_equal(found: Tensor, exact: Tensor) -> None:
    """Up to the rounding of the result: sums of so few products differ by less."""
    unit = 2.0**-8 if found.dtype is torch.bfloat16 else 2.0**-17
    assert bool(((found.double() - exact).abs() <= unit * (exact.abs() + exact.abs().mean())).all())


@pytest.mark.parametrize("compiled", ["1", "0"], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("scheme", FLOATS, ids=str)
def test_a_linear_with_a_bias(
    scheme: Scheme, dtype: torch.dtype, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_ASCEND_NATIVE", compiled)
    linear = linear_of(scheme, bias=True)
    assert linear.bias is not None
    loaded = load_float(linear, dtype)
    x = torch.randn(18, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = linear.dequantize().to(dtype)
    for rows in (1, 3, 18):
        exact = x[:rows].double() @ weight.double().t() + linear.bias.double()
        y = loaded(x[:rows])
        assert y.dtype is dtype
        assert_equal(y, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_dense_weight(dtype: torch.dtype) -> None:
    """That of an embedding, whose table it shares; float32 tables are torch's to multiply."""
    generator = torch.Generator().manual_seed(0)
    for inputs in (256, 250):
        table = torch.randn(300, inputs, generator=generator).to(dtype)
        bias, x = torch.randn(300).to(dtype), torch.randn(7, inputs).to(dtype)
        linear = dense(table, bias)
        assert linear.weight.data_ptr() == table.data_ptr()
        exact = x.double() @ table.double().t() + bias.double()
        assert_equal(linear(x), exact)


def test_what_cannot_be_read_as_it_lies_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantize(W8A16(), torch.randn(40, 48).bfloat16(), None, ND)
    assert isinstance(load_float(plain, torch.bfloat16), FloatLinear)
    odd = quantize(BF16(), torch.randn(40, 47).bfloat16(), None, ND)
    assert isinstance(load_float(odd, torch.bfloat16), FloatLinear)
    monkeypatch.setenv("QWEN3_ASCEND_NATIVE", "0")
    for scheme in FLOATS:
        assert isinstance(load_float(linear_of(scheme), torch.bfloat16), FloatLinear)
