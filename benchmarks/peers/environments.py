"""Where the tools of others are: `make` installs or builds each that is not there yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(peer: str) -> Path:
    """The folder that a peer's make target prints, once it has made it (peers.mk).

    Args:
        peer: "llm-compressor", "msmodelslim" or "auto-round", whose folder is a virtual
            environment; or "llama-cpp", whose folder holds its programs.

    Raises:
        SystemExit: if it cannot be made; make has said why on standard error.
    """
    command = ["make", "-s", "--no-print-directory", "-C", str(ROOT), f"peer-{peer}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{peer} could not be made: see what make said above")
    return Path(done.stdout.strip().splitlines()[-1])
