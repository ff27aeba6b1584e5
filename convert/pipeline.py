"""The conversion itself: one output linear at a time, from the source to the staged shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.errors import CheckpointError
from qwen3_ascend.checkpoint.files import CheckpointWriter, ShardWriter
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest, SourceRecord, StoredTensor
from qwen3_ascend.checkpoint.schemes import SCHEMES
from qwen3_ascend.checkpoint.schemes.base import row_slices
from qwen3_ascend.convert import report
from qwen3_ascend.convert.plan import PLAIN_DTYPE, LinearPlan, Plan, TensorPlan
from qwen3_ascend.convert.source import Source

Progress = Callable[[str, int], None]
"""Called when an item is done: its name and its bytes in the source."""


def run(
    plan: Plan, source: Source, writer: CheckpointWriter, tool_version: str, progress: Progress
) -> Manifest:
    """Converts everything in the plan and publishes the checkpoint.

    Peak private memory is `plan.working_bytes`: one fused linear and what becomes of it. Source
    files are mapped, and hashed by a second thread meanwhile.

    Raises:
        CheckpointError: if a weight is not finite or a source file is damaged; nothing is
            published then.
    """
    linears: dict[str, LinearEntry] = {}
    tensors: dict[str, StoredTensor] = {}
    with ThreadPoolExecutor(1) as hasher:
        source_files = hasher.submit(source.file_entries)
        for item, shard in _in_shards(plan, writer):
            if isinstance(item, LinearPlan):
                linears[item.name] = _convert_linear(item, source, shard)
            else:
                tensors[item.name] = _copy_tensor(item, source, shard)
            progress(item.name, item.source_bytes)
        files = source_files.result()
    for name, data in source.carried().items():
        writer.add_file(name, data)
    record = SourceRecord(source.provider.repo, source.provider.revision, files, plan.ignored)
    manifest = Manifest(
        tool_version, plan.config, plan.recipe.verbatim, record, linears, tensors,
        writer.shards, writer.files,
    )  # fmt: skip
    writer.add_file("README.md", report.model_card(manifest))
    writer.commit(manifest)
    return manifest


def _in_shards(
    plan: Plan, writer: CheckpointWriter
) -> Iterator[tuple[LinearPlan | TensorPlan, ShardWriter]]:
    """Every item with the open shard it belongs to; shards are closed when they are full."""
    items = iter(plan.items)
    for shard_plan in plan.shards:
        shard = writer.open_shard(shard_plan)
        remaining = len(shard_plan.tensors)
        while remaining:
            item = next(items)
            yield item, shard
            remaining -= len(item.forms)
        writer.close_shard(shard)


def _convert_linear(item: LinearPlan, source: Source, shard: ShardWriter) -> LinearEntry:
    spec = item.spec
    weights = [source.read(f"{name}.weight") for name in spec.sources]
    biases = [source.read(f"{name}.bias") for name in spec.sources] if spec.bias else []
    for name, tensor in zip(item.reads, [*weights, *biases], strict=True):
        require_finite(name, tensor)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = torch.cat(biases) if biases else None
    linear = SCHEMES[item.scheme].quantize(weight, bias, item.layout)
    stored = {
        suffix: shard.write(f"{item.name}.{suffix}", tensor)
        for suffix, tensor in linear.tensors().items()
    }
    del linear
    written = SCHEMES[item.scheme].from_tensors(
        (spec.outputs, spec.inputs),
        item.layout,
        {suffix: shard.read_back(f"{item.name}.{suffix}") for suffix in stored},
    )
    return LinearEntry(
        scheme=item.scheme,
        shape=(spec.outputs, spec.inputs),
        parts=tuple(zip(spec.sources, spec.parts, strict=True)),
        cut=spec.cut,
        layout=item.layout,
        sqnr_db=report.sqnr_db(weight, written),
        tensors=stored,
    )


def _copy_tensor(item: TensorPlan, source: Source, shard: ShardWriter) -> StoredTensor:
    tensor = source.read(item.name)
    require_finite(item.name, tensor)
    return shard.write(item.name, tensor.to(PLAIN_DTYPE))


def require_finite(name: str, tensor: Tensor) -> None:
    """CheckpointError naming the first NaN or infinity of a float tensor."""
    for rows in row_slices(tensor.shape[0]):
        finite = torch.isfinite(tensor[rows])
        if not bool(finite.all()):
            first = (~finite).nonzero()[0].tolist()
            first[0] += rows.start
            raise CheckpointError(
                f"tensor {name} holds {tensor[tuple(first)].item()} at {first}; "
                f"the source is damaged, download it again"
            )
