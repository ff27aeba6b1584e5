"""What a plan has to know of the inputs of its linears, and the memory that this takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qwen3_ascend.checkpoint.architecture import LM_HEAD, LinearSpec, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.checkpoint.schemes.grid import IntegerScheme
from qwen3_ascend.convert.calibration.recording import Wanted
from qwen3_ascend.convert.plan import Item, Plan
from qwen3_ascend.convert.quantizers import QUANTIZERS, Needs
from qwen3_ascend.convert.transforms import FittedTransform
from qwen3_ascend.convert.triangle import triangle_bytes

STEP_TOKENS = 512
"""Tokens of a step: what lies between the linears of a layer is in memory for so many."""

FLOAT_BYTES = 4


def needs_data(plan: Plan) -> bool:
    """Whether a recipe cannot do without calibration."""
    chosen = any(_least(item) > Needs.NOTHING for item in _chosen(plan))
    return chosen or _fitted(plan) > Needs.NOTHING


def wanted(plan: Plan) -> dict[str, Wanted]:
    """What is to be known of the inputs of which linears, by name, if there is calibration."""
    found: dict[str, Wanted] = {}
    for item in _chosen(plan):
        needs = _most(item)
        if needs > Needs.NOTHING:
            found[item.name] = Wanted(needs, item.scheme.input)
    if (fitted := _fitted(plan)) > Needs.NOTHING:
        for item in _layer_linears(plan):
            known = found[item.name].needs if item.name in found else Needs.NOTHING
            found[item.name] = Wanted(max(known, fitted), item.scheme.input)
    return found


def recorded_bytes(plan: Plan) -> int:
    """Memory of what calibration records of a layer at most: it is there while linears are made."""
    if plan.calibration is None:
        return 0
    of_linears = {
        item.name: len(item.matrices) * triangle_bytes(item.matrix[1]) for item in _hessians(plan)
    }
    stages = [[spec.name for spec in layer] for layer in _layers(plan)] + [[LM_HEAD]]
    return max(sum(of_linears.get(name, 0) for name in stage) for stage in stages)


def passing_bytes(plan: Plan) -> int:
    """Memory that a pass over a layer takes at most: before and after its linears are made."""
    if plan.calibration is None:
        return 0
    tokens = max(STEP_TOKENS, plan.calibration.length)
    return FLOAT_BYTES * max(_passing(plan.config, layer, tokens) for layer in _layers(plan))


def states_bytes(plan: Plan) -> int:
    """Of the hidden states of all calibration data, on the disk."""
    tokens = 0 if plan.calibration is None else plan.calibration.record.tokens
    return FLOAT_BYTES * tokens * plan.config.hidden_size


def _hessians(plan: Plan) -> list[Item]:
    """The linears whose Hessian is recorded."""
    needs = wanted(plan)
    return [i for i in plan.items if i.name in needs and needs[i.name].needs >= Needs.HESSIAN]


def _fitted(plan: Plan) -> Needs:
    """What the transforms have to know."""
    needs = [t.needs for t in plan.transforms if isinstance(t, FittedTransform)]
    return max(needs, default=Needs.NOTHING)


def _layer_linears(plan: Plan) -> list[Item]:
    """All linears but the output projection, which no fitted transform changes."""
    return [i for i in plan.items if isinstance(i.spec, LinearSpec) and i.name != LM_HEAD]


def _layers(plan: Plan) -> list[list[LinearSpec]]:
    """The linears of each layer."""
    return [
        [part for part in layer if isinstance(part, LinearSpec)]
        for layer in model_spec(plan.config).layers
    ]


def _passing(config: Qwen3Config, layer: Sequence[LinearSpec], tokens: int) -> int:
    """Floats that are in memory while tokens pass a layer: its weights, and what lies between its
    linears; of a mixture, what each token's experts are fed and give."""
    sizes = [math.prod(spec.matrix) for spec in layer]
    weights = sum(size * (spec.experts or 1) for size, spec in zip(sizes, layer, strict=True))
    # While a linear is decoded there are copies of it, not all of which are given back at once.
    weights += 4 * max(sizes)
    per_token = config.experts.per_token if config.experts else 1
    widths = sum(sum(spec.matrix) * (per_token if spec.experts else 1) for spec in layer)
    return weights + tokens * (widths + 2 * config.hidden_size)


def _chosen(plan: Plan) -> list[Item]:
    """The linears whose integers are to be chosen."""
    return [
        item
        for item in plan.items
        if isinstance(item.scheme, IntegerScheme) and item.encoding.codes == "chosen"
    ]


def _least(item: Item) -> Needs:
    """What has to be known: static scales of activations are found of the range of the inputs."""
    static = Needs.SQUARES if item.scheme.input is Input.INT8_STATIC else Needs.NOTHING
    return max(static, QUANTIZERS[item.quantizer].needs)


def _most(item: Item) -> Needs:
    """What is made use of."""
    return max(_least(item), QUANTIZERS[item.quantizer].uses)
