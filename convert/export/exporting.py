"""An export: a finished checkpoint, verified while it is read, into the format of other engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from blake3 import blake3
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.architecture import LinearSpec
from qwen3_ascend.checkpoint.checked import CheckedWeights
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.manifest import StoredTensor
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.export.formats import format_named
from qwen3_ascend.convert.export.identity import (
    export_record,
    finished_record,
    identity,
    refuse_foreign_files,
)
from qwen3_ascend.convert.export.item import ExportItem, slices
from qwen3_ascend.convert.export.plan import ExportPlan, plan_export
from qwen3_ascend.convert.export.record import EXPORT, ExportRecord, is_export
from qwen3_ascend.convert.options import WritingOptions
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.convert.output.production import Production
from qwen3_ascend.convert.output.weight_file import STAGING, WeightFileWriter, tensor_bytes
from qwen3_ascend.convert.output.writer import OutputWriter, check_output
from qwen3_ascend.convert.preflight import FREE_SOME, check_machine, output_need
from qwen3_ascend.errors import CheckpointError, OptionError, os_errors
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.files.text import parse_size


@os_errors(CheckpointError)
def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    format: str,
    options: WritingOptions = WritingOptions(),
    events: Events = Events(),
) -> ExportRecord:
    """Exports a checkpoint; the output appears whole or not at all.

    Every tensor is believed only after its hash. The codes and scales of the checkpoint are kept as
    they are, under the names that transformers gives the linears. An export that was interrupted is
    continued by the same call, and ends with the same bytes.

    Args:
        checkpoint: the folder of a finished checkpoint.
        output: a folder that does not exist, is empty, or holds an export that may be replaced
            (`overwrite`).
        format: "ascendv1", "compressed-tensors" or "huggingface".
        options: see the fields of WritingOptions.
        events: is told of the work as it goes on.

    Returns:
        The record of the export, which holds the hash of every tensor and file.

    Raises:
        UserError: whatever is wrong with the checkpoint, the output or an option, in one line.
    """
    made, folder, source = format_named(format), user_path(output), user_path(checkpoint)
    if source.is_dir() and source.resolve() == folder.resolve():
        raise OptionError(f"{folder} is the checkpoint itself; choose another output folder")
    reader = CheckpointReader(source)
    plan = plan_export(reader, made, parse_size(options.max_file_bytes))
    is_again = is_export(folder) and not options.overwrite
    if is_again and not (folder / STAGING).exists():
        found = finished_record(folder, reader.manifest, plan)
        events.note(f"{folder} holds this export already: nothing to do")
        return found
    if not is_again:
        check_output(folder, options.overwrite)
    refuse_foreign_files(folder, plan)
    budget = Budget.fit(plan.piece_bytes, options.threads, parse_size(options.max_memory))
    with OutputWriter(
        folder, EXPORT, plan.weight_files, identity(reader.manifest, plan),
        overwrite=options.overwrite, restart=options.restart,
    ) as writer:  # fmt: skip
        if writer.finished:
            return ExportRecord.read(folder)
        need = output_need("export", folder, plan.weight_files)
        check_machine("exporting", folder, [need], budget.working_bytes, FREE_SOME)
        events.begun(plan.source_bytes)
        if writer.left:
            done, total = len(writer.left), len(plan.items)
            events.note(f"continuing: {done} of {total} items were done before")
        return _run(plan, reader, writer, budget, events)


def _run(
    plan: ExportPlan, reader: CheckpointReader, writer: OutputWriter, budget: Budget, events: Events
) -> ExportRecord:
    """Exports everything in the plan and publishes it."""
    for name, data in plan.files.items():
        writer.add_file(name, data)
    with CheckedWeights(reader, budget.threads) as weights:
        export = Export(plan, reader, weights, writer, budget.threads, events)
        export.take_up()
        export.make(export.remaining(plan.items))
    weight_files = {file: weights.entry for file, weights in writer.weight_files.items()}
    record = export_record(reader.manifest, plan, export.tensors(), weight_files)
    writer.commit(record.text().encode())
    return record


class Export(Production[ExportItem]):
    """A plan being carried out."""

    def __init__(
        self,
        plan: ExportPlan,
        reader: CheckpointReader,
        weights: CheckedWeights,
        writer: OutputWriter,
        threads: int,
        events: Events,
    ) -> None:
        super().__init__(plan.items, writer, threads, events)
        self._reader, self._weights = reader, weights

    @override
    def task(self, item: ExportItem, file: WeightFileWriter) -> Callable[[], Done]:
        stored = self._stored(item)
        matrices = tuple(
            stored.matrix(number).divide_outputs(item.piece_outputs)
            for number in range(len(item.matrices))
        )
        advance = partial(self.advance, item.source_bytes // sum(map(len, matrices)))
        return partial(export_item, item, matrices, file, advance)

    @override
    def drop_pages(self) -> None:
        self._reader.drop_pages()

    def _stored(self, item: ExportItem) -> Linear:
        """An item as a linear; waits for its hash."""
        if isinstance(item.spec, LinearSpec):
            return self._weights.linear(item.name)
        weight = self._weights.tensor(item.name).view(item.matrix)
        return Linear(item.scheme, item.matrix, item.layout, {"weight": weight})

    def tensors(self) -> dict[str, StoredTensor]:
        """What the record says of each tensor, in the order of the plan."""
        return {
            name: StoredTensor(
                form.dtype, form.shape, self.files[name], self.done[item.name].blake3[name]
            )
            for item in self.items.values()
            for name, form in item.forms.items()
        }


def export_item(
    item: ExportItem,
    matrices: tuple[tuple[Linear, ...], ...],
    file: WeightFileWriter,
    advance: Callable[[], None],
) -> Done:
    """States an item, and writes and hashes it, piece by piece.

    Args:
        item: what is exported.
        matrices: of each the outputs, a range at a time, in their order.
        file: that takes the tensors.
        advance: called before each piece; it may raise to end the work.
    """
    output = _Rows(item, file)
    for parts, pieces in zip(item.matrices, matrices, strict=True):
        for source, count in parts:
            for suffix, tensor in item.expression.constants((count, item.matrix[1])).items():
                output.append(f"{source}.{suffix}", tensor)
        start = 0
        for piece in pieces:
            advance()
            stop = start + piece.shape[-2]
            _export_piece(item, piece, slices(parts, start, stop), output)
            start = stop
    return Done(item.name, output.hashes(), {}, None)


def _export_piece(
    item: ExportItem, piece: Linear, parts: Iterable[tuple[str, slice]], output: _Rows
) -> None:
    """States some outputs; `parts` are those that have a share of them, and where."""
    tensors = item.tensors(piece)
    for source, outputs in parts:
        for suffix, tensor in tensors.items():
            if suffix in item.expression.undivided:
                output.write_once(f"{source}.{suffix}", tensor)
            else:
                output.append(f"{source}.{suffix}", tensor[item.rows(suffix, outputs)])


class _Rows:
    """Tensors on their way to a file, whose outputs come in order, hashed as they go."""

    def __init__(self, item: ExportItem, file: WeightFileWriter) -> None:
        self._file = file
        self._digests = {name: blake3() for name in item.forms}
        self._written = dict.fromkeys(item.forms, 0)

    def append(self, name: str, rows: Tensor) -> None:
        data = tensor_bytes(rows)
        self._file.write(name, self._written[name], data)
        self._digests[name].update(data)
        self._written[name] += data.nbytes

    def write_once(self, name: str, tensor: Tensor) -> None:
        if not self._written[name]:
            self.append(name, tensor)

    def hashes(self) -> dict[str, str]:
        """BLAKE3 of each tensor, by full name."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}
