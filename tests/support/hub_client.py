"""Lets the real huggingface_hub of this process talk to a local Hub.

It reads its environment once, when it is imported, so a program of its own is the honest way; but
that costs seconds. Here the few constants that came from the environment are replaced instead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
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
    tiny_models.write_shards(folder, _in_order(weights, shards))
    return folder


def _in_order(weights: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cuts the weights into parts of about equal size."""
    share = sum(tensor.nbytes for tensor in weights.values()) / count
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    position = 0.0
    for name, tensor in weights.items():
        parts[min(int(position / share), count - 1)][name] = tensor
        position += tensor.nbytes
    return parts


def downloads(hub: HubServer) -> list[str]:
    """Names of the weight files that were fetched, not only their headers, in order."""
    asked = [r for r in hub.seen("/cdn/*", "GET") if not str(r.range).startswith("bytes=0-")]
    return [request.path.rpartition("/")[2] for request in asked]
