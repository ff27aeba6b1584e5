"""Quantizers in a conversion: whole linears in chunks, packed in pieces, with and without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.folders import contents
from support.inputs import correlated
from support.quantized_sources import write_ascendv1
from torch import Tensor

from qwen3_ascend import ConvertOptions, Recipe, convert_checkpoint, native
from qwen3_ascend.checkpoint.linear import Linear, stored_forms
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import pieces
from qwen3_ascend.checkpoint.schemes.grid import IntegerScheme
from qwen3_ascend.checkpoint.schemes.pieces import sqnr_db
from qwen3_ascend.convert import plan_conversion, weights
from qwen3_ascend.convert.plan import Item
from qwen3_ascend.convert.quantizers import QUANTIZERS
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.transforms.parts import model_parts
from qwen3_ascend.convert.transforms.whole import ModelChanges, changed_state, state_changes
from qwen3_ascend.convert.weights import ChosenWeights
from qwen3_ascend.convert.work import Task, make_task
from qwen3_ascend.errors import SourceError
from qwen3_ascend.files.threads import Crew, crew

SCHEMES = ("w8a8", "{name: w4a16, group: 32}")
KERNELS = native.best()


@pytest.fixture
def helpers() -> Iterator[Crew]:
    with crew(2) as found:
        yield found


def recipe(scheme: str, quantizer: str, *transforms: str) -> Recipe:
    return Recipe.parse(
        f"""
        schema: 1
        name: test
        transforms: [{", ".join(transforms)}]
        rules:
          - {{match: lm_head, scheme: bf16}}
          - {{match: "*", scheme: {scheme}, quantizer: {quantizer}}}
        """,
        "test",
    )


def fused(entry_parts: Any, floats: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([floats[f"{part}.weight"].float() for part, _ in entry_parts])


@pytest.mark.parametrize("transforms", [(), ("cle", "rotate")], ids=["plain", "transformed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_is_what_was_chosen(
    scheme: str, transforms: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the fused floats, in chunks that end anywhere, packed in pieces of outputs and inputs."""
    monkeypatch.setattr(weights, "CHUNK_WEIGHTS", 7 * 64)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    source = tiny_models.write(tmp_path / "source")
    chosen = recipe(scheme, "mse", *transforms)
    manifest = convert_checkpoint(source, tmp_path / "out", chosen)
    assert manifest.recipe["rules"][1]["quantizer"] == "mse"
    reader, state = CheckpointReader(tmp_path / "out"), tiny_models.tensors(tiny_models.config())
    plan = plan_conversion(source, chosen)[1]
    parts = model_parts(plan.config)
    floats = changed_state(state, parts, state_changes(state, parts, plan.transforms))
    for name, entry in manifest.linears.items():
        if not isinstance(entry.scheme, IntegerScheme):
            continue
        weight, linear = fused(entry.parts, floats), reader.linear(name)
        grid = entry.scheme.grid
        found = QUANTIZERS["mse"].prepare(grid, None, KERNELS)(weight)
        assert torch.equal(linear.dequantize(), grid.decode(found.integers, found.scales))
        noise = (weight.double() - linear.dequantize().double()).square().sum()
        figure = 10 * torch.log10(weight.double().square().sum() / noise)
        assert entry.sqnr_db == pytest.approx(float(figure), abs=0.0051)
    assert run("verify", tmp_path / "out", "--against", source).code == 0


def planned(source: Path, scheme: str, quantizer: str) -> tuple[Source, list[Item], ModelChanges]:
    """A conversion that will know all of its inputs."""
    opened, plan = plan_conversion(source, recipe(scheme, "nearest"))
    items = [
        replace(item, quantizer=quantizer) if isinstance(item.scheme, IntegerScheme) else item
        for item in plan.items
    ]
    return opened, items, ModelChanges(model_parts(plan.config), plan.transforms, KERNELS)


def packed(task: Task) -> Linear:
    """The linear of a task, put together from its pieces; what it says of its errors is right."""
    item = task.item
    forms = stored_forms(item.scheme, item.matrix, item.layout, False)
    tensors = {suffix: torch.empty(form.shape, dtype=form.dtype) for suffix, form in forms.items()}
    linear = Linear(item.scheme, item.matrix, item.layout, tensors)
    for index, piece in enumerate(task.pieces):
        found, part = task.pack(index, KERNELS), linear.piece(piece)
        for suffix, data in found.tensors.items():
            part.tensors[suffix].copy_(data)
        again = task.weights.errors(part, piece, KERNELS)
        assert again is not None and found.sums is not None
        assert sqnr_db([again]) == sqnr_db([found.sums])
    return linear


@pytest.mark.parametrize("scheme", SCHEMES)
def test_statistics_reach_the_quantizer(
    scheme: str, helpers: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    path = tiny_models.write(tmp_path / "source")
    state = tiny_models.tensors(tiny_models.config())
    source, items, changes = planned(path, scheme, "gptq")
    with source:
        for item in items:
            if item.quantizer != "gptq":
                continue
            known = correlated(item.matrix[1])
            task = make_task(item, source, changes, partial(tuple, [known]))
            task = task.quantized(KERNELS, helpers, lambda: None)
            weight = fused([(part, 0) for part in item.parts], state)
            assert isinstance(item.scheme, IntegerScheme)
            grid = item.scheme.grid
            found = QUANTIZERS["gptq"].prepare(grid, known, KERNELS)(weight)
            expected = grid.decode(found.integers, found.scales)
            assert torch.equal(packed(task).dequantize(), expected)


def test_statistics_of_which_nothing_can_be_made(helpers: Crew, tmp_path: Path) -> None:
    source, items, changes = planned(tiny_models.write(tmp_path / "source"), "w8a8", "gptq")
    item = next(item for item in items if item.quantizer == "gptq")
    known = correlated(item.matrix[1])
    assert known.hessian is not None
    known.hessian.blocks[0][0, 0] = float("nan")
    with source, pytest.raises(SourceError, match=rf"{item.name}: .* not finite; is the model"):
        make_task(item, source, changes, lambda: (known,)).quantized(KERNELS, helpers, lambda: None)


def test_work_ends_between_chunks(
    helpers: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK_WEIGHTS", 10 * 64)
    source, items, changes = planned(tiny_models.write(tmp_path / "source"), "w8a8", "mse")
    item = next(item for item in items if item.name.endswith("qkv_proj"))
    calls: list[None] = []

    def advance() -> None:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with source:
        make_task(item, source, changes).quantized(KERNELS, helpers, lambda: calls.append(None))
        assert len(calls) == -(-item.matrix[0] // 10)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            make_task(item, source, changes).quantized(KERNELS, helpers, advance)


def test_an_interrupted_search_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, chosen = tiny_models.write(tmp_path / "source"), recipe(SCHEMES[1], "mse")
    convert_checkpoint(source, tmp_path / "whole", chosen)
    quantized, left = ChosenWeights.quantized, [5]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return quantized(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ChosenWeights, "quantized", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, tmp_path / "out", chosen, ConvertOptions(threads=1))
    left[0] = 100
    with monkeypatch.context() as patch:
        patch.setattr(ChosenWeights, "quantized", interrupted)
        convert_checkpoint(source, tmp_path / "out", chosen)
    assert 100 - left[0] == 8 - 4  # those that were done stay
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_is_not_finite(scheme: str, tmp_path: Path) -> None:
    state = tiny_models.tensors(tiny_models.config())
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = float("inf")
    source = tiny_models.write(tmp_path / "source", weights=state)
    (tmp_path / "mse.yaml").write_text(
        f"{{schema: 1, name: x, rules: [{{match: lm_head, scheme: bf16}}, "
        f'{{match: "*", scheme: {scheme}, quantizer: mse}}]}}'
    )
    done = run("convert", source, tmp_path / "out", "--recipe", tmp_path / "mse.yaml")
    done.one_line_error(f"tensor {name} holds inf at [3, 5]")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "no integers": (
        ["{match: '*.o_proj', scheme: bf16, quantizer: mse}", "{match: '*', scheme: w8a8}"],
        ["quantizer mse to model.layers.0.self_attn.o_proj", "bf16 has no integers"],
    ),
    "zero points": (
        ["{match: '*', scheme: {name: w4a16, group: 32, zero_points: true}, quantizer: gptq}"],
        ["quantizer gptq to model.layers.0", "w4a16 (group 32, zero points): only nearest finds"],
    ),
    "two for one linear": (
        ["{match: '*.q_proj', scheme: w8a8, quantizer: mse}", "{match: '*', scheme: w8a8}"],
        ["qkv_proj is one fused linear", "different quantizers", "q_proj: mse, k_proj: nearest"],
    ),
    "unknown": (
        ["{match: '*', scheme: w8a8, quantizer: best}"],
        ["rules[0]", "unknown quantizer 'best'", "nearest, mse, gptq"],
    ),
}


@pytest.mark.parametrize(("rules", "mentions"), REFUSED.values(), ids=REFUSED)
def test_refusals(rules: list[str], mentions: list[str], tiny_source: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"{{schema: 1, name: bad, rules: [{', '.join(rules)}]}}")
    done = run("convert", tiny_source, tmp_path / "out", "--recipe", path)
    done.one_line_error("bad", *mentions)
    assert not (tmp_path / "out").exists()


def test_codes_that_are_taken_stay(tmp_path: Path) -> None:
    source = write_ascendv1(tmp_path / "source", tiny_models.config())
    convert_checkpoint(source, tmp_path / "nearest", recipe("w8a8", "nearest"))
    manifest = convert_checkpoint(source, tmp_path / "mse", recipe("w8a8", "mse"))
    assert all(entry.codes == "taken" for name, entry in manifest.linears.items() if "mlp" in name)
    same = CheckpointReader(tmp_path / "nearest")
    for name in manifest.linears:
        found, expected = CheckpointReader(tmp_path / "mse").linear(name), same.linear(name)
        assert torch.equal(found.weight, expected.weight)


def test_the_plan_tells_who_chooses(tiny_source: Path, tmp_path: Path) -> None:
    path = tmp_path / "mse.yaml"
    path.write_text("{schema: 1, name: x, rules: [{match: '*', scheme: w8a8, quantizer: mse}]}")
    done = run("convert", tiny_source, tmp_path / "out", "--recipe", path, "--dry-run")
    assert done.code == 0 and "w8a8, mse" in done.out


def test_memory_is_counted(tiny_source: Path) -> None:
    """Integers of a whole linear, and what the quantizer needs."""
    plain, mse = (
        plan_conversion(tiny_source, recipe("w8a8", name))[1].items for name in ("nearest", "mse")
    )
    assert [item.name for item in plain] == [item.name for item in mse]
    for before, after in zip(plain, mse, strict=True):
        if after.quantizer == "mse":
            outputs, inputs = after.matrix
            assert after.piece_bytes - before.piece_bytes >= outputs * inputs
            gptq = replace(after, quantizer="gptq")
            shared = QUANTIZERS["gptq"].shared_bytes(inputs)
            assert gptq.piece_bytes - after.piece_bytes == shared
