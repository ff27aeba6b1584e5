"""The command line. Each command is one call; heavy imports stay inside it, so that --help is
instant."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen3_ascend import recipes
from qwen3_ascend.checkpoint.errors import UserError
from qwen3_ascend.interruption import Stopped, stoppable
from qwen3_ascend.version import __version__

if TYPE_CHECKING:
    from qwen3_ascend.convert.plan import Plan
    from qwen3_ascend.runtime import LLM, AnswerStream
    from qwen3_ascend.runtime.sequence import SamplingParams

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

LONGEST_ERROR = 2000
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class OneLineErrors(click.Group):
    """Prints what a user can mend as one line and exits with 1; anything else is a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Group."""
        try:
            with stoppable():
                return super().invoke(ctx)
        except Stopped as stop:
            click.echo(f"Error: {stop}", err=True)
            sys.exit(stop.exit_code)
        except UserError as error:
            raise click.ClickException(_printable(error)) from error
        except click.UsageError as error:
            raise _one_line(error) from error
        except BrokenPipeError:  # the reader of our output is gone: | head
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from error


def size(text: str) -> int:
    """Bytes of a size such as 512MiB or 2G; the units are powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a size such as 512MiB or 2G")
    return int(float(found[1]) * 2 ** UNITS[found[2].upper()])


@click.group(cls=OneLineErrors, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="qwen3-ascend")
def main() -> None:
    """Take Qwen3 from the Hub to an Ascend NPU.

    \b
    qwen3-ascend convert Qwen/Qwen3-8B out/      quantize and lay out, offline, on any CPU
    qwen3-ascend generate out/ --prompt "..."    run the result
    qwen3-ascend inspect out/                    what is in it
    qwen3-ascend verify out/                     re-hash every byte
    qwen3-ascend doctor                          check this machine's NPU
    """
    # torch would import torch_npu by itself and fail with a traceback where CANN is not set up;
    # the NPU backend imports it when it is asked for, and says what is missing.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


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
    from qwen3_ascend.convert.download import Transfer

    note = _silent if quiet else _to_stderr
    if dry_run:
        source, plan = plan_conversion(
            model, recipe, revision=revision, hub=hub,
            low_disk_output=output if low_disk else None, transfer=Transfer(note, retries=retries),
        )  # fmt: skip
        disk = preflight.disk_needs(plan, source, output)
        if as_json:
            needs = {"disk": {need.what: need.nbytes for need in disk}}
            click.echo(json.dumps(report.plan_json(plan) | needs, indent=1))
        else:
            click.echo(f"{_plan_text(plan)}\n{preflight.describe_disk(disk)}")
        return
    if as_json:
        raise click.UsageError("--json is for --dry-run; the manifest in OUTPUT is JSON already")
    started = time.perf_counter()
    with (
        stoppable(lambda: _kept(output)),
        _bar("downloading", quiet or Path(model).is_dir(), None) as downloads,
        _bar("converting", quiet) as bar,
    ):

        def begin(plan: Plan) -> None:
            bar.reset(total=plan.source_bytes)

        def advance(name: str, nbytes: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(nbytes)

        manifest = convert_checkpoint(
            model, output, recipe, revision=revision, overwrite=overwrite, restart=restart,
            max_memory=max_memory, threads=threads, hub=hub, low_disk=low_disk, retries=retries,
            on_plan=begin, progress=advance, arrived=downloads.update, note=note,
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
@click.option("--device", default="auto", show_default=True, help="auto, npu or cpu.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32.")
@click.option(
    "--attention", default="auto", show_default=True, help="NPU: fused, paged (ATB) or auto."
)
@click.option(
    "--graph",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="NPU: capture decode steps once and replay them.",
)
@click.option("--buckets", metavar="N,N,...", help="NPU: batch sizes to capture.")
@click.option(
    "--prefetch",
    default="auto",
    show_default=True,
    metavar="off|auto|BYTES",
    help="NPU: MLP weights to fetch ahead into L2, such as 64M.",
)
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
    attention: str,
    graph: str,
    buckets: str | None,
    prefetch: str,
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
    llm, loaded = _load(
        checkpoint, quiet, device=device, dtype=dtype, attention=attention,
        graph=graph == "on", buckets=_numbers(buckets), prefetch=prefetch,
    )  # fmt: skip
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
        _print_stream(llm.stream(prompts[0], params, raw=True), loaded, quiet)
    else:
        _print_batch(llm, prompts, params, loaded, quiet)


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
@click.option(
    "--against",
    metavar="MODEL",
    help="Also compare with the model it was made of, and measure every error again.",
)
@click.option("--threads", type=click.IntRange(1), help="Default: one for each processor.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar; only what differs.")
def verify(checkpoint: Path, against: str | None, threads: int | None, quiet: bool) -> None:
    """Re-hash every byte of CHECKPOINT and re-derive every shape.

    Exits with 1 and names each tensor or file that differs from the manifest. With --against
    MODEL, a folder or a Hub id as for convert, also each that differs from the model.

    \b
    qwen3-ascend verify out/
    qwen3-ascend verify out/ --against Qwen/Qwen3-8B
    """
    from qwen3_ascend.checkpoint.manifest import Manifest
    from qwen3_ascend.checkpoint.verify import total_bytes
    from qwen3_ascend.checkpoint.verify import verify as verify_checkpoint

    with _bar("verifying", quiet) as bar:
        bar.reset(total=total_bytes(Manifest.read(checkpoint)))
        verdict = verify_checkpoint(checkpoint, bar.update, threads)
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


def _compare(checkpoint: Path, model: str, threads: int | None, quiet: bool) -> list[str]:
    """What differs between a checkpoint and a model."""
    from qwen3_ascend.checkpoint.files import CheckpointReader
    from qwen3_ascend.convert.against import compare
    from qwen3_ascend.convert.download import Transfer
    from qwen3_ascend.convert.source import open_source

    reader = CheckpointReader(checkpoint)
    stored = reader.manifest.stored().values()
    revision = None if Path(model).expanduser().is_dir() else reader.manifest.source.revision
    transfer = Transfer(_silent if quiet else _to_stderr)
    with open_source(model, revision, transfer=transfer) as source, _bar("comparing", quiet) as bar:
        bar.reset(total=sum(tensor.nbytes for tensor in stored))
        return compare(reader, source, bar.update, threads)


@main.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def doctor(checkpoint: Path | None, json_path: Path | None) -> None:
    """Check this machine's NPU: environment, layouts, every operator, graphs, prefetch.

    Runs in about a minute what this project could only prove on a simulated device. Without
    CHECKPOINT a small random model is used. On a machine without a card it says what is missing.
    Exits with 1 if anything failed; please attach the --json report to an issue.

    \b
    qwen3-ascend doctor
    qwen3-ascend doctor out/ --json report.json
    """
    from qwen3_ascend.runtime import doctor as examination

    def show(check: examination.Check) -> None:
        detail = f"  ({check.detail})" if check.detail else ""
        click.echo(f"{check.status:8}{check.area:12}{check.name}{detail}")

    report = examination.run(checkpoint, show)
    click.echo()
    for name, fact in report.environment.items():
        click.echo(f"{name:28}{fact}")
    if json_path is not None:
        json_path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    failed = [check for check in report.checks if check.status == "failed"]
    click.echo(f"\n{len(report.checks)} checks, {len(failed)} failed")
    if not report.ok:
        sys.exit(1)


def _one_line(error: click.UsageError) -> click.ClickException:
    """A usage error without the usage that click prints above it."""
    message = " ".join(error.format_message().split())
    command = error.ctx.command_path if error.ctx else "qwen3-ascend"
    short = click.ClickException(f"{message} (see: {command} --help)")
    short.exit_code = error.exit_code  # type: ignore[misc]  # click declares a class variable
    return short


def _kept(output: Path) -> str:
    """What becomes of an interrupted conversion."""
    from qwen3_ascend.checkpoint.files import STAGING

    kept = (output / STAGING).is_dir()
    return "; what is done is kept, the same command continues" if kept else ""


def _printable(error: UserError) -> str:
    """One line of bounded length; names in it may come from a source that nobody vouches for."""
    line = " ".join(str(error).split())[:LONGEST_ERROR]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _silent(line: str) -> None:
    """Drops a note."""


def _to_stderr(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the bars, if there are any


@contextmanager
def _bar(what: str, quiet: bool, total: int | None = 0) -> Iterator[Any]:
    """A progress bar in bytes on standard error, from the first bytes on."""
    from tqdm import tqdm

    with tqdm(
        desc=what, total=total, unit="B", unit_scale=True, leave=not quiet, delay=0.01,
        disable=quiet or not sys.stderr.isatty(), dynamic_ncols=True,
    ) as bar:  # fmt: skip
        yield bar


@contextmanager
def _steps(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar that starts anew for each kind of work: layers, then graphs."""
    from tqdm import tqdm

    bar = tqdm(disable=quiet or not sys.stderr.isatty(), leave=False, dynamic_ncols=True)

    def show(what: str, done: int, total: int) -> None:
        if done == 1:
            bar.reset(total=total)
            bar.set_description(what)
        bar.update(1)

    with bar:
        yield show


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


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--buckets is {text!r}; give numbers such as 1,2,4") from None


def _load(checkpoint: Path, quiet: bool, **options: Any) -> tuple[LLM, str]:
    """The model, and a line about it that is not shown before the request is accepted."""
    from qwen3_ascend.runtime import load

    started = time.perf_counter()
    with _steps(quiet) as show:
        llm = load(checkpoint, progress=show, **options)
    return llm, f"loaded {checkpoint} in {time.perf_counter() - started:.1f} s"


def _sampling_params(llm: LLM, options: dict[str, Any]) -> SamplingParams:
    import dataclasses

    given = {key: value for key, value in options.items() if value is not None}
    return dataclasses.replace(llm.default_params, **given)


def _print_stream(stream: AnswerStream, loaded: str, quiet: bool) -> None:
    if not quiet:
        _to_stderr(loaded)
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


def _print_batch(
    llm: LLM, prompts: list[str], params: SamplingParams, loaded: str, quiet: bool
) -> None:
    started = time.perf_counter()
    answers = llm.generate(prompts, params, raw=True)
    for number, answer in enumerate(answers, 1):
        click.echo(f"[{number}] {answer.text}")
    if not quiet:
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.token_ids) for answer in answers)
        _to_stderr(loaded)
        _to_stderr(f"{len(answers)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
