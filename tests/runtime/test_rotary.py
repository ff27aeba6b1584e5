"""A step has the cosines and sines of its own positions, and nothing is made for the others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwen3_ascend.checkpoint.config import RopeConfig
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.rotary import rotary_tables
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

ROPES = [RopeConfig("default", 1e6), RopeConfig("yarn", 1e6, 4.0, 4096, 1.2)]


def step_at(positions: list[int]) -> StepInputs:
    numbers = torch.tensor(positions, dtype=torch.int32)
    return StepInputs(
        tokens=numbers, positions=numbers, slots=numbers, block_table=numbers[None],
        context_lens=(max(positions) + 1,), query_starts=(0, len(positions)), logit_rows=None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rope", ROPES, ids=["default", "yarn"])
@pytest.mark.parametrize("positions", [[0], [16383], [7, 8, 9], [*range(0, 16384, 5)]], ids=len)
def test_a_steps_rows_are_those_of_the_tables(
    positions: list[int], rope: RopeConfig, dtype: str
) -> None:
    """Which an NPU holds of the whole context: both compute the same numbers."""
    config = dataclasses.replace(SMALL_CONFIG, rope=rope, max_position=16384)
    cpu = backends.get(config, DeviceOptions("cpu", dtype))
    found: DeviceStep = cpu.open_step(step_at(positions))
    for rows, table in zip((found.cos, found.sin), rotary_tables(config), strict=True):
        assert torch.equal(rows[:, 0], table.to(cpu.dtype).float()[positions])


def test_a_table_grows_with_the_contexts() -> None:
    """And gives the same rows before and after."""
    cpu = backends.get(SMALL_CONFIG, DeviceOptions("cpu"))
    tables = rotary_tables(dataclasses.replace(SMALL_CONFIG, max_position=1 << 13))
    for positions in ([3], [1022, 1023], [1024], [5000, 3], [3]):
        step: DeviceStep = cpu.open_step(step_at(positions))
        for rows, table in zip((step.cos, step.sin), tables, strict=True):
            assert torch.equal(rows[:, 0], table.bfloat16().float()[positions])


def test_a_long_context_costs_nothing_before_it_is_used() -> None:
    """A table of it would take half a petabyte."""
    config = dataclasses.replace(SMALL_CONFIG, max_position=1 << 40)
    cpu = backends.get(config, DeviceOptions("cpu"))
    step: DeviceStep = cpu.open_step(step_at([0, 1]))
    assert step.cos.shape == (2, 1, config.head_dim)
