"""Where vLLM is told: its registries, and the step in which it decides what a model is.

vLLM has no hook that asks plugins whether a folder is theirs. Formats that left its tree wrap
EngineArgs.create_model_config for that (vllm-gguf-plugin, vllm-bnb-plugin), and so do we.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import register_model_loader

from qwen3_ascend.vllm.config import StoredConfig
from qwen3_ascend.vllm.loader import StoredLoader
from qwen3_ascend.vllm.names import PLUGIN
from qwen3_ascend.vllm.recognition import settle

MARK = "_knows_qwen3_ascend"


def install() -> None:
    """Registers loader and linears, and has every model looked at; once in a process."""
    if hasattr(EngineArgs, MARK):
        return
    register_quantization_config(PLUGIN)(StoredConfig)
    register_model_loader(PLUGIN)(StoredLoader)
    make_model = EngineArgs.create_model_config
    make_speculation = EngineArgs.create_speculative_config

    @wraps(make_model)
    def create_model_config(self: Any, *args: Any, **keywords: Any) -> Any:
        settle(self)
        return make_model(self, *args, **keywords)

    @wraps(make_speculation)
    def create_speculative_config(self: Any, *args: Any, **keywords: Any) -> Any:
        speculation = make_speculation(self, *args, **keywords)
        draft = getattr(speculation, "draft_model_config", None)
        if draft is not None and draft.quantization == PLUGIN and callable(draft.hf_overrides):
            draft.hf_overrides = {}  # applied by now, and vLLM 0.23 would read no manifest
        return speculation

    EngineArgs.create_model_config = create_model_config
    EngineArgs.create_speculative_config = create_speculative_config
    setattr(EngineArgs, MARK, True)
