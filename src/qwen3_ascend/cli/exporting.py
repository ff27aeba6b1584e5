"""`qwen3-ascend export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from qwen3_ascend.cli.converting import Watch, kept
from qwen3_ascend.cli.environment import nothing_is_garbage
from qwen3_ascend.cli.interruption import stoppable
from qwen3_ascend.cli.options import UserPath, given, options_of
from qwen3_ascend.cli.terminal import progress_bar
from qwen3_ascend.convert.options import EXPORT_FORMATS, WritingOptions
from qwen3_ascend.files.text import size_text


@click.command()
@click.argument("checkpoint", type=UserPath())
@click.argument("output", type=UserPath())
@click.option(
    "--format",
    "name",
    required=True,
    type=click.Choice(EXPORT_FORMATS),
    help="ascendv1: what ModelSlim writes. compressed-tensors: what llm-compressor writes. "
    "huggingface: bfloat16, for evaluation.",
)
@options_of(WritingOptions)
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no report.")
def export(checkpoint: Path, output: Path, name: str, quiet: bool, **values: Any) -> None:
    """Export CHECKPOINT, which `convert` has made, to OUTPUT in a format of other engines.

    Codes and scales stay as they are, so every format holds the same integers; huggingface turns
    them back into bfloat16. Each tensor is verified while it is read. OUTPUT appears whole or not
    at all; the same command continues an export that was interrupted; `verify` re-hashes it.

    \b
    qwen3-ascend export out/ av1/ --format ascendv1              vllm-ascend, SGLang
    qwen3-ascend export out/ ct/ --format compressed-tensors     vLLM, vllm-ascend
    qwen3-ascend export out/ hf/ --format huggingface            transformers, lm-eval
    """
    with nothing_is_garbage():
        from qwen3_ascend.convert import export_checkpoint

    options, started = WritingOptions(**given(values)), time.perf_counter()
    with (
        stoppable(lambda: kept(output)),
        progress_bar("exporting", quiet) as bar,
    ):
        record = export_checkpoint(checkpoint, output, name, options, Watch(None, bar, quiet))
    if not quiet:
        nbytes = sum(entry.size for entry in record.weight_files.values())
        click.echo(f"{output}: {size_text(nbytes)} in {time.perf_counter() - started:.1f} s")
        click.echo(f"{record.format}, {len(record.tensors)} tensors; how to load it: README.md")
