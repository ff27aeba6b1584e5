"""Folders that are not a Qwen3 to be converted: what they are, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qwen3_ascend.checkpoint.companions import CONFIG_NAME
from qwen3_ascend.convert.source.ascendv1 import name_meaning
from qwen3_ascend.errors import SourceError

ORIGINAL = "convert the original safetensors model"
MERGE = (
    "merge it into its base model first (in Python, with peft: "
    "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)) "
    "and convert the result"
)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

STATE_FILES = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*")
"""What a trainer leaves beside its model; no weights of it."""

MAX_NAMED = 5


@dataclass(frozen=True)
class Kind:
    """A kind of folder, known by a file in it.

    Attributes:
        patterns: of names; one of them is enough.
        what: it is.
        advice: what to do instead.
    """

    patterns: tuple[str, ...]
    what: str
    advice: str


KINDS = (
    Kind(("qwen3_ascend.json",), "a converted checkpoint of ours", "use it as it is"),
    Kind(("adapter_config.json",), "a LoRA adapter, not a model", MERGE),
    Kind(
        ("quant_model_*",),
        "a part of a quantized model of ModelSlim",
        "put config.json and all its weight files beside it",
    ),
    Kind(("*.gguf",), "a GGUF model, quantized or packed for llama.cpp", ORIGINAL),
    Kind(("*.engine", "*.plan"), "a TensorRT engine", ORIGINAL),
    Kind(("*.onnx",), "an ONNX export", ORIGINAL),
    Kind(("openvino_model*",), "an OpenVINO export", ORIGINAL),
    Kind(("*.mlmodel", "*.mlpackage"), "a Core ML export", ORIGINAL),
    Kind(("*.h5", "*.msgpack"), "a TensorFlow or Flax model", "save it as safetensors first"),
    Kind(
        ("*.bin", "*.pth", "*.pt"),
        "a model of pickled weights only, which may run code when they are read",
        "save it as safetensors first: model.save_pretrained(FOLDER, safe_serialization=True)",
    ),
    Kind(("model_index.json",), "a pipeline of diffusers", "convert its language model"),
)


def recognised(names: Collection[str]) -> str | None:
    """What a folder is that is no model, and what to do; None if its files do not tell."""
    for kind in KINDS:
        found = sorted(n for n in names if any(fnmatchcase(n, p) for p in kind.patterns))
        if found:
            return f"{kind.what} ({found[0]}); {kind.advice}"
    return None


def refuse_adapters(repo: str, names: Collection[str]) -> None:
    """An adapter that lies beside a model changes it: transformers loads both together."""
    for name in ADAPTER_FILES:
        if name in names:
            raise SourceError(
                f"{repo} holds an adapter ({name}) beside the model, which transformers applies "
                f"and a conversion would leave out; {MERGE}, or remove the adapter"
            )


def no_model(repo: str, names: Collection[str], lacking: str) -> SourceError:
    """The error for a folder without what a model has."""
    what = recognised(names)
    if what is not None:
        return SourceError(f"{repo} is {what}")
    return SourceError(f"{repo} {lacking}")


def model_below(folder: Path) -> Path | None:
    """A model in a sub-folder of what the user named, the last by name: a snapshot of the Hub's
    cache, a trainer's checkpoint, or one folder too high."""
    patterns = (f"snapshots/*/{CONFIG_NAME}", f"*/{CONFIG_NAME}")
    found = [path.parent for pattern in patterns for path in sorted(folder.glob(pattern))]
    return found[-1] if found else None


def unused_weights(names: Collection[str], used: Collection[str]) -> str | None:
    """A note about files of weights that are there and not read; None if there are none."""
    left = [name for name in _weight_files(names) if name not in used]
    if not left:
        return None
    more = f" and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
    return f"files of weights that are not read: {', '.join(left[:MAX_NAMED])}{more}"


def _weight_files(names: Collection[str]) -> Iterator[str]:
    for name in sorted(names):
        trainers = any(fnmatchcase(name, pattern) for pattern in STATE_FILES)
        if name.endswith(WEIGHT_SUFFIXES) and not trainers:
            yield name


TENSOR_KINDS = (
    ((".lora_A.", ".lora_B.", ".base_layer."), f"weights of LoRA that are not merged: {MERGE}"),
    (("score.weight", "classifier."), "a classifier's head; only causal language models convert"),
    (("v_head.",), "a value head, which is no part of a language model: save the model without it"),
    (("visual.", "vision_tower.", "vision_model."), "a vision-language model; it is not supported"),
    (
        (".experts.", "mlp.gate.weight"),
        "a mixture of experts, while config.json describes a dense Qwen3",
    ),
    (
        (
            "qweight", "qzeros", "scales", "weight_scale", "weight_packed", "weight_scale_inv",
            "input_scale", "absmax", "quant_map", "quant_state", "deq_scale", "quant_bias",
            "weight_offset", "weight_zero_point", "input_offset", "scale_bias", "k_scale",
            "v_scale",
        ),
        f"an already quantized model: {ORIGINAL}",
    ),
)  # fmt: skip
"""What tensors that no Qwen3 has tell by a part of their names."""


def tensor_hint(name: str) -> str | None:
    """What a tensor's name tells about its model; None if nothing."""
    hint = next((hint for parts, hint in TENSOR_KINDS if any(p in name for p in parts)), None)
    return name_meaning(name) or hint
