"""From a Hugging Face model to a checkpoint for Ascend, offline, on any CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen3_ascend import native, recipes
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.convert.bits.mixing import mixed_recipe
from qwen3_ascend.convert.bits.sensitivities import SENSITIVITIES, Sensitivities
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.calibration.data import Calibration, choose_windows, plan_calibration
from qwen3_ascend.convert.calibration.needs import needs_data, passing_bytes, recorded_bytes, wanted
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.finished import CHECKPOINT, finished_manifest, is_finished
from qwen3_ascend.convert.identity import identity
from qwen3_ascend.convert.options import ConvertOptions
from qwen3_ascend.convert.output.weight_file import STAGING
from qwen3_ascend.convert.output.writer import OutputWriter, check_output
from qwen3_ascend.convert.pipeline import run
from qwen3_ascend.convert.plan import Plan, make_plan
from qwen3_ascend.convert.preflight import LOW_DISK_FOLDER, check_machine, disk_advice, disk_needs
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.convert.source import Source, open_source
from qwen3_ascend.convert.source.names import EMBEDDING, HEAD
from qwen3_ascend.convert.source.quantization import linear_names
from qwen3_ascend.convert.source.tied_head import compare_head
from qwen3_ascend.convert.source.transfer import Transfer
from qwen3_ascend.convert.usable import check_usable
from qwen3_ascend.errors import CheckpointError, OptionError, RecipeError, os_errors
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.files.text import parse_size
from qwen3_ascend.version import __version__


def plan_conversion(
    model: str | Path,
    recipe: str | Recipe | None = None,
    options: ConvertOptions = ConvertOptions(),
    events: Events = Events(),
    output: Path | None = None,
) -> tuple[Source, Plan]:
    """Opens a model and plans its conversion from headers alone.

    Args:
        model: a local folder or a Hub id such as "Qwen/Qwen3-8B".
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe. Default:
            recipes.DEFAULT, or what the source holds if it has codes that can be taken.
        options: see the fields of ConvertOptions.
        events: is told about downloads.
        output: the folder to be written, in which `low_disk` keeps downloaded weights.

    Raises:
        UserError: whatever is wrong with the model, the recipe or an option, in one line.
    """
    if options.low_disk and output is None:
        raise OptionError("low_disk: say in which output folder downloads are to be kept")
    chosen = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    area = output / LOW_DISK_FOLDER if options.low_disk and output is not None else None
    transfer = Transfer(events.note, events.arrived, options.retries)
    source = open_source(
        str(model), options.revision, hub=options.hub, area=area, transfer=transfer
    )
    config, alike, notes = source.config, {}, [*source.notes]
    if config.tie_word_embeddings:
        finding = compare_head(source)
        if finding == "different":
            config = replace(config, tie_word_embeddings=False)
            notes.append(f"config.json ties {HEAD} to the embedding, but it differs: it is kept")
        alike = {HEAD: EMBEDDING} if finding == "alike" else {}

    def planned(recipe: Recipe) -> Plan:
        return make_plan(
            config, source.slots, recipe, options.max_file_bytes,
            alike=alike, quantization=source.quantization,
        )  # fmt: skip

    plan = planned(chosen or _default_recipe(source))
    _check_backbone(source, plan)
    if options.target_bpw is not None:
        known = Sensitivities.load(sensitivities_file(options, output))
        plan = planned(mixed_recipe(plan, known, options.target_bpw))
    calibration = _calibration(plan, options, source, notes)
    for line in notes:  # not before: a refusal is one line
        events.note(line)
    return source, replace(plan, calibration=calibration)


def _calibration(
    plan: Plan, options: ConvertOptions, source: Source, notes: list[str]
) -> Calibration | None:
    """With what a plan is calibrated; None if its recipe needs no data, and none is given that it
    could use."""
    said = options.calibration
    if needs_data(plan) or (said is not None and wanted(plan)):
        return plan_calibration(options, plan.config, source.names)
    if said is not None:
        notes.append(f"recipe {plan.recipe.name} needs no calibration: {said} is not read")
    return None


def _default_recipe(source: Source) -> Recipe:
    """The recipe of who asks for none."""
    if source.quantization.has_codes:
        return source.quantization.recipe(linear_names(source.config))
    return Recipe.load(recipes.OF_BACKBONES if source.is_backbone else recipes.DEFAULT)


def _check_backbone(source: Source, plan: Plan) -> None:
    """Without a head nothing turns the hidden states back, which are what a backbone is for."""
    recipe = plan.recipe
    if source.is_backbone and any(transform.unties for transform in plan.transforms):
        raise RecipeError(
            f"{source.place} is a backbone, whose hidden states recipe {recipe.name} changes "
            f"(rotate): choose one without rotate, such as {recipes.OF_BACKBONES}"
        )


def plan_budget(plan: Plan, options: ConvertOptions) -> Budget:
    """How much of a plan is under way at a time; OptionError if the memory is too little."""
    return Budget.fit(
        plan.piece_bytes, options.threads, parse_size(options.max_memory),
        recorded_bytes(plan), passing_bytes(plan),
    )  # fmt: skip


def sensitivities_file(options: ConvertOptions, output: Path | None) -> Path:
    """Where the sensitivities of a conversion are: where the user says, or beside the output."""
    if options.sensitivities is not None:
        return user_path(options.sensitivities)
    if output is None:
        raise OptionError("target_bpw: say in which file the sensitivities are")
    folder = output.resolve() if output.name in ("", "..") else output
    if not folder.name:
        raise OptionError(f"target_bpw: {output} has nothing beside it; pass --sensitivities FILE")
    return folder.with_name(f"{folder.name}.{SENSITIVITIES}")


def _measure(
    model: str | Path,
    output: Path,
    recipe: str | Recipe | None,
    options: ConvertOptions,
    events: Events,
) -> None:
    """Measures what is not measured yet of the model that a conversion is to give more bits."""
    # Imported here, because what is not measured needs no model that computes.
    from qwen3_ascend.convert.bits.measured import measure_sensitivities

    if options.low_disk:
        raise OptionError(
            "low_disk: measuring for target_bpw reads the model many times; download it first"
        )
    as_said = replace(options, target_bpw=None, sensitivities=None)
    file = sensitivities_file(options, output)
    measure_sensitivities(model, file, recipe, as_said, events)


@os_errors(CheckpointError)
def convert_checkpoint(
    model: str | Path,
    output: str | Path,
    recipe: str | Recipe | None = None,
    options: ConvertOptions = ConvertOptions(),
    events: Events = Events(),
) -> Manifest:
    """Converts a model; the output appears whole or not at all.

    A conversion that was interrupted is continued by the same call, and ends with the same bytes.

    Args:
        model: a local folder or a Hub id such as "Qwen/Qwen3-8B".
        output: a folder that does not exist, is empty, holds what this conversion would make, or
            may be replaced (`overwrite`).
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe. Default:
            recipes.DEFAULT, or what the source holds if it has codes that can be taken.
        options: see the fields of ConvertOptions.
        events: is told of the plan, of downloads, and of each finished item.

    Returns:
        The manifest of the new checkpoint, with the error figure of every linear.

    Raises:
        UserError: whatever is wrong with the model, the recipe, the output or an option, in one
            line.
    """
    folder = user_path(output)
    is_again = is_finished(folder) and not options.overwrite
    if not is_again:
        check_output(folder, options.overwrite)
    source_folder = user_path(model)
    if source_folder.is_dir() and source_folder.resolve() == folder.resolve():
        raise OptionError(f"{folder} is the source itself; choose another output folder")
    if options.target_bpw is not None:
        _measure(model, folder, recipe, options, events)
    source, plan = plan_conversion(model, recipe, options, events, folder)
    budget = plan_budget(plan, options)
    carried = source.carried()
    if options.target_bpw is not None:
        carried |= {SENSITIVITIES: sensitivities_file(options, folder).read_bytes()}
    if is_again and not (folder / STAGING).exists():
        with source:
            made = finished_manifest(folder, plan, source, carried, options.hash_source)
            events.note(f"{folder} holds this conversion already: nothing to do")
            return made
    check_usable(carried, source.place, events.note)
    windows = (
        choose_windows(plan.calibration, plan.config, carried, events.note)
        if plan.calibration
        else ()
    )
    same = identity(plan, source, carried, options.hash_source)
    if source.provider.revision is not None:
        events.note(f"from {source.provider.repo} @ {source.provider.revision}")
    with (
        OutputWriter(
            folder,
            CHECKPOINT,
            plan.weight_files,
            same,
            overwrite=options.overwrite,
            restart=options.restart,
        ) as writer,
        source,
    ):
        if writer.finished:
            return Manifest.read(folder)
        # With the output locked, so that what an interrupted run has left can be counted in.
        needs, advice = disk_needs(plan, source, folder), disk_advice(plan, source)
        check_machine("converting", folder, needs, budget.working_bytes, advice)
        events.planned(plan)
        events.begun(plan.source_bytes)
        if writer.left:
            done, total = len(writer.left), len(plan.items)
            events.note(f"continuing: {done} of {total} items were done before")
        return run(
            plan, source, carried, writer, budget, native.best(), __version__,
            options.hash_source, events, windows,
        )  # fmt: skip
