"""`qwen3-ascend inspect`, `verify` and `doctor`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen3_ascend.cli.options import UserPath
from qwen3_ascend.cli.terminal import progress_bar, silent, to_stderr
from qwen3_ascend.errors import OptionError, os_errors
from qwen3_ascend.files.paths import user_path

if TYPE_CHECKING:
    from qwen3_ascend.checkpoint.verify import Verdict


@click.command()
@click.argument("checkpoint", type=UserPath())
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def inspect(checkpoint: Path, as_json: bool) -> None:
    """Show what is in CHECKPOINT: model, source, and what was done to every tensor."""
    from qwen3_ascend.checkpoint.describe import inspect_lines
    from qwen3_ascend.checkpoint.manifest import Manifest

    manifest = Manifest.read(checkpoint)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(inspect_lines(manifest)))


@click.command()
@click.argument("checkpoint", type=UserPath())
@click.option(
    "--against",
    metavar="MODEL",
    help="Also compare with the model it was made of, and measure every error again.",
)
@click.option(
    "--accept",
    is_flag=True,
    help="First record the small files (tokenizer, template, config.json, ...) as they are now.",
)
@click.option("--threads", type=click.IntRange(1), help="Default: one for each processor.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar; only what differs.")
def verify(
    checkpoint: Path, against: str | None, accept: bool, threads: int | None, quiet: bool
) -> None:
    """Re-hash every byte of CHECKPOINT, or of what `export` has made, and re-derive every shape.

    Exits with 1 and names each tensor or file that differs from the manifest. With --against
    MODEL, a folder or a Hub id as for convert, also each that differs from the model.

    Small files that were edited or added after the conversion are named as well, since `generate`
    would read them; --accept takes them into the manifest, if they fit the weights.

    \b
    qwen3-ascend verify out/
    qwen3-ascend verify out/ --accept
    qwen3-ascend verify out/ --against Qwen/Qwen3-8B
    """
    from qwen3_ascend.convert.export.record import is_export

    exported = is_export(checkpoint)
    if exported and (accept or against is not None):
        raise OptionError(f"{checkpoint} is an export: --accept and --against are for a checkpoint")
    if accept:
        from qwen3_ascend.convert.accept import accept_files

        for line in accept_files(checkpoint):
            click.echo(f"accepted: {line}")
    verdict = _verify(checkpoint, exported, threads, quiet)
    problems = [*verdict.problems]
    if against is not None and verdict.ok:
        problems += _compare(checkpoint, against, threads, quiet)
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    if problems:
        sys.exit(1)
    if not quiet:
        model = f", and as {against} says" if against is not None else ""
        click.echo(
            f"{checkpoint}: {verdict.tensors} tensors and {verdict.files} files, "
            f"{verdict.nbytes:,} bytes: all as the manifest says{model}"
        )


def _verify(folder: Path, exported: bool, threads: int | None, quiet: bool) -> Verdict:
    from qwen3_ascend.checkpoint.manifest import Manifest
    from qwen3_ascend.checkpoint.verify import total_bytes, verify
    from qwen3_ascend.convert.export.record import ExportRecord, verify_export

    manifest = ExportRecord.read(folder) if exported else Manifest.read(folder)
    with progress_bar("verifying", quiet) as bar:
        bar.reset(total=total_bytes(manifest))
        return (verify_export if exported else verify)(folder, bar.update, threads)


def _compare(checkpoint: Path, model: str, threads: int | None, quiet: bool) -> list[str]:
    """What differs between a checkpoint and a model."""
    from qwen3_ascend.checkpoint.reader import CheckpointReader
    from qwen3_ascend.convert.compare import compare
    from qwen3_ascend.convert.options import HUBS
    from qwen3_ascend.convert.source import open_source
    from qwen3_ascend.convert.source.transfer import Transfer

    reader = CheckpointReader(checkpoint)
    stored = reader.manifest.stored().values()
    made_of = reader.manifest.source
    revision = None if os.path.isdir(user_path(model)) else made_of.revision
    transfer = Transfer(silent if quiet else to_stderr)
    with (
        open_source(model, revision, hub=made_of.hub or HUBS[0], transfer=transfer) as source,
        progress_bar("comparing", quiet) as bar,
    ):
        bar.reset(total=sum(tensor.nbytes for tensor in stored))
        return compare(reader, source, bar.update, threads)


@click.command()
@click.argument("checkpoint", required=False, type=UserPath())
@click.option("--json", "json_path", type=UserPath(), help="Write the report here.")
def doctor(checkpoint: Path | None, json_path: Path | None) -> None:
    """Check this machine's NPU: what it offers, layouts, every operator, graphs, speed.

    Runs in some minutes what this project could only prove on a simulated device, and measures
    which settings are fastest. With CHECKPOINT, in the sizes of that model; without, small random
    ones are used. On a machine without a card it says what is missing. A crash of one check is a
    finding, and the others go on. Exits with 1 if anything failed. Please paste what it prints at
    the end into an issue, and attach the --json report.

    \b
    qwen3-ascend doctor
    qwen3-ascend doctor out/ --json report.json
    """
    from qwen3_ascend.runtime import doctor as examination

    def show(check: examination.Check) -> None:
        detail = f"  ({check.detail})" if check.detail else ""
        click.echo(f"{check.status:8}{check.area:14}{check.name}{detail}")

    report = examination.run(checkpoint, show)
    if json_path is not None:
        with os_errors(OptionError):
            json_path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    click.echo("\nPaste this into an issue:\n")
    click.echo(report.to_markdown())
    if not report.ok:
        sys.exit(1)
