"""`qwen3-ascend convert`."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen3_ascend import recipes
from qwen3_ascend.cli.interruption import stoppable
from qwen3_ascend.cli.terminal import progress_bar, silent, to_stderr

if TYPE_CHECKING:
    from qwen3_ascend.convert.budget import Budget
    from qwen3_ascend.convert.plan import Plan

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def size(text: str) -> int:
    """Bytes of a size such as 512MiB or 2G; the units are powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a size such as 512MiB or 2G")
    return int(float(found[1]) * 2 ** UNITS[found[2].upper()])


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    default="w8a8",
    show_default=True,
    metavar="NAME|FILE",
    help=f"Which scheme each linear gets: {', '.join(recipes.names())}, or a .yaml file.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
@click.option(
    "--hub",
    type=click.Choice(["huggingface", "modelscope"]),
    default="huggingface",
    show_default=True,
    help="Where a MODEL that is no folder is looked for.",
)
@click.option(
    "--low-disk",
    is_flag=True,
    help="Download into OUTPUT and remove each weight file as soon as it has been used.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 100),
    default=5,
    show_default=True,
    help="Further attempts at a download that failed, with growing pauses.",
)
@click.option(
    "--max-memory",
    type=size,
    metavar="SIZE",
    help="Private memory to take beyond Python with torch loaded.  [default: 2GiB]",
)
@click.option("--threads", type=click.IntRange(1), help="Default: one for each processor.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is already in OUTPUT.")
@click.option("--restart", is_flag=True, help="Discard an interrupted conversion, do not continue.")
@click.option(
    "--hash-source",
    is_flag=True,
    help="Note the BLAKE3 of every source tensor in the manifest, for `verify --against`.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, read headers only, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no report.")
def convert(
    model: str,
    output: Path,
    recipe: str,
    revision: str | None,
    hub: str,
    low_disk: bool,
    retries: int,
    max_memory: int | None,
    threads: int | None,
    overwrite: bool,
    restart: bool,
    hash_source: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert MODEL, a folder or a Hub id, into the folder OUTPUT.

    MODEL is a Hugging Face folder (config.json and safetensors) or an id such as Qwen/Qwen3-8B,
    which is downloaded (HF_TOKEN, HF_ENDPOINT and HF_HOME are respected). Linear weights are
    quantized and laid out in FRACTAL_NZ; the tokenizer and configuration travel along. OUTPUT
    appears whole or not at all; the same command continues a conversion that was interrupted. The
    same MODEL and recipe give the same bytes on any machine.

    \b
    qwen3-ascend convert Qwen/Qwen3-8B out/
    qwen3-ascend convert ./my-qwen3 out/ --recipe bf16
    qwen3-ascend convert Qwen/Qwen3-8B out/ --dry-run
    qwen3-ascend convert Qwen/Qwen3-32B out/ --low-disk
    """
    # Their warnings about failed requests would stand between our lines about the same requests.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "ERROR")
    if hub == "modelscope":  # it draws bars that no argument of its own turns off
        os.environ.setdefault("TQDM_DISABLE", "1")
    from qwen3_ascend.convert import convert_checkpoint, plan_conversion, preflight, report
    from qwen3_ascend.convert.budget import Budget
    from qwen3_ascend.convert.source.transfer import Transfer
    from qwen3_ascend.files.text import size_text

    note = silent if quiet else to_stderr
    if dry_run:
        source, plan = plan_conversion(
            model, recipe, revision=revision, hub=hub,
            low_disk_output=output if low_disk else None, transfer=Transfer(note, retries=retries),
        )  # fmt: skip
        budget = Budget.fit(plan.piece_bytes, threads, max_memory)
        disk = preflight.disk_needs(plan, source, output)
        if as_json:
            needs = {"disk": {need.what: need.nbytes for need in disk}}
            click.echo(json.dumps(report.plan_json(plan, budget) | needs, indent=1))
        else:
            click.echo(f"{_plan_text(plan, budget)}\n{preflight.describe_disk(disk)}")
        return
    if as_json:
        raise click.UsageError("--json is for --dry-run; the manifest in OUTPUT is JSON already")
    started = time.perf_counter()
    with (
        stoppable(lambda: _kept(output)),
        progress_bar("downloading", quiet or Path(model).is_dir(), None) as downloads,
        progress_bar("converting", quiet) as bar,
    ):

        def begin(plan: Plan) -> None:
            bar.reset(total=plan.source_bytes)

        def advance(name: str, nbytes: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(nbytes)

        manifest = convert_checkpoint(
            model, output, recipe, revision=revision, overwrite=overwrite, restart=restart,
            hash_source=hash_source, max_memory=max_memory, threads=threads, hub=hub,
            low_disk=low_disk, retries=retries,
            on_plan=begin, progress=advance, arrived=downloads.update, note=note,
        )  # fmt: skip
    if quiet:
        return
    seconds = time.perf_counter() - started
    nbytes = sum(entry.size for entry in manifest.weight_files.values())
    click.echo(f"{output}: {size_text(nbytes)} in {seconds:.1f} s")
    click.echo("\n".join(report.describe_errors(manifest)))
    click.echo(f'next: qwen3-ascend generate {output} --prompt "Hello"')


def _kept(output: Path) -> str:
    """What becomes of an interrupted conversion."""
    from qwen3_ascend.convert.output.weight_file import STAGING

    kept = (output / STAGING).is_dir()
    return "; what is done is kept, the same command continues" if kept else ""


def _plan_text(plan: Plan, budget: Budget) -> str:
    from qwen3_ascend.convert import report
    from qwen3_ascend.files.text import table

    header = ("tensor", "shape", "scheme", "layout", "bytes")
    lines = table([*report.plan_rows(plan)], header)
    lines += ["", *report.plan_totals(plan, budget)]
    return "\n".join(lines)
