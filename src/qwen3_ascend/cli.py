"""The command line. Each command is one call; heavy imports stay inside it, so that --help is
instant."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen3_ascend import recipes
from qwen3_ascend.checkpoint.errors import UserError
from qwen3_ascend.version import __version__

if TYPE_CHECKING:
    from qwen3_ascend.convert.plan import Plan
    from qwen3_ascend.runtime import LLM, AnswerStream
    from qwen3_ascend.runtime.sequence import SamplingParams

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class OneLineErrors(click.Group):
    """Prints what a user can mend as one line and exits with 1; anything else is a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Group."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except BrokenPipeError:  # the reader of our output is gone: | head
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from error


@click.group(cls=OneLineErrors, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="qwen3-ascend")
def main() -> None:
    """Take Qwen3 from the Hub to an Ascend NPU.

    \b
    qwen3-ascend convert Qwen/Qwen3-8B out/      quantize and lay out, offline, on any CPU
    qwen3-ascend generate out/ --prompt "..."    run the result
    qwen3-ascend inspect out/                    what is in it
    qwen3-ascend verify out/                     re-hash every byte
    """


@main.command()
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
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is already in OUTPUT.")
@click.option("--dry-run", is_flag=True, help="Print the plan, read headers only, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no report.")
def convert(
    model: str,
    output: Path,
    recipe: str,
    revision: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert MODEL, a folder or a Hub id, into the folder OUTPUT.

    MODEL is a Hugging Face folder (config.json and safetensors) or an id such as Qwen/Qwen3-8B,
    which is downloaded (HF_TOKEN, HF_ENDPOINT and HF_HOME are respected). Linear weights are
    quantized and laid out in FRACTAL_NZ; the tokenizer and configuration travel along. OUTPUT
    appears whole or not at all.

    \b
    qwen3-ascend convert Qwen/Qwen3-8B out/
    qwen3-ascend convert ./my-qwen3 out/ --recipe bf16
    qwen3-ascend convert Qwen/Qwen3-8B out/ --dry-run
    """
    from qwen3_ascend.convert import convert_checkpoint, plan_conversion, report

    note = _silent if quiet else _to_stderr
    if dry_run:
        _, plan = plan_conversion(model, recipe, revision=revision, note=note)
        click.echo(json.dumps(report.plan_json(plan), indent=1) if as_json else _plan_text(plan))
        return
    if as_json:
        raise click.UsageError("--json is for --dry-run; the manifest in OUTPUT is JSON already")
    started = time.perf_counter()
    with _bar("converting", quiet) as bar:

        def begin(plan: Plan) -> None:
            bar.reset(total=plan.source_bytes)

        def advance(name: str, nbytes: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(nbytes)

        manifest = convert_checkpoint(
            model, output, recipe, revision=revision, overwrite=overwrite,
            on_plan=begin, progress=advance, note=note,
        )  # fmt: skip
    if quiet:
        return
    seconds = time.perf_counter() - started
    nbytes = sum(entry.size for entry in manifest.shards.values())
    click.echo(f"{output}: {report.size_text(nbytes)} in {seconds:.1f} s")
    click.echo("\n".join(report.describe_errors(manifest)))
    click.echo(f'next: qwen3-ascend generate {output} --prompt "Hello"')


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", multiple=True, help="What to say; repeat it for a batch.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read the prompt from a file, or from standard input with '-'.",
)
@click.option(
    "--chat/--raw",
    default=True,
    help="Wrap the prompt in the chat template (default), or continue it as it is.",
)
@click.option("--system", help="System message; with --chat.")
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Qwen3's enable_thinking; without either, the chat template decides.",
)
@click.option("--max-new-tokens", type=int, default=512, show_default=True)
@click.option("--temperature", type=float, help="0 takes the most probable token.")
@click.option("--top-k", type=int, help="Keep the k most probable tokens; 0 keeps all.")
@click.option("--top-p", type=float, help="Keep the most probable tokens up to this sum.")
@click.option("--min-p", type=float, help="Drop tokens below this share of the best.")
@click.option("--repetition-penalty", type=float, help="Above 1 discourages repetition.")
@click.option("--presence-penalty", type=float, help="Above 0 discourages repetition.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="A string that ends the answer; repeatable.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32.")
@click.option("--quiet", "-q", is_flag=True, help="Only the answer: no speed, no progress bar.")
def generate(
    checkpoint: Path,
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    thinking: bool | None,
    device: str,
    dtype: str,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Answer a prompt with CHECKPOINT; the text streams to standard output.

    Sampling options that are not given come from the model's generation_config.json. Speed is
    reported on standard error.

    \b
    qwen3-ascend generate out/ --prompt "What is a river?"
    qwen3-ascend generate out/ --raw --prompt "Once upon a time" --temperature 0.8
    qwen3-ascend generate out/ --prompt-file question.txt
    """
    prompts = _prompts(prompt, prompt_file)
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    llm = _load(checkpoint, device, dtype, quiet)
    params = _sampling_params(llm, sampling)
    if chat and llm.tokenizer.chat_template is not None:
        start = [{"role": "system", "content": system}] if system is not None else []
        prompts = [
            llm.render([*start, {"role": "user", "content": text}], enable_thinking=thinking)
            for text in prompts
        ]
    elif system is not None or thinking is not None:
        raise click.UsageError("this checkpoint has no chat template, or --raw was given")
    if len(prompts) == 1:
        _print_stream(llm.stream(prompts[0], params, raw=True), quiet)
    else:
        _print_batch(llm, prompts, params, quiet)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def inspect(checkpoint: Path, as_json: bool) -> None:
    """Show what is in CHECKPOINT: model, source, and what was done to every tensor."""
    from qwen3_ascend.checkpoint.manifest import Manifest
    from qwen3_ascend.convert.report import inspect_lines

    manifest = Manifest.read(checkpoint)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(inspect_lines(manifest)))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--quiet", "-q", is_flag=True, help="No progress bar; only what differs.")
def verify(checkpoint: Path, quiet: bool) -> None:
    """Re-hash every byte of CHECKPOINT and re-derive every shape.

    Exits with 1 and names each tensor or file that differs from the manifest.
    """
    from qwen3_ascend.checkpoint.files import CheckpointReader
    from qwen3_ascend.checkpoint.verify import total_bytes
    from qwen3_ascend.checkpoint.verify import verify as verify_checkpoint

    with _bar("verifying", quiet) as bar:
        bar.reset(total=total_bytes(CheckpointReader(checkpoint).manifest))
        verdict = verify_checkpoint(checkpoint, bar.update)
    for problem in verdict.problems:
        click.echo(f"Error: {problem}", err=True)
    if not verdict.ok:
        sys.exit(1)
    if not quiet:
        click.echo(
            f"{checkpoint}: {verdict.tensors} tensors and {verdict.files} files, "
            f"{verdict.nbytes:,} bytes: all as the manifest says"
        )


def _silent(line: str) -> None:
    """Drops a note."""


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Any]:
    """A progress bar in bytes on standard error; it vanishes when an error ends it."""
    from tqdm import tqdm

    with tqdm(
        desc=what, total=0, unit="B", unit_scale=True, leave=not quiet,
        disable=quiet or not sys.stderr.isatty(), dynamic_ncols=True,
    ) as bar:  # fmt: skip
        yield bar


def _plan_text(plan: Plan) -> str:
    from qwen3_ascend.convert import report

    header = ("tensor", "shape", "scheme", "layout", "bytes")
    lines = report.table([*report.plan_rows(plan)], header)
    lines += ["", *report.plan_totals(plan)]
    return "\n".join(lines)


def _prompts(prompt: tuple[str, ...], prompt_file: Path | None) -> list[str]:
    if bool(prompt) == (prompt_file is not None):
        raise click.UsageError("give either --prompt or --prompt-file")
    if prompt_file is None:
        return list(prompt)
    try:
        data = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
        return [data.decode("utf-8")]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{prompt_file} is not UTF-8 text: {error}") from error


def _load(checkpoint: Path, device: str, dtype: str, quiet: bool) -> LLM:
    from qwen3_ascend.runtime import load

    started = time.perf_counter()
    llm = load(checkpoint, device, dtype)
    if not quiet:
        _to_stderr(f"loaded {checkpoint} in {time.perf_counter() - started:.1f} s")
    return llm


def _sampling_params(llm: LLM, options: dict[str, Any]) -> SamplingParams:
    import dataclasses

    given = {key: value for key, value in options.items() if value is not None}
    return dataclasses.replace(llm.default_params, **given)


def _print_stream(stream: AnswerStream, quiet: bool) -> None:
    started = time.perf_counter()
    first = None
    for piece in stream:
        first = first or time.perf_counter()
        click.echo(piece, nl=False)
    click.echo()
    if quiet:
        return
    ended = time.perf_counter()
    done = stream.completion()
    prompt, output = len(done.prompt_token_ids), len(done.token_ids)
    waited = (first or ended) - started
    line = f"{prompt} prompt tokens, first text after {waited:.2f} s; {output} tokens"
    _to_stderr(f"{line}, {output / (ended - started):.1f} tokens/s ({done.finish_reason})")


def _print_batch(llm: LLM, prompts: list[str], params: SamplingParams, quiet: bool) -> None:
    started = time.perf_counter()
    answers = llm.generate(prompts, params, raw=True)
    for number, answer in enumerate(answers, 1):
        click.echo(f"[{number}] {answer.text}")
    if not quiet:
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.token_ids) for answer in answers)
        _to_stderr(f"{len(answers)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
