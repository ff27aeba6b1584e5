"""What is needed of the machine, asked before the first byte of weights is fetched or written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3_ascend.convert.calibration.needs import states_bytes
from qwen3_ascend.convert.order import stages, working_order
from qwen3_ascend.convert.output.weight_file import STAGING, WeightFilePlan
from qwen3_ascend.convert.plan import Plan
from qwen3_ascend.convert.source import Source
from qwen3_ascend.errors import CheckpointError, OptionError
from qwen3_ascend.files.memory import available_memory
from qwen3_ascend.files.text import size_text

LOW_DISK_FOLDER = Path(STAGING) / "source"
"""Where --low-disk keeps weight files until they have been used, below the output."""

FREE_SOME = "free some, or choose another output folder"


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that will be written below one folder, and the words for them."""

    what: str
    folder: Path
    nbytes: int


def disk_needs(plan: Plan, source: Source, output: Path) -> list[DiskNeed]:
    """What will be written where; without what an interrupted conversion has left already."""
    needs = [output_need("checkpoint", output, plan.weight_files)]
    if plan.calibration is not None:
        # Those of a layer are replaced by those of the next one.
        needs.append(DiskNeed("hidden states", output, 2 * states_bytes(plan)))
    provider = source.provider
    if provider.store is not None:
        peak = (
            low_disk_peak(plan, source)
            if provider.temporary
            else _missing(source, source.weight_files)
        )
        needs.append(DiskNeed("downloads", provider.store, peak))
    return needs


def output_need(what: str, output: Path, weight_files: Iterable[WeightFilePlan]) -> DiskNeed:
    """The tensors of an output, without those that an interrupted run has written."""
    wanted = sum(form.nbytes for file in weight_files for form in file.tensors.values())
    staged = sum(_allocated(output / STAGING / file.file) for file in weight_files)
    return DiskNeed(what, output, max(0, wanted - staged))


def describe_disk(needs: Sequence[DiskNeed]) -> str:
    """A line for people."""
    parts = [f"{size_text(need.nbytes)} of {need.what} in {need.folder}" for need in needs]
    return f"needs {size_text(sum(need.nbytes for need in needs))} of disk: {', '.join(parts)}"


def low_disk_peak(plan: Plan, source: Source) -> int:
    """Most bytes of weight files on disk at a time, if each goes when it has been used.

    A file is there from its first use to its last, and while it is in use the next one comes.
    """
    stage = stages(plan) if plan.calibration else [[i] for i in working_order(plan, source)]
    uses = [source.file_order(name for item in items for name in item.needs) for items in stage]
    uses.append(source.file_order(plan.compared))
    order = list(dict.fromkeys(name for names in uses for name in names))
    first = {name: index for index, names in reversed([*enumerate(uses)]) for name in names}
    last = {name: index for index, names in enumerate(uses) for name in names}
    peak = 0
    for index in range(len(uses)):
        begun = sum(first[name] <= index for name in order)
        # One item longer: others are still at work when the next item begins.
        held = [name for name in order[:begun] if last[name] + 1 >= index]
        peak = max(peak, _missing(source, [*held, *order[begun : begun + 1]]))
    return peak


def check_machine(
    what: str, output: Path, needs: Sequence[DiskNeed], working_bytes: int, advice: str
) -> None:
    """Refuses work that could not end well.

    Args:
        what: the work, for people.
        output: the folder.
        needs: what will be written where.
        working_bytes: private memory that it will take.
        advice: what to do about a disk that is too small.

    Raises:
        CheckpointError: the output cannot be written, or the disk is too small; with the figures,
            and what to do.
        OptionError: the memory is too small.
    """
    parent = existing_parent(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write to {parent}; choose another output folder")
    _check_disk(needs, advice)
    free = available_memory()
    if free is not None and working_bytes > free:
        raise OptionError(
            f"{what} needs about {size_text(working_bytes)} of memory, but only "
            f"{size_text(free)} are available; pass a smaller --max-memory or fewer --threads"
        )


def existing_parent(path: Path) -> Path:
    """A folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _check_disk(needs: Sequence[DiskNeed], advice: str) -> None:
    devices: dict[int, list[DiskNeed]] = {}
    for need in needs:
        devices.setdefault(existing_parent(need.folder).stat().st_dev, []).append(need)
    for together in devices.values():
        wanted = sum(need.nbytes for need in together)
        free = shutil.disk_usage(existing_parent(together[0].folder)).free
        if wanted > free:
            raise CheckpointError(
                f"not enough disk space: {describe_disk(together)}, but only {size_text(free)} "
                f"are free there; {advice}"
            )


def disk_advice(plan: Plan, source: Source) -> str:
    """What to do about a disk on which a conversion finds too little space."""
    if source.provider.store is None or source.provider.temporary:
        return FREE_SOME
    less = plan.output_bytes + low_disk_peak(plan, source)
    return f"free some, or convert with --low-disk, which needs {size_text(less)} in all"


def _missing(source: Source, names: Iterable[str]) -> int:
    return sum(
        source.weight_files[name].size for name in names if not source.provider.is_here(name)
    )


def _allocated(path: Path) -> int:
    """Bytes that a file really takes: one that is being written may be full of holes."""
    return path.stat().st_blocks * 512 if path.is_file() else 0
