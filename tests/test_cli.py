"""The command line does what the Python interface does, and starts without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.command_line import PROGRAM, Run, program, run

from qwen3_ascend import SamplingParams, load, recipes
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.cli.terminal import OneLineErrors
from qwen3_ascend.version import __version__

COMMANDS = ["convert", "generate", "serve", "export", "inspect", "verify"]
QUESTION = "What does river mean?"
OTHER = "What does oxygen mean?"


def answer(folder: Path, prompt: str, *, raw: bool = False, **params: object) -> str:
    llm = load(folder, kv_cache_tokens=1024)
    return llm.generate(prompt, SamplingParams(**params), raw=raw)[0].text  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_needs_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from qwen3_ascend.cli import main\n"
        "main.main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'huggingface_hub', 'tokenizers', 'transformers', 'uvicorn'}\n"
        "print('imported:', heavy & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert done.stdout.endswith("imported: set()\n")


def test_every_command_explains_itself() -> None:
    text = run("--help").out
    for name in COMMANDS:
        assert name in text
        assert "qwen3-ascend" in run(name, "--help").out
    assert all(name in run("convert", "-h").out for name in recipes.names())
    assert __version__ in run("--version").out


def test_convert_inspect_verify_generate(tiny_source: Path, tmp_path: Path) -> None:
    """The first session of a new user, as programs."""
    out = tmp_path / "out"
    done = program("convert", tiny_source, out)
    assert (done.code, done.err) == (0, "")
    assert f"next: qwen3-ascend generate {out}" in done.out
    assert verify(out).ok
    shown = program("inspect", out)
    assert (shown.code, shown.err) == (0, "")
    assert "Qwen3, 4 layers, hidden 256" in shown.out and "recipe w8a8" in shown.out
    checked = program("verify", out)
    assert (checked.code, checked.err) == (0, "")
    said = program("generate", out, "--prompt", QUESTION)
    assert said.code == 0 and "stream of water" in said.out
    assert "tokens/s" in said.err and "loaded" in said.err
    assert "Traceback" not in said.err


def test_inspect_json(tiny_bf16: Path) -> None:
    data = json.loads(run("inspect", tiny_bf16, "--json").out)
    assert data["recipe"]["name"] == "bf16"
    assert len(data["linears"]) == 16


def test_generate_says_what_the_library_says(tiny_w8a8: Path) -> None:
    done = run("generate", tiny_w8a8, "--quiet", "-p", QUESTION, "--max-new-tokens", "20")
    assert (done.code, done.err) == (0, "")
    assert done.out == answer(tiny_w8a8, QUESTION, max_new_tokens=20) + "\n"


def test_several_prompts(tiny_w8a8: Path) -> None:
    options = ["--quiet", "--max-new-tokens", "8"]
    done = run("generate", tiny_w8a8, *options, "-p", QUESTION, "-p", OTHER)
    expected = [answer(tiny_w8a8, prompt, max_new_tokens=8) for prompt in (QUESTION, OTHER)]
    assert done.out == f"[1] {expected[0]}\n[2] {expected[1]}\n"
    loud = run("generate", tiny_w8a8, *options[1:], "-p", QUESTION, "-p", OTHER)
    assert loud.out == done.out and "2 answers" in loud.err


def test_several_answers_with_log_probabilities(tiny_w8a8: Path) -> None:
    options = ["--temperature", "1", "--seed", "1", "--max-new-tokens", "3", "--n", "2", "-q"]
    done = run("generate", tiny_w8a8, *options, "-p", QUESTION, "--logprobs", "2")
    assert done.code == 0, done.err
    params = SamplingParams(temperature=1.0, seed=1, max_new_tokens=3, n=2, logprobs=2)
    llm = load(tiny_w8a8, kv_cache_tokens=1024)
    answers = llm.generate(QUESTION, params)
    lines = done.out.splitlines()
    assert len(lines) == 2 * (1 + 3)
    for number, answer in enumerate(answers):
        first, *rest = lines[4 * number : 4 * number + 4]
        assert first == f"[{number + 1}] {answer.text}"
        for line, token, found in zip(rest, answer.token_ids, answer.logprobs or (), strict=True):
            chosen, shown, *_ = line.split()
            assert float(chosen) == pytest.approx(found.chosen, abs=1e-4) and int(shown) == token
            assert line.endswith(f"{found.top[-1][1]:.4f}")


def test_options_of_the_engine(tiny_w8a8: Path) -> None:
    """They reach the engine: a cache that is too small refuses, whatever sizes give equal text."""
    question: list[str | Path] = [
        "generate",
        tiny_w8a8,
        "--quiet",
        "-p",
        QUESTION,
        "--max-new-tokens",
        "8",
    ]
    small = ["--block-size", "16", "--kv-cache-tokens", "16"]
    run(*question, *small).one_line_error("kv_cache_tokens")
    sizes = ["--step-tokens", "5", "--max-batch", "1", "--no-prefix-cache", "--block-size", "16"]
    assert run(*question, *sizes).out == run(*question).out


def test_prompt_from_a_file_and_from_standard_input(tiny_w8a8: Path, tmp_path: Path) -> None:
    options: list[str | Path] = [
        "generate",
        tiny_w8a8,
        "--quiet",
        "--max-new-tokens",
        "8",
        "--prompt-file",
    ]
    expected = answer(tiny_w8a8, QUESTION, max_new_tokens=8) + "\n"
    (tmp_path / "question.txt").write_text(QUESTION)
    assert run(*options, tmp_path / "question.txt").out == expected
    assert program(*options, "-", stdin=QUESTION.encode()).out == expected
    program(*options, "-", stdin=b"\xff").one_line_error("UTF-8")


def test_raw_and_chat(tiny_w8a8: Path) -> None:
    options = ["--quiet", "--max-new-tokens", "8"]
    raw = run("generate", tiny_w8a8, *options, "--raw", "-p", QUESTION)
    assert raw.out == answer(tiny_w8a8, QUESTION, raw=True, max_new_tokens=8) + "\n"
    llm = load(tiny_w8a8, kv_cache_tokens=1024)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    expected = llm.chat(messages, SamplingParams(max_new_tokens=8), enable_thinking=True).text
    options += ["--system", "Be brief.", "--thinking"]
    assert run("generate", tiny_w8a8, *options, "-p", QUESTION).out == expected + "\n"


def test_stop(tiny_w8a8: Path) -> None:
    whole = answer(tiny_w8a8, QUESTION)
    options = ["--quiet", "--stop", "never said", "--stop", "of water"]
    done = run("generate", tiny_w8a8, *options, "-p", QUESTION)
    assert done.out == whole[: whole.index("of water")] + "\n"


def test_a_seed_repeats(tiny_w8a8: Path) -> None:
    """In another process too."""

    def sample(start: Callable[..., Run], seed: int) -> str:
        options = ["--temperature", "3", "--seed", str(seed), "--max-new-tokens", "16"]
        return start("generate", tiny_w8a8, "--quiet", "-p", QUESTION, *options).out

    first = sample(program, 1)
    assert first == sample(run, 1)
    assert first != sample(run, 2)
    expected = answer(tiny_w8a8, QUESTION, temperature=3.0, seed=1, max_new_tokens=16)
    assert first == expected + "\n"


def test_text_streams(tiny_w8a8: Path) -> None:
    """The first words are there before the last are computed: the program waits for its reader."""
    command = [*PROGRAM, "generate", str(tiny_w8a8), "--quiet", "--raw", "--temperature", "0.8",
               "--prompt", "a", "--max-new-tokens", "900", "--ignore-eos"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.read(1)
        assert process.poll() is None, "everything came at once"
        process.stdout.close()  # as `| head` does
        assert process.wait(timeout=120) != 0
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_dtype(tiny_bf16: Path) -> None:
    options = ["--quiet", "--max-new-tokens", "8", "--dtype", "float32", "--device", "cpu"]
    done = run("generate", tiny_bf16, *options, "-p", QUESTION)
    llm = load(tiny_bf16, "cpu", "float32", kv_cache_tokens=1024)
    assert done.out == llm.generate(QUESTION, SamplingParams(max_new_tokens=8))[0].text + "\n"


def test_a_warning_is_one_line_without_our_code() -> None:
    @click.group(cls=OneLineErrors)
    def group() -> None:
        """Warns."""

    @group.command()
    def warn() -> None:
        warnings.warn("half of it\nis gone", stacklevel=1)

    done = CliRunner().invoke(group, ["warn"])
    assert done.exit_code == 0 and done.stderr == "Warning: half of it is gone\n"
