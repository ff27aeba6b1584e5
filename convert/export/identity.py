"""What makes two exports the same, and what of an output is one of ours."""

from __future__ import annotations

from pathlib import Path

from qwen3_ascend.checkpoint.manifest import FileEntry, Manifest, StoredTensor
from qwen3_ascend.checkpoint.reader import SealedFolder
from qwen3_ascend.convert.export.plan import ExportPlan
from qwen3_ascend.convert.export.record import EXPORT, ExportRecord
from qwen3_ascend.convert.identity import DIGITS, files_text
from qwen3_ascend.convert.output.journal import Identity, read_journal
from qwen3_ascend.convert.output.weight_file import STAGING
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.version import __version__

EXPORTER_VERSION = 1
"""Goes up when the same checkpoint and format give other bytes than before."""


def identity(manifest: Manifest, plan: ExportPlan) -> Identity:
    """Everything that decides a byte of an export, by names that a user understands."""
    return {
        "format": plan.format.name,
        "exporter version": str(EXPORTER_VERSION),
        "checkpoint": f"{manifest.source.repo} {manifest.blake3[:DIGITS]}",
        "output files": files_text(plan.weight_files),
        **{f"file {name}": bytes_blake3(data)[:DIGITS] for name, data in plan.files.items()},
    }


def export_record(
    manifest: Manifest,
    plan: ExportPlan,
    tensors: dict[str, StoredTensor],
    weight_files: dict[str, FileEntry],
) -> ExportRecord:
    """The record of an export, once its tensors are written."""
    return ExportRecord(
        __version__, plan.format.name, manifest.blake3, manifest.source.repo,
        manifest.source.revision, manifest.recipe["name"], tensors, weight_files,
        {name: FileEntry(len(data), bytes_blake3(data)) for name, data in plan.files.items()},
    )  # fmt: skip


def finished_record(folder: Path, manifest: Manifest, plan: ExportPlan) -> ExportRecord:
    """The record of a finished output that the same export has made.

    Raises:
        CheckpointError: if the output is anything else, saying what differs.
    """
    found = ExportRecord.read(folder)
    planned = export_record(manifest, plan, {}, {})
    forms = {n: (t.file, t.dtype, t.shape) for n, t in found.tensors.items()}
    wanted = {
        name: (file.file, form.dtype, form.shape)
        for file in plan.weight_files
        for name, form in file.tensors.items()
    }
    facts: dict[str, tuple[object, object]] = {
        "version of qwen3-ascend": (found.tool_version, planned.tool_version),
        "format": (found.format, planned.format),
        "checkpoint": (found.checkpoint, planned.checkpoint),
        "output files": (forms, wanted),
    }
    different = [what for what, (was, now) in facts.items() if was != now]
    if different:
        raise CheckpointError(
            f"{folder} is not empty: it holds another export (differing in: "
            f"{', '.join(different)}); choose another or pass --overwrite"
        )
    for problem in SealedFolder(folder, found).file_problems():
        raise CheckpointError(f"{folder}: {problem}; export again with --overwrite")
    return found


def refuse_foreign_files(folder: Path, plan: ExportPlan) -> None:
    """With --overwrite an export replaces an export, and nothing else that the user has."""
    left = read_journal(folder / STAGING)
    ours = set(EXPORT.files(folder))
    if left is not None and left.publication is not None:
        ours |= {*left.publication.names, *left.publication.old}
    written = {*plan.files, *(file.file for file in plan.weight_files)}
    loaded = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(loaded | {name for name in written if (folder / name).exists()}):
        if name not in ours:
            raise CheckpointError(
                f"{folder / name} is no part of an export, and would be replaced or loaded with "
                f"it; choose another output folder"
            )
