"""`qwen3-ascend generate`."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen3_ascend.cli.options import UserPath, given, options_of
from qwen3_ascend.cli.terminal import step_bar, to_stderr
from qwen3_ascend.errors import OptionError, os_errors
from qwen3_ascend.options import share
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions

if TYPE_CHECKING:
    from qwen3_ascend.runtime import LLM, AnswerStream


@click.command()
@click.argument("checkpoint", type=UserPath())
@click.option("--prompt", "-p", multiple=True, help="What to say; repeat it for a batch.")
@click.option(
    "--prompt-file",
    type=UserPath(allow_dash=True),
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
@options_of(SamplingParams, EngineOptions, DeviceOptions)
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Re-hash every tensor while loading (default), or not.",
)
@click.option("--quiet", "-q", is_flag=True, help="Only the answer: no speed, no progress bar.")
def generate(
    checkpoint: Path,
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    thinking: bool | None,
    verify: bool,
    quiet: bool,
    **values: Any,
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
    sampling, *for_load = share(given(values), SamplingParams, EngineOptions, DeviceOptions)
    SamplingParams(**sampling)  # refuses what it does not take before the model is loaded
    llm, loaded = _load(checkpoint, verify, quiet, *for_load)
    params = dataclasses.replace(llm.default_params, **sampling)
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


def _prompts(prompt: tuple[str, ...], prompt_file: Path | None) -> list[str]:
    if bool(prompt) == (prompt_file is not None):
        raise click.UsageError("give either --prompt or --prompt-file")
    if prompt_file is None:
        return list(prompt)
    with os_errors(OptionError):
        data = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
    try:
        return [data.decode("utf-8")]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{prompt_file} is not UTF-8 text: {error}") from error


def _load(
    checkpoint: Path, verify: bool, quiet: bool, engine: dict[str, Any], device: dict[str, Any]
) -> tuple[LLM, str]:
    """The model, and a line about it that is not shown before the request is accepted."""
    from qwen3_ascend.runtime import load

    started = time.perf_counter()
    with step_bar(quiet) as show:
        llm = load(checkpoint, verify=verify, progress=show, **engine, **device)
    return llm, f"loaded {checkpoint} in {time.perf_counter() - started:.1f} s"


def _print_stream(stream: AnswerStream, loaded: str, quiet: bool) -> None:
    if not quiet:
        to_stderr(loaded)
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
    to_stderr(f"{line}, {output / (ended - started):.1f} tokens/s ({done.finish_reason})")


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
        to_stderr(loaded)
        to_stderr(f"{len(answers)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s")
