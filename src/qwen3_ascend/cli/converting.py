"""`qwen3-ascend convert`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import override

from qwen3_ascend import recipes
from qwen3_ascend.cli.environment import nothing_is_garbage
from qwen3_ascend.cli.interruption import stoppable
from qwen3_ascend.cli.options import UserPath, given, options_of
from qwen3_ascend.cli.terminal import progress_bar, to_stderr
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.options import CalibrationOptions, ConvertOptions
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.files.text import size_text, table

if TYPE_CHECKING:
    from qwen3_ascend.convert.budget import Budget
    from qwen3_ascend.convert.plan import Plan


@click.command()
@click.argument("model")
@click.argument("output", type=UserPath())
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="Which scheme each linear gets, and who chooses its codes: "
    f"{', '.join(recipes.names())}, or a .yaml file (docs/recipes.md). Default: "
    f"{recipes.DEFAULT}, or what MODEL holds if it is quantized already.",
)
@options_of(ConvertOptions)
@click.option("--dry-run", is_flag=True, help="Print the plan, read headers only, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no report.")
def convert(
    model: str,
    output: Path,
    recipe: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Convert MODEL, a folder or a Hub id, into the folder OUTPUT.

    MODEL is a Hugging Face folder (config.json and safetensors) or an id such as Qwen/Qwen3-8B,
    which is downloaded (HF_TOKEN, HF_ENDPOINT and HF_HOME are respected). Linear weights are
    quantized and laid out in FRACTAL_NZ; int8 weights of ModelSlim or llm-compressor are laid out
    as they are. The tokenizer and configuration travel along. OUTPUT appears whole or not at all;
    the same command continues a conversion that was interrupted. The same MODEL and recipe give the
    same bytes on any machine.

    \b
    qwen3-ascend convert Qwen/Qwen3-8B out/
    qwen3-ascend convert ./my-qwen3 out/ --recipe bf16
    qwen3-ascend convert Qwen/Qwen3-8B out/ --dry-run
    qwen3-ascend convert Qwen/Qwen3-32B out/ --low-disk
    """
    if as_json and not dry_run:
        raise click.UsageError("--json is for --dry-run; the manifest in OUTPUT is JSON already")
    options, recipe = ConvertOptions(**given(values)), recipe and str(user_path(recipe))
    if dry_run:
        _show_plan(model, output, recipe, options, Events() if quiet else Notes(), as_json)
    else:
        _convert(model, output, recipe, options, quiet)


@click.command()
@click.argument("model")
@click.argument("file", type=UserPath())
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    default="w4a16",
    help="Whose schemes are tried, each beside those with more bits.  [default: w4a16]",
)
@options_of(CalibrationOptions)
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no notes.")
def sensitivity(model: str, file: Path, recipe: str, quiet: bool, **values: Any) -> None:
    """Measure which linears of MODEL lose most by quantization, into FILE.

    Each linear alone becomes what the recipe says, and what has more bits, and the predictions are
    held against those of the floats. Each try takes about half a pass over the model: hours for 8B
    on a CPU. FILE is written layer by layer, and the same command goes on from there.
    `convert --target-bpw X --sensitivities FILE` then spends X bits a weight where they gain most.

    \b
    qwen3-ascend sensitivity Qwen/Qwen3-0.6B sensitivities.json --recipe w4a16
    qwen3-ascend convert Qwen/Qwen3-0.6B out/ --recipe w4a16 --target-bpw 5 \\
        --sensitivities sensitivities.json
    """
    from qwen3_ascend.convert.bits.measured import measure_sensitivities

    options = ConvertOptions(**given(values))
    with (
        stoppable(lambda: f"; what is measured is kept in {file}, the same command continues"),
        progress_bar("downloading", quiet or os.path.isdir(user_path(model)), None) as downloads,
        progress_bar("measuring", quiet) as bar,
    ):
        found = measure_sensitivities(model, file, recipe, options, Watch(downloads, bar, quiet))
    worst = sorted(found.linears, key=lambda name: -found.linears[name][0].kl)[:5]
    click.echo(f"{file}: {len(found.linears)} linears; what loses most as {recipe} says:")
    for name in worst:
        click.echo(f"  {1000 * found.linears[name][0].kl:8.3f} thousandths of a nat  {name}")


class Notes(Events):
    """Prints what a conversion has to say."""

    @override
    def note(self, line: str) -> None:
        to_stderr(line)


class Watch(Events):
    """Shows a conversion, or an export, as bars, and its notes."""

    def __init__(self, downloads: Any, bar: Any, quiet: bool) -> None:
        self._downloads, self._bar, self._quiet = downloads, bar, quiet

    @override
    def begun(self, nbytes: int) -> None:
        self._bar.reset(total=nbytes)

    @override
    def arrived(self, nbytes: int) -> None:
        self._downloads.update(nbytes)

    @override
    def done(self, name: str, nbytes: int) -> None:
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(nbytes)

    @override
    def working(self, what: str) -> None:
        self._bar.set_postfix_str(what)

    @override
    def note(self, line: str) -> None:
        if not self._quiet:
            to_stderr(line)


def _show_plan(
    model: str,
    output: Path,
    recipe: str | None,
    options: ConvertOptions,
    events: Events,
    as_json: bool,
) -> None:
    with nothing_is_garbage():
        from qwen3_ascend.convert import plan_conversion, preflight, report
        from qwen3_ascend.convert.conversion import plan_budget

        source, plan = plan_conversion(model, recipe, options, events, output)
    budget = plan_budget(plan, options)
    disk = preflight.disk_needs(plan, source, output)
    if as_json:
        needs = {"disk": {need.what: need.nbytes for need in disk}}
        click.echo(json.dumps(report.plan_json(plan, budget) | needs, indent=1))
    else:
        click.echo(f"{_plan_text(plan, budget)}\n{preflight.describe_disk(disk)}")


def _convert(
    model: str, output: Path, recipe: str | None, options: ConvertOptions, quiet: bool
) -> None:
    with nothing_is_garbage():
        from qwen3_ascend.convert import convert_checkpoint, report

    started = time.perf_counter()
    is_local = os.path.isdir(user_path(model))
    with (
        stoppable(lambda: kept(output)),
        progress_bar("downloading", quiet or is_local, None) as downloads,
        progress_bar("converting", quiet) as bar,
    ):
        watch = Watch(downloads, bar, quiet)
        manifest = convert_checkpoint(model, output, recipe, options, watch)
    if quiet:
        return
    seconds = time.perf_counter() - started
    nbytes = sum(entry.size for entry in manifest.weight_files.values())
    click.echo(f"{output}: {size_text(nbytes)} in {seconds:.1f} s")
    click.echo("\n".join(report.describe_errors(manifest) + report.describe_head(manifest)))
    click.echo(f'next: qwen3-ascend generate {output} --prompt "Hello"')


def kept(output: Path) -> str:
    """What becomes of interrupted work."""
    from qwen3_ascend.convert.output.weight_file import STAGING

    is_kept = (output / STAGING).is_dir()
    return "; what is done is kept, the same command continues" if is_kept else ""


def _plan_text(plan: Plan, budget: Budget) -> str:
    from qwen3_ascend.convert import report

    header = ("tensor", "shape", "scheme", "layout", "bytes")
    lines = table([*report.plan_rows(plan)], header)
    lines += ["", *report.plan_totals(plan, budget)]
    return "\n".join(lines)
