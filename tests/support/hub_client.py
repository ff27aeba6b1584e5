"""Lets the real huggingface_hub of this process talk to a local Hub.

It reads its environment once, when it is imported, so a program of its own is the honest way; but
that costs seconds. Here the few constants that came from the environment are replaced instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from support import tiny_models
from support.hub_server import HubServer

REPO = "Qwen/Qwen3-Tiny"


def talk_to(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points the library at a hub and a cache, and shortens its pauses to nothing."""
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    replaced: dict[str, object] = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HOME": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    huggingface_hub.logging.set_verbosity_error()
    getattr(huggingface_hub, "close_session", lambda: None)()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def big_model(folder: Path, shards: int = 3, seed: int = 0) -> Path:
    """Weights of some megabytes, so that a request for a header is not one for a whole file.

    Tensors follow each other as in published models: a layer lies in one file or two.
    """
    data = tiny_models.config(hidden_size=128, intermediate_size=768, num_hidden_layers=6)
    weights = tiny_models.tensors(data, seed)
    tiny_models.write(folder, data, weights)
    (folder / "model.safetensors").unlink()
    write_shards(folder, weights, shards)
    return folder


def write_shards(folder: Path, weights: Mapping[str, Tensor], shards: int) -> None:
    """Cuts the weights into files of about equal size, in order, with their index."""
    share = sum(tensor.nbytes for tensor in weights.values()) / shards
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    position = 0.0
    for name, tensor in weights.items():
        parts[min(int(position / share), shards - 1)][name] = tensor
        position += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def downloads(hub: HubServer) -> list[str]:
    """Names of the weight files that were fetched, not only their headers, in order."""
    asked = [r for r in hub.seen("/cdn/*", "GET") if not str(r.range).startswith("bytes=0-")]
    return [request.path.rpartition("/")[2] for request in asked]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
