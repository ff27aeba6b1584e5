"""Starts engines of other people's making, each in its own environment, and reads their answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

TESTS = Path(__file__).parents[1]
START_SECONDS = 300
"""For an engine to start on a busy machine."""

RUN_SECONDS = 400
"""For an engine to start, answer and end."""


@dataclass(frozen=True)
class Answer:
    """What an engine made of one prompt; log-probabilities begin with the second prompt token."""

    prompt: tuple[int, ...]
    prompt_logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """One run of an engine.

    Attributes:
        answers: of the prompts, in order.
        loading: for each rank what loading cost, on the simulated device only.
        data: all that was written.
        folder: where, and the engine's `log`.
    """

    answers: tuple[Answer, ...]
    loading: tuple[Mapping[str, Any], ...]
    data: Mapping[str, Any]
    folder: Path

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """Those of every answer."""
        return [answer.tokens for answer in self.answers]


@dataclass(frozen=True)
class Engines:
    """Where the environments are, and a folder for what engines write."""

    vllm_cpu: Path
    vllm_ascend: Path
    clients: Path
    sglang: Path
    plugin: Path
    folder: Path
    reports: dict[str, Report] = field(default_factory=dict)

    def on_cpu(
        self,
        model: Path | str,
        prompts: Sequence[Any],
        tokens: int = 48,
        variables: Mapping[str, str] = MappingProxyType({}),
        **engine: Any,
    ) -> Report:
        """vLLM's CPU backend, with variables added to its environment; a run that was made before
        is not made again."""
        return self._once(
            f"cpu {model} {len(prompts)} {tokens} {variables} {engine}",
            lambda place: self._run_cpu(place, model, prompts, tokens, variables, engine),
        )

    def on_ascend(
        self,
        model: Path,
        prompts: Sequence[Any],
        tokens: int = 24,
        graphs: bool = False,
        **engine: Any,
    ) -> Report:
        """vllm-ascend on the simulated device; the same."""
        return self._once(
            f"ascend {model} {len(prompts)} {tokens} {graphs} {engine}",
            lambda place: self._run_ascend(place, model, prompts, tokens, graphs, engine),
        )

    def on_sglang(self, model: Path, prompts: Sequence[Any], tokens: int = 24) -> Report:
        """SGLang on the simulated device; the same."""
        return self._once(
            f"sglang {model} {len(prompts)} {tokens}",
            lambda place: self._run_sglang(place, model, prompts, tokens),
        )

    def _once(self, key: str, run: Any) -> Report:
        if key not in self.reports:
            place = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
            self.reports[key] = run(place)
        return self.reports[key]

    def _run_cpu(
        self,
        place: Path,
        model: Path | str,
        prompts: Sequence[Any],
        tokens: int,
        variables: Mapping[str, str],
        engine: dict[str, Any],
    ) -> Report:
        asked = _written(place, prompts)
        command: list[object] = [self.vllm_cpu / "bin/python", "-m", "handover.run_vllm_cpu", model]
        command += [place / "answers.json", "--prompts", asked, "--tokens", tokens]
        environment = {**self.environment(), **variables}
        _run([*command, "--engine", json.dumps(engine)], environment, place)
        return _report(place)

    def _run_ascend(
        self,
        place: Path,
        model: Path,
        prompts: Sequence[Any],
        tokens: int,
        graphs: bool,
        engine: dict[str, Any],
    ) -> Report:
        asked = _written(place, prompts)
        runner = TESTS / "handover/run_vllm_ascend.py"
        command: list[object] = [self.vllm_ascend / "bin/python", runner, model, place]
        command += ["--prompts", asked, "--tokens", tokens, "--engine", json.dumps(engine)]
        command += ["--prompt-logprobs", *(["--graphs"] if graphs else [])]
        _run(command, self.environment(), place)
        return _report(place)

    def _run_sglang(self, place: Path, model: Path, prompts: Sequence[Any], tokens: int) -> Report:
        asked = _written(place, prompts)
        runner = TESTS / "handover/run_sglang.py"
        options = ["--prompts", asked, "--tokens", tokens]
        command = [self.sglang / "bin/python", runner, model, place, *options]
        _run(command, self.environment(), place)
        return _report(place)

    def environment(self) -> dict[str, str]:
        """For an engine's process: it finds the plugin, the tests and nothing else of ours."""
        paths = ":".join(map(str, (self.plugin, TESTS)))
        # With CI set, torch refuses a custom operator of vllm-ascend that it only warns of else.
        dropped = ("PYTHONPATH", "OMP_NUM_THREADS", "PYTHONHOME", "VIRTUAL_ENV", "CI")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return {**kept, "PYTHONPATH": paths}

    def serve_command(self, model: Path | str, port: int, *options: str) -> list[str]:
        """`vllm serve` of vLLM's CPU backend: the same entry as the command's, whose launcher asks
        for a distribution named vllm, which vllm-cpu is not."""
        python = str(self.vllm_cpu / "bin/python")
        command = [python, "-m", "handover.vllm_command", "serve", str(model)]
        fixed = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
        return [*command, *fixed, "--enforce-eager", *options]

    def server_environment(self) -> dict[str, str]:
        """For a server of vLLM's CPU backend."""
        from handover.run_vllm_cpu import ENVIRONMENT

        return {**self.environment(), **ENVIRONMENT}

    @contextmanager
    def serving(self, model: Path | str, *options: str) -> Iterator[str]:
        """A running `vllm serve`; gives its URL."""
        port = free_port()
        log = self.folder / f"serve-{port}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                self.serve_command(model, port, *options),
                env=self.server_environment(), stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
            try:
                url = f"http://127.0.0.1:{port}"
                _wait_for(f"{url}/health", process, log)
                yield url
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer in {START_SECONDS} s: {log.read_text()[-4000:]}")


def _written(place: Path, prompts: Sequence[Any]) -> Path:
    file = place / "prompts.json"
    file.write_text(json.dumps(prompts))
    return file


def _run(command: Sequence[object], environment: Mapping[str, str], place: Path) -> None:
    log = place / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:  # its workers too
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    assert code == 0, f"{command}, whose log is {log}:\n{log.read_text()[-6000:]}"


def _report(place: Path) -> Report:
    data = json.loads((place / "answers.json").read_text())
    answers = tuple(
        Answer(*(tuple(found[name]) for name in Answer.__dataclass_fields__))
        for found in data["answers"]
    )
    loading = tuple(json.loads(file.read_text()) for file in sorted(place.glob("loading-*.json")))
    return Report(answers, loading, data, place)
