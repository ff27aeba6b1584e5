"""`qwen3-ascend generate`."""

from __future__ import annotations

import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen3_ascend.cli.environment import nothing_is_garbage
from qwen3_ascend.cli.options import UserPath, given, options_of
from qwen3_ascend.cli.terminal import step_bar, to_stderr
from qwen3_ascend.errors import OptionError, os_errors
from qwen3_ascend.options import share
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions

if TYPE_CHECKING:
    from qwen3_ascend.runtime import LLM, AnswerStream, Completion


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
    default=None,
    help="Wrap the prompt in the chat template, or continue it as it is; without either, the "
    "template is used if there is one.",
)
@click.option("--system", help="System message; with --chat.")
@click.option(
    "--chat-template",
    "template_file",
    type=UserPath(),
    metavar="FILE",
    help="Take the chat template of this file (Jinja) instead of the checkpoint's own.",
)
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Qwen3's enable_thinking; without either, the chat template decides.",
)
@options_of(SamplingParams, EngineOptions, DeviceOptions)
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Hash every tensor (default), or believe the files. A CPU hashes beside the work, and "
    "ends no answer before all is hashed; an NPU before it copies.",
)
@click.option("--quiet", "-q", is_flag=True, help="Only the answer: no speed, no progress bar.")
def generate(
    checkpoint: Path,
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    chat: bool | None,
    system: str | None,
    template_file: Path | None,
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
    conversing = any(one is not None for one in (system, thinking, template_file))
    if conversing and chat is False:
        raise click.UsageError(
            "--system, --[no-]thinking and --chat-template need a chat template: leave --raw out"
        )
    template = {} if template_file is None else {"chat_template": _text(template_file)}
    sampling, *for_load = share(given(values), SamplingParams, EngineOptions, DeviceOptions)
    SamplingParams(**sampling)  # refuses what it does not take before the model is loaded
    llm, loaded = load_shown(checkpoint, verify, quiet, *for_load)
    params = dataclasses.replace(llm.default_params, **sampling)
    if chat or conversing or (chat is None and llm.tokenizer.has_chat_template):
        tokens = _conversations(llm, prompts, system, thinking, template)
    else:
        tokens = [llm.encode(text, raw=True) for text in prompts]
    if len(tokens) == params.n == 1:
        _print_stream(llm, llm.stream(tokens[0], params), loaded, quiet)
    else:
        _print_batch(llm, tokens, params, loaded, quiet)


def _conversations(
    llm: LLM,
    prompts: list[str],
    system: str | None,
    thinking: bool | None,
    template: dict[str, str],
) -> list[list[int]]:
    """Token ids of a conversation for each prompt, which is the user's first turn in it."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return [
        llm.encode_messages(
            [*start, {"role": "user", "content": text}], enable_thinking=thinking, **template
        )
        for text in prompts
    ]


def _prompts(prompt: tuple[str, ...], prompt_file: Path | None) -> list[str]:
    if bool(prompt) == (prompt_file is not None):
        raise click.UsageError("give either --prompt or --prompt-file")
    return list(prompt) if prompt_file is None else [_text(prompt_file)]


def _text(path: Path) -> str:
    """The text of a file, or of standard input."""
    with os_errors(OptionError):
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not UTF-8 text: {error}") from error


def load_shown(
    checkpoint: Path, verify: bool, quiet: bool, engine: dict[str, Any], device: dict[str, Any]
) -> tuple[LLM, str]:
    """The model, and a line about it that is not shown before the request is accepted."""
    from qwen3_ascend.runtime.tokenizer import quick_tokenizer, transformers_tokenizer

    # A vocabulary of Qwen takes a fourth of the time in which torch is imported: beside it, none.
    with nothing_is_garbage(), ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(quick_tokenizer, checkpoint)
        from qwen3_ascend.runtime import load
    started = time.perf_counter()
    with step_bar(quiet) as show, nothing_is_garbage():
        llm = load(
            checkpoint, verify=verify, progress=show, **engine, **device,
            read_tokenizer=lambda folder: tokenizer.result() or transformers_tokenizer(folder),
        )  # fmt: skip
    return llm, f"loaded {checkpoint} in {time.perf_counter() - started:.1f} s"


def _print_stream(llm: LLM, stream: AnswerStream, loaded: str, quiet: bool) -> None:
    if not quiet:
        to_stderr(loaded)
    started = time.perf_counter()
    first = None
    for piece in stream:
        first = first or time.perf_counter()
        click.echo(piece, nl=False)
    click.echo()
    ended, done = time.perf_counter(), stream.completion()
    _print_logprobs(llm, done)
    if quiet:
        return
    prompt, output = len(done.prompt_token_ids), len(done.token_ids)
    waited = (first or ended) - started
    line = f"{prompt} prompt tokens, first text after {waited:.2f} s; {output} tokens"
    to_stderr(f"{line}, {output / (ended - started):.1f} tokens/s ({done.finish_reason})")


def _print_logprobs(llm: LLM, answer: Completion) -> None:
    """A line for each generated token, if --logprobs has asked for them."""
    for token, found in zip(answer.token_ids, answer.logprobs or (), strict=False):
        best = "  ".join(f"{llm.tokenizer.decode([t])!r} {log:.4f}" for t, log in found.top)
        click.echo(
            f"{found.chosen:9.4f}  {token:6}  {llm.tokenizer.decode([token])!r}  {best}".rstrip()
        )


def _print_batch(
    llm: LLM, prompts: list[list[int]], params: SamplingParams, loaded: str, quiet: bool
) -> None:
    started = time.perf_counter()
    answers = llm.generate(prompts, params)
    for number, answer in enumerate(answers, 1):
        click.echo(f"[{number}] {answer.text}")
        _print_logprobs(llm, answer)
    if not quiet:
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.token_ids) for answer in answers)
        to_stderr(loaded)
        to_stderr(f"{len(answers)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s")
