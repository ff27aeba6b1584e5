"""`qwen3-ascend eval` and `report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen3_ascend.cli.options import UserPath, given, options_of
from qwen3_ascend.cli.terminal import silent, step_bar, to_stderr
from qwen3_ascend.errors import OptionError, os_errors
from qwen3_ascend.evaluation.options import EvaluationOptions

if TYPE_CHECKING:
    from qwen3_ascend.evaluation.result import Evaluation


@click.command("eval")
@click.argument("checkpoint", metavar="OUT")
@click.option(
    "--text", "text", type=UserPath(), required=True, metavar="FILE", help="A UTF-8 text to read."
)
@click.option(
    "--against",
    metavar="MODEL",
    help="The reference: the model that OUT was made of, or another checkpoint.",
)
@click.option(
    "--compare", metavar="OTHER", help="A second checkpoint, held against the same reference."
)
@options_of(EvaluationOptions)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Exit with 1 if the mean KL divergence of OUT is above X nats; for CI.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--save", type=UserPath(), metavar="FILE", help="Also write it here, for `report`.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
def evaluate(
    checkpoint: str,
    text: Path,
    against: str | None,
    compare: str | None,
    max_kl: float | None,
    as_json: bool,
    save: Path | None,
    quiet: bool,
    **values: Any,
) -> None:
    """Measure on a text how much quality OUT has kept.

    With --against: perplexity of both, the KL divergence of each predicted token, and how often the
    most probable token is the same, each with a 95 % interval (windows of the text are drawn
    again). Without it, perplexity alone. Models and texts of any size fit into the memory of one
    layer and two output projections. See docs/evaluating.md for what the figures mean.

    \b
    qwen3-ascend eval out/ --against Qwen/Qwen3-8B --text heldout.txt
    qwen3-ascend eval out/ --against Qwen/Qwen3-8B --compare other/ --text heldout.txt
    qwen3-ascend eval out/ --against out-bf16/ --text heldout.txt --windows 64 --max-kl 0.02
    """
    options = EvaluationOptions(**given(values))
    if max_kl is not None and against is None:
        raise OptionError("--max-kl bounds the distance from a reference: say which by --against")
    from qwen3_ascend import evaluation
    from qwen3_ascend.evaluation import words

    with step_bar(quiet) as show:
        found = evaluation.evaluate(
            checkpoint, text, against=against, compare=compare, options=options,
            progress=lambda done, total: show("evaluating", done, total),
            note=silent if quiet else to_stderr,
        )  # fmt: skip
    written = json.dumps(found.to_json(), indent=1, ensure_ascii=False)
    click.echo(written if as_json else "\n".join(words.lines(found)))
    if save is not None:  # printed first: it may have taken hours
        with os_errors(OptionError):
            save.write_text(f"{written}\n", encoding="utf-8")
    _hold_bound(found, max_kl)


def _hold_bound(found: Evaluation, max_kl: float | None) -> None:
    if max_kl is None or found.comparison is None:
        return
    kl = found.comparison.kl.value
    if not kl <= max_kl:  # as well if the bound is no number
        click.echo(f"Error: the mean KL divergence is {kl:.6f}, above {max_kl}", err=True)
        sys.exit(1)


@click.command()
@click.argument("checkpoint", type=UserPath(), metavar="OUT")
@click.option(
    "--eval", "evaluated", type=UserPath(), metavar="FILE", help="What `eval --save` has written."
)
@click.option(
    "--sensitivities",
    type=UserPath(),
    metavar="FILE",
    help="What `sensitivity` has written.  [default: sensitivities.json in OUT, if there is one]",
)
@click.option(
    "--output", "-o", type=UserPath(), required=True, metavar="PAGE.html", help="The page to write."
)
def report(
    checkpoint: Path, evaluated: Path | None, sensitivities: Path | None, output: Path
) -> None:
    """Write one HTML page about OUT: what it is, errors layer by layer, and how good it is.

    The page needs no network and no other file.

    \b
    qwen3-ascend eval out/ --against Qwen/Qwen3-8B --text heldout.txt --save eval.json
    qwen3-ascend report out/ --eval eval.json -o report.html
    """
    from qwen3_ascend.evaluation import write_report

    write_report(checkpoint, output, evaluated=evaluated, sensitivities=sensitivities)
    click.echo(f"{output}: open it in a browser")
