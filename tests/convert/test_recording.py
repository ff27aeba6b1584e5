"""Statistics of inputs: held against the definition, over steps of different lengths."""

from __future__ import annotations

import pytest
import torch
from support.inputs import hessian_of

from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.convert.calibration.recording import Wanted
from qwen3_ascend.convert.quantizers import Needs

GENERATOR = torch.Generator().manual_seed(1)
STEPS = [torch.randn(count, 24, generator=GENERATOR) for count in (5, 1, 9)]


@pytest.mark.parametrize("needs", [Needs.SQUARES, Needs.HESSIAN])
def test_statistics_are_those_of_all_inputs(needs: Needs) -> None:
    recorder = Wanted(needs, Input.FLOAT).recorder()
    for step in STEPS:
        recorder.see(step)
    found, x = recorder.statistics(), torch.cat(STEPS)
    assert found.tokens == 15
    assert torch.equal(found.least, x.amin(0)) and torch.equal(found.largest, x.amax(0))
    torch.testing.assert_close(found.mean_magnitude, x.abs().mean(0))
    torch.testing.assert_close(found.mean_square, x.square().mean(0))
    if needs is Needs.SQUARES:
        assert found.hessian is None
    else:
        torch.testing.assert_close(hessian_of(found), (x.double().t() @ x.double() / 15).float())


def test_codes_of_each_token_count_for_what_they_stand_for() -> None:
    """The Hessian is that of the quantized inputs; the range is that of the inputs themselves."""
    recorder = Wanted(Needs.HESSIAN, Input.INT8_PER_TOKEN).recorder()
    for step in STEPS:
        recorder.see(step)
    found, x = recorder.statistics(), torch.cat(STEPS)
    scale = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    torch.testing.assert_close(hessian_of(found), rounded.t() @ rounded / 15)
    assert not torch.allclose(rounded.t() @ rounded / 15, x.t() @ x / 15, rtol=1e-6)
    assert torch.equal(found.largest, x.amax(0))
