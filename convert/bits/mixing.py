"""From sensitivities and a number of bits to a recipe that spends them where they gain most."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_ascend.checkpoint.architecture import LM_HEAD, LinearSpec
from qwen3_ascend.convert.bits.allocation import Cost, allocate
from qwen3_ascend.convert.bits.ladder import Ladder, Rung, ladders
from qwen3_ascend.convert.bits.sensitivities import Loss, Sensitivities
from qwen3_ascend.convert.plan import Plan
from qwen3_ascend.convert.recipe import Recipe, Rule
from qwen3_ascend.errors import OptionError


def mixed_recipe(plan: Plan, sensitivities: Sensitivities, bits_per_weight: float) -> Recipe:
    """The recipe of a plan with some linears raised.

    Args:
        plan: that the recipe as it is makes.
        sensitivities: of all linears that can be raised.
        bits_per_weight: stored bits, scales included, that the linears of the layers may take on
            average.

    Raises:
        OptionError: if the recipe as it is takes more, or no linear of it can be raised.
    """
    found = ladders(plan)
    if not found:
        raise OptionError(f"target_bpw: recipe {plan.recipe.name} has no linear that can be raised")
    weights = sum(ladder.weights for ladder in found)
    costs = {
        ladder.item.name: [Cost(loss.bits, loss.kl) for loss in _losses(sensitivities, ladder)]
        for ladder in found
    }
    chosen = allocate(costs, int(bits_per_weight * weights))
    if chosen is None:
        least = sum(min(cost.bits for cost in each) for each in costs.values()) / weights
        raise OptionError(
            f"target_bpw: {bits_per_weight} is less than the {least:.3f} bits a weight that recipe "
            f"{plan.recipe.name} takes; give more, or a recipe with larger groups"
        )
    raised = [(ladder, ladder.rungs[chosen[ladder.item.name]]) for ladder in found]
    return _recipe(plan, [pair for pair in raised if pair[1] != pair[0].rungs[0]], bits_per_weight)


def _losses(sensitivities: Sensitivities, ladder: Ladder) -> Sequence[Loss]:
    losses = sensitivities.linears.get(ladder.item.name, ())
    if [loss.bits for loss in losses] != [rung.bits for rung in ladder.rungs]:
        raise OptionError(
            f"sensitivities: those of {ladder.item.name} are missing or of other schemes; measure "
            f"them again with `qwen3-ascend sensitivity`"
        )
    return losses


def _recipe(plan: Plan, raised: Sequence[tuple[Ladder, Rung]], bits_per_weight: float) -> Recipe:
    """A rule for each part of a raised linear, then those of the recipe that still decide."""
    own = plan.recipe
    first = [
        Rule(part, rung.scheme, rung.quantizer)
        for ladder, rung in raised
        for part in ladder.item.parts
    ]
    names = {rule.match for rule in first}
    parts = [
        part
        for item in plan.items
        if isinstance(item.spec, LinearSpec) and item.name != LM_HEAD
        for part in item.parts
    ]
    left = [own.rule_for(part) for part in (*parts, LM_HEAD) if part not in names]
    rules = (*first, *(rule for rule in own.rules if any(rule is other for other in left)))
    verbatim = {
        **own.verbatim,
        "target_bpw": bits_per_weight,
        "rules": [_said(rule) for rule in rules],
    }
    return Recipe(own.name, own.description, rules, verbatim, own.transforms)


def _said(rule: Rule) -> dict[str, object]:
    """A rule as YAML would spell it."""
    return {
        "match": rule.match,
        "scheme": rule.scheme.to_json(),
        "quantizer": rule.quantizer,
    }
