"""The order in which the items of a plan are converted."""

from __future__ import annotations

from qwen3_ascend.checkpoint.architecture import model_spec
from qwen3_ascend.convert.plan import Item, Plan
from qwen3_ascend.convert.source import Source


def working_order(plan: Plan, source: Source) -> list[Item]:
    """The items of a plan as their source files come, and of each file the largest first.

    Only one thread can hash a tensor: a large one that begins last would keep the others waiting.
    What lies in two files comes first of those in the second one, so that the first can go.
    """
    order = source.file_order(name for item in plan.items for name in item.needs)
    place = {file: index for index, file in enumerate(order)}

    def key(item: Item) -> tuple[int, bool, int]:
        places = [place[file] for file in source.file_order(item.needs)]
        return max(places), len(places) == 1, -item.source_bytes

    return sorted(plan.items, key=key)


def stages(plan: Plan) -> list[list[Item]]:
    """The items of a calibrated plan in groups that are converted one after the other: before the
    first layer, each layer, after the last one; of each the largest first."""
    spec = model_spec(plan.config)
    number = {part.name: n for n, layer in enumerate(spec.layers, 1) for part in layer}
    number[spec.embedding.name] = 0
    groups: list[list[Item]] = [[] for _ in range(len(spec.layers) + 2)]
    for item in sorted(plan.items, key=lambda item: -item.source_bytes):
        groups[number.get(item.name, -1)].append(item)
    return groups
