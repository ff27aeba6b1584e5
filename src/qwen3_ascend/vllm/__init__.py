"""The plugin that lets vLLM, on vllm-ascend or on a CPU, serve a checkpoint as it lies.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`;
until then nothing here is imported, and nothing of vLLM is. docs/serving.md says what users see,
docs/architecture.md how the parts fit.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Makes vLLM know our checkpoints. May be called again, and never raises: whoever serves
    another model must not notice that this package is installed."""
    try:
        from qwen3_ascend.vllm.registration import install

        install()
    except Exception as error:  # whatever a version of vLLM that we do not know may answer
        logging.getLogger("vllm.qwen3_ascend").warning(
            "qwen3-ascend: this vLLM does not take the plugin, so it cannot serve checkpoints of "
            "qwen3-ascend (%s: %s)", type(error).__name__, error,
        )  # fmt: skip
