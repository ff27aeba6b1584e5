"""Sensitivities of a model, measured or read from a file that was measured before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen3_ascend import native
from qwen3_ascend.convert.bits.ladder import ladders
from qwen3_ascend.convert.bits.measuring import Measuring
from qwen3_ascend.convert.bits.sensitivities import Sensitivities
from qwen3_ascend.convert.calibration.data import Calibration, choose_windows, plan_calibration
from qwen3_ascend.convert.calibration.layers import device_options
from qwen3_ascend.convert.calibration.needs import wanted
from qwen3_ascend.convert.conversion import plan_conversion
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.float_model import FloatModel
from qwen3_ascend.convert.identity import identity
from qwen3_ascend.convert.options import ConvertOptions
from qwen3_ascend.convert.output.journal import difference
from qwen3_ascend.convert.plan import Plan
from qwen3_ascend.convert.recipe import Recipe
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.transforms.parts import model_parts
from qwen3_ascend.convert.transforms.whole import ModelChanges
from qwen3_ascend.convert.usable import check_usable
from qwen3_ascend.convert.work import changed_floats
from qwen3_ascend.errors import OptionError
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.streaming import LayerStream, one_layer

TOKENS = 4096
"""That are read: the KL divergence of so many is known to a tenth."""

STEP_TOKENS = 1024
"""Tokens that go through a layer together."""


def measure_sensitivities(
    model: str | Path,
    file: Path,
    recipe: str | Recipe | None = None,
    options: ConvertOptions = ConvertOptions(),
    events: Events = Events(),
) -> Sensitivities:
    """Measures what a model loses if one of its linears alone is quantized as a recipe says, or as
    the schemes with more bits do.

    What an interrupted measurement has found is in the file, and the same call goes on from there.

    Args:
        model: a local folder or a Hub id.
        file: that is written, and replaced after each layer.
        recipe: whose schemes are tried; name of a shipped recipe, path of a YAML file, or a Recipe.
        options: where the model comes from, and which texts are read.
        events: is told what is under way.

    Raises:
        UserError: in one line, if the model, the recipe or an option is wrong, or the file holds
            something else.
    """
    source, plan = plan_conversion(model, recipe, options, events)
    with source:
        return sensitivities_of(source, plan, file, options, events)


def sensitivities_of(
    source: Source, plan: Plan, file: Path, options: ConvertOptions, events: Events
) -> Sensitivities:
    """The same of an open source; what the file holds already is not measured again.

    Raises:
        OptionError: if the file holds what was measured of something else, or there is nothing to
            measure.
    """
    if plan.config.experts:
        raise OptionError(
            "what single experts lose is not measured yet: give a mixture of experts a recipe "
            "instead, such as moe-w8a8 or moe-w4a16"
        )
    found = ladders(plan)
    if not found:
        raise OptionError(f"recipe {plan.recipe.name} has no linear that can be raised")
    carried = source.carried()
    texts = _texts(plan, source, options, events)
    known = _known(
        file, Sensitivities(_identity(plan, texts, source, carried), texts.record.tokens)
    )
    left = [ladder for ladder in found if ladder.item.name not in known.linears]
    if not left:
        return known
    check_usable(carried, source.place, events.note)
    windows = choose_windows(texts, plan.config, carried, events.note)
    known.save(file)  # a place that cannot be written to is told before the work
    events.note(f"measuring {len(left)} linears of {len(found)}; what is done is kept in {file}")
    events.begun(sum(ladder.item.source_bytes for ladder in left))
    measuring = _measuring(source, plan, texts, windows, events)
    nbytes = {ladder.item.name: ladder.item.source_bytes for ladder in left}
    for layer in measuring.run(left):
        for name, losses in layer.items():
            known = known.and_of(name, losses)
            events.done(name, nbytes[name])
        known.save(file)
    return known


def _texts(plan: Plan, source: Source, options: ConvertOptions, events: Events) -> Calibration:
    least = replace(options, calibration_tokens=min(TOKENS, options.calibration_tokens))
    return plan_calibration(least, plan.config, source.names)


def _identity(
    plan: Plan, texts: Calibration, source: Source, carried: dict[str, bytes]
) -> dict[str, str]:
    same = identity(replace(plan, calibration=texts), source, carried, hash_source=False)
    return {key: text for key, text in same.items() if key not in ("source hashes", "output files")}


def _known(file: Path, nothing: Sensitivities) -> Sensitivities:
    """What a file holds of the same measurement."""
    if not file.exists():
        return nothing
    found = Sensitivities.load(file)
    if changed := difference(found.identity, nothing.identity):
        raise OptionError(
            f"{file} holds the sensitivities of something else ({changed}); name another file, or "
            f"remove it"
        )
    return found


def _measuring(
    source: Source,
    plan: Plan,
    texts: Calibration,
    windows: tuple[tuple[int, ...], ...],
    events: Events,
) -> Measuring:
    kernels = native.best()
    changes = ModelChanges(model_parts(plan.config), plan.transforms, kernels)
    config = one_layer(plan.config, texts.length)
    backend = backends.get(config, device_options(texts.record.device))
    floats = FloatModel(source, backend, changed_floats(source, changes))
    source.expect(floats.reads)
    stream = LayerStream(backend, plan.config.rms_norm_eps, windows, STEP_TOKENS)
    return Measuring(floats, stream, wanted(plan), kernels, events.working)
