"""GPTQ of Qwen3-0.6B's shapes: time and memory, ours against llm-compressor's.

    python benchmarks/gptq.py                         one layer, 8192 tokens, int4 in groups of 128
    python benchmarks/gptq.py --model 8b --tokens 16384
    python benchmarks/gptq.py --whole --layers 6 --tokens 2048 --repeat 1
                                                      a model of six layers, from folder to folder

Of a layer, both sides get the same weights (bfloat16, normal) and the same inputs of the four
fused linears: correlated, with channels of very different sizes, as a model's are. Each reads them
from mapped files in a process of its own, gathers the Hessians in steps of 1024 tokens, and
quantizes all linears: llm-compressor by its GPTQModifier with its defaults (groups fixed, inputs in
the order of the Hessian's diagonal, scales of the widest weights), driven as its pipeline does; we
as a conversion does, with scales that are searched for. Neither packs or writes anything.

Of a whole model, both read a folder with random weights, calibrate with random tokens in windows of
512, layer by layer, and write what their engines load: llm-compressor by its oneshot, we by
convert_checkpoint. The two run in turn, --repeat times, and the fastest of each counts, because
other work on the machine only ever adds; the seconds of processors tell more on a busy one.

A layer of 2048 tokens has taken llm-compressor 48 seconds of processors, most of them whatever the
tokens: choose --layers by the time that there is.

Private memory is what no file backs (RssAnon), beyond what the process had with everything
imported: weights that are read from a mapped file do not count, on either side. The error
is that of the products, tr(dW H dW') / tr(W H W'), over the whole layer: what GPTQ makes small.

The peer's environment is made by `make peer-llm-compressor` if it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import random_model
import torch
from peers.environments import ROOT, environment
from process_memory import PRIVATE, status
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from qwen3_ascend.convert.statistics import InputStatistics
    from qwen3_ascend.convert.weights import Weights

STEP = 1024
WINDOW = 512
GROUP = 128

Linears = dict[str, tuple[int, tuple[int, ...]]]
"""Name of each fused linear: its inputs, and the outputs of its parts."""


@dataclass(frozen=True)
class Figures:
    """Of one process: seconds of its two parts, and of processors at work; bytes of memory."""

    hessians: float
    quantizing: float
    cpu: float
    memory: int

    @property
    def seconds(self) -> float:
        """Of both parts."""
        return self.hessians + self.quantizing


def linears(model: str) -> Linears:
    """The fused linears of a decoder layer."""
    data = random_model.config(model)
    hidden, inner, head = data["hidden_size"], data["intermediate_size"], data["head_dim"]
    query, value = (data[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    return {
        "qkv": (hidden, (query, value, value)),
        "o": (query, (hidden,)),
        "gate_up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }


def make_data(shapes: Linears, tokens: int, folder: Path) -> None:
    """Weights and inputs of a layer, in two files."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs, weights = {}, {}
    for name, (width, parts) in shapes.items():
        mixed = draw(tokens, width // 8) @ draw(width // 8, width) * (8 / width) ** 0.5
        sizes = (draw(width) * 1.2).exp() * 0.3
        inputs[name] = ((mixed + 0.5 * draw(tokens, width)) * sizes).bfloat16()
        for number, rows in enumerate(parts):
            weights[f"{name}.{number}"] = (0.02 * draw(rows, width)).bfloat16()
    save_file(inputs, folder / "inputs.safetensors")
    save_file(weights, folder / "weights.safetensors")


class Watch:
    """The private memory of this process, beyond what it has when this is made."""

    def __init__(self) -> None:
        self.peak = self._base = self._private()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> int:
        """The most that there was."""
        self._ended.set()
        self._thread.join()
        return self.peak - self._base

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, self._private())

    @staticmethod
    def _private() -> int:
        return status(os.getpid())[PRIVATE]


class Side(Protocol):
    """One of the two. Made with everything imported, and with nothing done."""

    def gather(self) -> None:
        """Gathers the Hessians."""

    def quantize(self) -> None:
        """Quantizes all linears."""

    def results(self) -> dict[str, Tensor]:
        """The weight of each part that the codes stand for."""


class Ours:
    """As a conversion does: a linear for each thread."""

    def __init__(self, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        from qwen3_ascend import native
        from qwen3_ascend.checkpoint.schemes import Input
        from qwen3_ascend.checkpoint.schemes.grid import Grid
        from qwen3_ascend.checkpoint.schemes.pieces import Stack
        from qwen3_ascend.convert.calibration.recording import Recorder
        from qwen3_ascend.convert.quantizers import Gptq
        from qwen3_ascend.convert.weights import ChosenWeights, QuantizedWeights
        from qwen3_ascend.files.threads import available_threads, run_all

        self._grid, self._kernels = Grid(4, GROUP, signed_scale=True), native.best()
        self._recorder = partial(Recorder, True, Input.FLOAT)
        self._run = partial(run_all, threads=available_threads())
        self._gptq, self._inputs, self._names = Gptq(), inputs, [*weights]
        self._weights = {
            name: ChosenWeights(Stack(tuple(weights[part] for part in parts_of(name, weights))))
            for name in inputs
        }
        self._known: dict[str, InputStatistics] = {}
        self._found: dict[str, Weights] = {}
        self._type = QuantizedWeights

    def gather(self) -> None:
        """See Side."""
        for name, x in self._inputs.items():
            recorder = self._recorder()
            for step in x.split(STEP):
                recorder.see(step)
            self._known[name] = recorder.statistics()

    def quantize(self) -> None:
        """See Side."""
        order = sorted(self._known, key=lambda name: -self._inputs[name].shape[1])
        self._found = dict(self._run([partial(self._quantize, name) for name in order]))

    def _quantize(self, name: str) -> tuple[str, Weights]:
        choose = self._gptq.prepare(self._grid, self._known.pop(name), self._kernels)
        from qwen3_ascend.convert.weights import Choosing
        from qwen3_ascend.files.threads import crew

        with crew(1) as helpers:  # for experts, of which there are none here
            choosing = Choosing(lambda _: choose, self._kernels, lambda: None, helpers)
            return name, self._weights[name].quantized(choosing)

    def results(self) -> dict[str, Tensor]:
        """See Side."""
        made: dict[str, Tensor] = {}
        for name, found in self._found.items():
            assert isinstance(found, self._type)
            whole = self._grid.decode(found.chosen.integers, found.chosen.scales)
            starts = found.stack.starts()
            parts = parts_of(name, self._names)
            made |= {
                part: whole[start : start + rows.shape[0]]
                for part, (start, rows) in zip(parts, starts, strict=True)
            }
        return made


class Peer:
    """llm-compressor's GPTQModifier, told what its pipeline tells it."""

    def __init__(self, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        from llmcompressor.core import Event, State
        from llmcompressor.modifiers.gptq import GPTQModifier

        self._model = torch.nn.ModuleDict()
        for name, weight in weights.items():
            outputs, width = weight.shape
            linear = torch.nn.Linear(width, outputs, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            self._model[name.replace(".", "-")] = linear
        self._modifier = GPTQModifier(config_groups=int4())
        self._state, self._event, self._inputs = State(model=self._model), Event(), inputs
        self._modifier.on_initialize(self._state)
        self._modifier.on_calibration_start(self._state, self._event)

    @torch.no_grad()
    def gather(self) -> None:
        """See Side."""
        for name, x in self._inputs.items():
            for step in x.split(STEP):
                for part in parts_of(name.replace(".", "-"), self._model):
                    self._modifier.calibrate_module(self._model[part], (step[None],), step)

    @torch.no_grad()
    def quantize(self) -> None:
        """See Side."""
        modules = [*self._model.values()]
        self._modifier.on_sequential_epoch_end(self._state, self._event, modules)

    def results(self) -> dict[str, Tensor]:
        """See Side."""
        return {
            name.replace("-", "."): next(linear.parameters()).data.float()
            for name, linear in self._model.items()
        }


def parts_of(name: str, parts: Iterable[str]) -> list[str]:
    """The names of the parts of a fused linear."""
    return [part for part in parts if part[: -len(".0")] == name]


SIDES: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Side]] = {
    "ours": Ours,
    "llm-compressor": Peer,
}


def child(side: str, folder: Path) -> None:
    """What a measured process does; prints its figures."""
    given = SIDES[side](load(folder / "inputs.safetensors"), load(folder / "weights.safetensors"))
    watch, started, cpu = Watch(), time.perf_counter(), time.process_time()
    given.gather()
    gathered = time.perf_counter()
    given.quantize()
    ended = time.perf_counter()
    figures = {"hessians": gathered - started, "quantizing": ended - gathered}
    figures["cpu"] = time.process_time() - cpu
    memory = watch.end()
    save_file({k: t.contiguous() for k, t in given.results().items()}, folder / f"{side}.made")
    print(json.dumps({**figures, "memory": memory}))


def whole_child(side: str, folder: Path, tokens: int) -> None:
    """The same for a whole model."""
    work = {"ours": convert_all, "llm-compressor": oneshot_all}[side](folder, tokens)
    watch, started, cpu = Watch(), time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    figures = {"hessians": 0.0, "quantizing": seconds, "cpu": cpu, "memory": watch.end()}
    shutil.rmtree(folder / "made")
    print(json.dumps(figures))


def convert_all(folder: Path, tokens: int) -> Callable[[], object]:
    """Our conversion."""
    from qwen3_ascend import ConvertOptions, convert_checkpoint
    from qwen3_ascend.convert.recipe import Recipe

    rules = [
        {"match": "lm_head", "scheme": "bf16"},
        {"match": "*", "scheme": {"name": "w4a16", "group": GROUP}, "quantizer": "gptq"},
    ]
    recipe = Recipe.parse(json.dumps({"schema": 1, "name": "gptq", "rules": rules}), "gptq")
    options = ConvertOptions(calibration_tokens=tokens, max_memory="8GiB")
    return partial(convert_checkpoint, folder / "source", folder / "made", recipe, options)


def oneshot_all(folder: Path, tokens: int) -> Callable[[], object]:
    """llm-compressor's pipeline."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16)
        windows = torch.randint(model.config.vocab_size, (tokens // WINDOW, WINDOW)).tolist()
        masks = [[1] * WINDOW for _ in windows]
        data = Dataset.from_dict({"input_ids": windows, "attention_mask": masks})
        modifier = GPTQModifier(config_groups=int4(), ignore=["lm_head"])
        oneshot(
            model=model, recipe=[modifier], dataset=data, max_seq_length=WINDOW,
            num_calibration_samples=len(windows),
        )  # fmt: skip
        model.save_pretrained(folder / "made", save_compressed=True)

    return work


def int4() -> dict[str, dict[str, object]]:
    """The peer's words for symmetric int4 weights in groups."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return {"group_0": {"targets": ["Linear"], "weights": {**scheme, "group_size": GROUP}}}


def load(file: Path) -> dict[str, Tensor]:
    """Tensors of a mapped file, in their order, as views of it."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in sorted(opened.keys())}


def measure(side: str, python: Path, folder: Path, given: argparse.Namespace) -> Figures:
    """One run in a process of its own."""
    command: list[str | Path] = [
        python,
        __file__,
        "--child",
        side,
        "--folder",
        folder,
        "--tokens",
        str(given.tokens),
    ]
    command += ["--whole"] if given.whole else []
    paths = [str(ROOT / "benchmarks")]
    if side == "ours":
        paths.append(os.environ.get("PYTHONPATH", ""))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def product_error(folder: Path, side: str) -> float:
    """tr(dW H dW') / tr(W H W') of all linears together."""
    inputs, weights = load(folder / "inputs.safetensors"), load(folder / "weights.safetensors")
    made = load(folder / f"{side}.made")
    noise = signal = 0.0
    for name, x in inputs.items():
        for part in parts_of(name, weights):
            weight = weights[part].float()
            signal += _energy(x, weight)
            noise += _energy(x, weight - made[part].float())
    return noise / signal


def _energy(x: Tensor, weight: Tensor) -> float:
    return sum(
        float((step.float() @ weight.t()).square().sum(dtype=torch.float64))
        for step in x.split(STEP)
    )


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=random_model.SHAPES, default="0.6b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--whole", action="store_true", help="a model, from folder to folder")
    parser.add_argument("--layers", type=int, help="of a whole model; default all")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has llmcompressor")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child and given.whole:
        whole_child(given.child, given.folder, given.tokens)
    elif given.child:
        child(given.child, given.folder)
    if given.child:
        return
    peer = given.peer_python or environment("llm-compressor") / "bin/python"
    pythons = {"ours": Path(sys.executable), "llm-compressor": peer}
    with tempfile.TemporaryDirectory() as folder:
        report(compare(given, Path(folder), pythons), Path(folder))


def compare(
    given: argparse.Namespace, folder: Path, pythons: dict[str, Path]
) -> dict[str, list[Figures]]:
    """Runs both sides in turn."""
    what = "a layer"
    if given.whole:
        data = random_model.config(given.model, given.layers)
        what = f"{data['num_hidden_layers']} layers, embedding and head"
        random_model.ensure(folder / "source", data)
    else:
        make_data(linears(given.model), given.tokens, folder)
    print(
        f"{what} of {given.model}, {given.tokens} tokens, int4 in groups of {GROUP}; "
        f"{random_model.processor()}, {len(os.sched_getaffinity(0))} processors, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    runs: dict[str, list[Figures]] = {side: [] for side in pythons}
    for _ in range(given.repeat):
        for side, python in pythons.items():
            run = measure(side, python, folder, given)
            print(f"run of {side}: {run}", file=sys.stderr)
            runs[side].append(run)
    return runs


def report(runs: dict[str, list[Figures]], folder: Path) -> None:
    """Prints the fastest run of each side, and the ratios."""
    best = {side: min(found, key=lambda run: run.seconds) for side, found in runs.items()}
    for side, run in best.items():
        parts, error = f"{run.cpu:.2f} of processors", ""
        if (folder / "inputs.safetensors").exists():
            parts = f"{run.hessians:.2f} Hessians, {run.quantizing:.2f} quantizing; {parts}"
            error = f", error {100 * product_error(folder, side):.3f} %"
        print(f"{side:15} {run.seconds:7.2f} s ({parts}), {run.memory / 2**20:.0f} MiB{error}")
    ours, theirs = best.values()
    print(
        f"llm-compressor / ours: {theirs.seconds / ours.seconds:.1f} x the time (quantizing alone "
        f"{theirs.quantizing / ours.quantizing:.1f} x, of processors "
        f"{theirs.cpu / ours.cpu:.1f} x), {theirs.memory / ours.memory:.1f} x the memory"
    )


if __name__ == "__main__":
    main()
