"""`qwen3-ascend generate`."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen3_ascend.cli.terminal import step_bar, to_stderr

if TYPE_CHECKING:
    from qwen3_ascend.runtime import LLM, AnswerStream
    from qwen3_ascend.runtime.engine.request import SamplingParams


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", multiple=True, help="What to say; repeat it for a batch.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
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
    chat: bool | None,
    system: str | None,
    thinking: bool | None,
    device: str,
    dtype: str,
    attention: str,
    graph: str,
    buckets: str | None,
    prefetch: str,
    verify: bool,
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
    conversing = system is not None or thinking is not None
    if conversing and chat is False:
        raise click.UsageError(
            "--system and --[no-]thinking need the chat template: leave --raw out"
        )
    llm, loaded = _load(
        checkpoint, quiet, device=device, dtype=dtype, attention=attention,
        graph=graph == "on", buckets=_numbers(buckets), prefetch=prefetch,
        verify=verify,
    )  # fmt: skip
    params = _sampling_params(llm, sampling)
    if chat or conversing or (chat is None and llm.tokenizer.has_chat_template):
        tokens = _conversations(llm, prompts, system, thinking)
    else:
        tokens = [llm.encode(text, raw=True) for text in prompts]
    if len(tokens) == 1:
        _print_stream(llm.stream(tokens[0], params), loaded, quiet)
    else:
        _print_batch(llm, tokens, params, loaded, quiet)


def _conversations(
    llm: LLM, prompts: list[str], system: str | None, thinking: bool | None
) -> list[list[int]]:
    """Token ids of a conversation for each prompt, which is the user's first turn in it."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return [
        llm.encode_messages([*start, {"role": "user", "content": text}], enable_thinking=thinking)
        for text in prompts
    ]


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
    with step_bar(quiet) as show:
        llm = load(checkpoint, progress=show, **options)
    return llm, f"loaded {checkpoint} in {time.perf_counter() - started:.1f} s"


def _sampling_params(llm: LLM, options: dict[str, Any]) -> SamplingParams:
    given = {key: value for key, value in options.items() if value is not None}
    return dataclasses.replace(llm.default_params, **given)


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
    llm: LLM, prompts: list[list[int]], params: SamplingParams, loaded: str, quiet: bool
) -> None:
    started = time.perf_counter()
    answers = llm.generate(prompts, params)
    for number, answer in enumerate(answers, 1):
        click.echo(f"[{number}] {answer.text}")
    if not quiet:
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.token_ids) for answer in answers)
        to_stderr(loaded)
        to_stderr(f"{len(answers)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s")
