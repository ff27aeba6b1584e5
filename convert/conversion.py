"""From a Hugging Face model to a checkpoint for Ascend, offline, on any CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen3_ascend import native
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.identity import identity
from qwen3_ascend.convert.output.writer import CheckpointWriter, check_output
from qwen3_ascend.convert.pipeline import Progress, run
from qwen3_ascend.convert.plan import MAX_FILE_BYTES, Plan, make_plan
from qwen3_ascend.convert.preflight import LOW_DISK_FOLDER, check_machine
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.convert.source import HUBS, Source, open_source
from qwen3_ascend.convert.source.provider import CONFIG_NAME
from qwen3_ascend.convert.source.transfer import RETRIES, Transfer
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.threads import quick_garbage_collection
from qwen3_ascend.version import __version__


def plan_conversion(
    model: str,
    recipe: str | Recipe = "w8a8",
    *,
    revision: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    hash_source: bool = False,
    hub: str = HUBS[0],
    low_disk_output: Path | None = None,
    transfer: Transfer | None = None,
) -> tuple[Source, Plan]:
    """Opens a model and plans its conversion from headers alone.

    Args:
        model: a local folder or a Hub id such as "Qwen/Qwen3-8B".
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        revision: branch, tag or commit of a Hub model.
        max_file_bytes: size at which a new output file begins.
        hash_source: hash every source tensor that is read.
        hub: where a model that is no local folder is looked for: huggingface or modelscope.
        low_disk_output: the output, if downloaded weights are to be removed as they are used.
        transfer: notes, retries and cancellation of the downloads.

    Raises:
        UserError: whatever is wrong with the model or the recipe, in one line.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    area = low_disk_output / LOW_DISK_FOLDER if low_disk_output is not None else None
    source = open_source(model, revision, hub=hub, area=area, transfer=transfer)
    config = Qwen3Config.from_file(source.provider.small_file(CONFIG_NAME))
    slots = {name: source.slot(name) for name in source.location}
    return source, make_plan(config, slots, chosen, max_file_bytes, hash_source)


@quick_garbage_collection()
def convert_checkpoint(
    model: str | Path,
    output: str | Path,
    recipe: str | Recipe = "w8a8",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    threads: int | None = None,
    max_memory: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    hash_source: bool = False,
    hub: str = HUBS[0],
    low_disk: bool = False,
    retries: int = RETRIES,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    progress: Progress = lambda name, nbytes: None,
    arrived: Callable[[int], None] = lambda nbytes: None,
    note: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Converts a model; the output appears whole or not at all.

    A conversion that was interrupted is continued by the same call, and ends with the same bytes.

    Args:
        model: a local folder or a Hub id such as "Qwen/Qwen3-8B".
        output: a folder that does not exist, is empty, or may be replaced (overwrite).
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        revision: branch, tag or commit of a Hub model.
        overwrite: replace a checkpoint that is already there; other files stay.
        restart: discard an interrupted conversion instead of continuing it.
        threads: that work at a time; default one for each processor. No byte depends on it.
        max_memory: private bytes to take beyond Python with torch loaded; default 2 GiB.
        max_file_bytes: size at which a new output file begins.
        hash_source: note in the manifest the BLAKE3 of every source tensor. The
            files of a hub are held against the hashes that it states anyway.
        hub: where a model that is no local folder is looked for: huggingface or modelscope.
        low_disk: download weights into the output folder and remove each file as soon as it has
            been used, instead of keeping it in the hub's cache.
        retries: further attempts at a download that failed.
        on_plan: receives the plan before the first byte is written.
        progress: called with each finished item's name and source bytes, from any thread but one
            at a time.
        arrived: called with how many more bytes of weights have come; less than 0 takes some back.
        note: receives a line about each download.

    Returns:
        The manifest of the new checkpoint, with the error figure of every linear.

    Raises:
        UserError: whatever is wrong with the model, the recipe or the output, in one line.
    """
    folder = Path(output).expanduser()
    check_output(folder, overwrite)
    source_folder = Path(model).expanduser()
    if source_folder.is_dir() and source_folder.resolve() == folder.resolve():
        raise CheckpointError(f"{folder} is the source itself; choose another output folder")
    source, plan = plan_conversion(
        str(model), recipe, revision=revision, max_file_bytes=max_file_bytes,
        hash_source=hash_source, hub=hub, low_disk_output=folder if low_disk else None,
        transfer=Transfer(note, arrived, retries),
    )  # fmt: skip
    budget = Budget.fit(plan.piece_bytes, threads, max_memory)
    carried = source.carried()
    same = identity(plan, source, carried)
    if source.provider.revision is not None:
        note(f"from {source.provider.repo} @ {source.provider.revision}")
    with (
        CheckpointWriter(
            folder, plan.weight_files, same, overwrite=overwrite, restart=restart
        ) as writer,
        source,
    ):
        if writer.finished is not None:
            return writer.finished
        # With the output locked, so that what an interrupted run has left can be counted in.
        check_machine(plan, source, folder, budget.working_bytes)
        on_plan(plan)
        if writer.left:
            note(f"continuing: {len(writer.left)} of {len(plan.items)} items were done before")
        kernels = native.best()
        return run(plan, source, carried, writer, budget, kernels, __version__, progress)
