"""The quantization of a checkpoint of ours, as vLLM asks for it: the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME, Manifest
from qwen3_ascend.vllm.linears import (
    EXPERTS,
    GATE_UP,
    experts_method,
    head_method,
    linear_method,
    plain_method,
)
from qwen3_ascend.vllm.names import PLUGIN

DRAFT = "draft_model."
"""What vLLM puts before the names of modules in the draft of speculative decoding."""


class StoredConfig(QuantizationConfig):
    """Gives each linear the method that computes with its stored form, and so each mixture.

    vLLM's names of modules are the manifest's, since both fuse q, k, v and gate, up; of experts the
    manifest has two linears below the one module that vLLM makes.
    """

    quant_description: Mapping[str, str] = {}
    """Types of tensors, as vllm-ascend looks for norms with biases among them; ours have none."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.manifest = manifest

    @override
    def get_name(self) -> str:
        return PLUGIN

    @override
    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """float32 on a CPU only: npu_quant_matmul answers in half precision."""
        on_cpu = current_platform.device_type == "cpu"
        return [torch.bfloat16, torch.float32] if on_cpu else [torch.bfloat16]

    @classmethod
    @override
    def get_min_capability(cls) -> int:
        """Of a GPU; neither an NPU nor a CPU has one."""
        return 0

    @staticmethod
    @override
    def get_config_filenames() -> list[str]:
        return [MANIFEST_NAME]

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> StoredConfig:
        """Of the manifest as JSON; CheckpointError if it was changed."""
        return cls(Manifest.from_json(config))

    @override
    def get_quant_method(self, layer: torch.nn.Module, prefix: str, **asked: Any) -> Any:
        """The method of a linear or an output projection; None leaves the engine's own. What
        vllm-ascend asks beside is for other models."""
        name = prefix.removeprefix(DRAFT)
        entry, platform = self.manifest.linears.get(name), current_platform.device_type
        if name.endswith(EXPERTS) and f"{name}.{GATE_UP}" in self.manifest.linears:
            return experts_method(self.manifest.model, name, layer, platform)
        if isinstance(layer, ParallelLMHead):
            return None if entry is None else head_method(entry, name, platform)
        if isinstance(layer, LinearBase):
            return plain_method(platform) if entry is None else linear_method(entry, name, platform)
        return None
