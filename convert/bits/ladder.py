"""What a linear may become instead of what its recipe says: the next schemes with more bits, which
are fed in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen3_ascend.checkpoint.architecture import LM_HEAD, LinearSpec
from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.schemes import BF16, W8A8, W8A16, Scheme
from qwen3_ascend.checkpoint.schemes.grid import IntegerScheme
from qwen3_ascend.convert.plan import Item, Plan
from qwen3_ascend.convert.recipe import NEAREST

ABOVE: Mapping[str, Sequence[Scheme]] = {
    "w4a8": (W8A8(), BF16()),
    "w4a16": (W8A16(), BF16()),
    "w8a8": (BF16(),),
    "w8a16": (BF16(),),
}
"""By the name of a recipe's scheme, the ones that a linear may get instead."""


@dataclass(frozen=True)
class Rung:
    """One thing that a linear may become.

    Attributes:
        scheme: with its parameters.
        quantizer: who finds its codes.
        layout: of its weight.
        bits: that are stored of the linear, in all.
    """

    scheme: Scheme
    quantizer: str
    layout: Layout
    bits: int


@dataclass(frozen=True)
class Ladder:
    """A linear of a layer, and what it may become, the recipe's own scheme first.

    Attributes:
        item: of the plan that the recipe makes.
        rungs: with growing bits.
    """

    item: Item
    rungs: tuple[Rung, ...]

    @property
    def weights(self) -> int:
        """How many weights it has."""
        outputs, inputs = self.item.matrix
        return outputs * inputs


def ladders(plan: Plan) -> list[Ladder]:
    """The linears of the layers that may get more bits, in the order of the model."""
    return [_ladder(item, plan) for item in plan.items if _may_be_raised(item)]


def _may_be_raised(item: Item) -> bool:
    chosen = isinstance(item.scheme, IntegerScheme) and item.encoding.codes == "chosen"
    return chosen and item.name != LM_HEAD and item.scheme.name in ABOVE


def _ladder(item: Item, plan: Plan) -> Ladder:
    assert isinstance(item.spec, LinearSpec)
    fit = [s for s in ABOVE[item.scheme.name] if plan.target.refusal(s, item.spec.shape) is None]
    above = (_rung(item.spec, scheme, NEAREST, plan) for scheme in fit)
    return Ladder(item, (_rung(item.spec, item.scheme, item.quantizer, plan), *above))


def _rung(spec: LinearSpec, scheme: Scheme, quantizer: str, plan: Plan) -> Rung:
    layout = plan.target.layout(scheme, spec.name, spec.shape)
    forms = scheme.forms(spec.shape, layout)
    return Rung(scheme, quantizer, layout, 8 * sum(form.nbytes for form in forms.values()))
