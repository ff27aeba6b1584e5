"""Memory does not grow with the model: it is watched while a process converts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import tiny_models

WATCHED = """
import json, re, sys, threading, time
from pathlib import Path
from qwen3_ascend.convert import ConvertOptions, convert_checkpoint
from qwen3_ascend.convert.output import production

production.DROP_BYTES = 16 << 20  # far less than the model, which is small

def resident():
    status = Path("/proc/self/status").read_text()
    return [int(re.search(rf"Rss{kind}:\\s+(\\d+)", status)[1]) << 10 for kind in ("Anon", "File")]

def watch():
    while True:
        seen.append(resident())
        time.sleep(0.002)

seen = [resident()]
threading.Thread(target=watch, daemon=True).start()
options = ConvertOptions(threads=2, max_memory="256MiB")
convert_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], options)
print(json.dumps([max(figures) - figures[0] for figures in zip(*seen)]))
"""


def test_large_tensors_are_never_whole(tmp_path: Path) -> None:
    """An embedding of 84 MB, a fused linear of 50 MB whose parts end within a strip, and a head."""
    data = tiny_models.config(
        hidden_size=1024, intermediate_size=12_330, num_hidden_layers=1, vocab_size=41_000
    )
    source = tiny_models.write(tmp_path / "source", data, tokenizer=False)
    assert (source / "model.safetensors").stat().st_size > 230e6
    for recipe in ("w8a8", "bf16"):
        arguments: list[str | Path] = [source, tmp_path / recipe, recipe]
        command = [sys.executable, "-c", WATCHED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        private, mapped = json.loads(done.stdout)
        assert private < 80 << 20
        assert mapped < 100 << 20  # of 230: what was read is given back as the work goes on
