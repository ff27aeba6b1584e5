"""Quantizes a model with auto-round; runs in auto-round's own environment.

    python run_auto_round.py MODEL OUT METHOD TEXTS

TEXTS is a JSON file of the calibration windows: {"tokens": [[...]], "texts": [...]}. Settings are
the tool's defaults: 200 iterations of batches of 8, where tuned; 0 iterations are its "opt-RTN".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound

Settings = dict[str, Any]

METHODS: dict[str, Settings] = {
    "rtn-w8a8": {"scheme": "INT8", "iters": 0, "disable_opt_rtn": True},
    "tuned-w8a8": {"scheme": "INT8"},
    "opt-rtn-g128": {"scheme": "W4A16", "group_size": 128, "iters": 0},
    "opt-rtn-g64": {"scheme": "W4A16", "group_size": 64, "iters": 0},
    "opt-rtn-g32": {"scheme": "W4A16", "group_size": 32, "iters": 0},
    "tuned-g128": {"scheme": "W4A16", "group_size": 128},
    "tuned-g64": {"scheme": "W4A16", "group_size": 64},
    "tuned-g32": {"scheme": "W4A16", "group_size": 32},
}


def main() -> None:
    """See the module docstring."""
    source, output, method, texts = sys.argv[1:]
    windows = json.loads(Path(texts).read_text())["tokens"]
    settings = METHODS[method]
    rounding = AutoRound(
        source, dataset=[torch.tensor([window]) for window in windows], nsamples=len(windows),
        seqlen=min(map(len, windows)), batch_size=min(8, len(windows)), device_map="cpu",
        enable_torch_compile=False, **settings,
    )  # fmt: skip
    form = "llm_compressor" if settings["scheme"] == "INT8" else "auto_round"
    rounding.quantize_and_save(output, format=form)
    for file in Path(output).glob("*/*"):  # it saves to a folder of its own naming below
        file.rename(Path(output) / file.name)


if __name__ == "__main__":
    main()
