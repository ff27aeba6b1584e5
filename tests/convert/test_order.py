"""The order of work: as the source files come, and of each the largest first."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_models

from qwen3_ascend.convert import plan_conversion
from qwen3_ascend.convert.order import working_order


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-plain"])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_working_order(shards: int, recipe: str, tmp_path: Path) -> None:
    written = tiny_models.write(tmp_path / "source", shards=shards)
    source, plan = plan_conversion(str(written), recipe)
    order = working_order(plan, source)
    assert sorted(item.name for item in order) == sorted(item.name for item in plan.items)
    files = source.file_order(name for item in plan.items for name in item.needs)
    assert len(files) == shards
    last_file = [max(files.index(file) for file in source.file_order(i.needs)) for i in order]
    assert last_file == sorted(last_file)
    for file in range(shards):
        group = [item for item, last in zip(order, last_file, strict=True) if last == file]
        inside = [item for item in group if len(source.file_order(item.needs)) == 1]
        assert group[len(group) - len(inside) :] == inside  # what began in an earlier file is first
        sizes = [item.source_bytes for item in inside]
        assert sizes == sorted(sizes, reverse=True)
