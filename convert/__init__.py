"""From a Hugging Face model to a checkpoint for Ascend, offline, on any CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen3_ascend.checkpoint.errors import CheckpointError
from qwen3_ascend.checkpoint.files import CheckpointWriter, check_output
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.model import Qwen3Config
from qwen3_ascend.convert.pipeline import Progress, run
from qwen3_ascend.convert.plan import MAX_SHARD_BYTES, Plan, make_plan
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.convert.source import CONFIG_NAME, Source, open_source
from qwen3_ascend.version import __version__


def plan_conversion(
    model: str,
    recipe: str | Recipe = "w8a8",
    *,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[Source, Plan]:
    """Opens a model and plans its conversion from headers alone.

    Args:
        model: a local folder or a Hub id such as "Qwen/Qwen3-8B".
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        revision: branch, tag or commit of a Hub model.
        max_shard_bytes: size at which a new output file begins.
        note: receives a line about each download.

    Raises:
        UserError: whatever is wrong with the model or the recipe, in one line.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    source = open_source(model, revision, note)
    config = Qwen3Config.from_file(source.provider.small_file(CONFIG_NAME))
    slots = {name: source.slot(name) for name in source.location}
    return source, make_plan(config, slots, chosen, max_shard_bytes)


def convert_checkpoint(
    model: str | Path,
    output: str | Path,
    recipe: str | Recipe = "w8a8",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    progress: Progress = lambda name, nbytes: None,
    note: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Converts a model; the output appears whole or not at all.

    Args:
        model: a local folder or a Hub id such as "Qwen/Qwen3-8B".
        output: a folder that does not exist, is empty, or may be replaced (overwrite).
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        revision: branch, tag or commit of a Hub model.
        overwrite: replace a checkpoint that is already there; other files stay.
        max_shard_bytes: size at which a new output file begins.
        on_plan: receives the plan before the first byte is written.
        progress: called with each finished item's name and source bytes.
        note: receives a line about each download.

    Returns:
        The manifest of the new checkpoint, with the error figure of every linear.

    Raises:
        UserError: whatever is wrong with the model, the recipe or the output, in one line.
    """
    folder = Path(output).expanduser()
    check_output(folder, overwrite)
    if Path(model).expanduser().resolve() == folder.resolve():
        raise CheckpointError(f"{folder} is the source itself; choose another output folder")
    source, plan = plan_conversion(
        str(model), recipe, revision=revision, max_shard_bytes=max_shard_bytes, note=note
    )
    on_plan(plan)
    with CheckpointWriter(folder, overwrite) as writer:
        return run(plan, source, writer, __version__, progress)


__all__ = ["Plan", "Progress", "Recipe", "convert_checkpoint", "plan_conversion"]
