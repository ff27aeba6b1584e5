"""lm-eval's perplexity of any server of completions, on a task of our own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from handover.clients.program import client
from support.tiny_models import DATA

TASK = Path(__file__).parent / "task"
CONTEXT = 1024
"""Tokens of the tiny model's context; lm-eval leaves one of them for an answer."""

DOCUMENTS = (2000, 900, 7000, 3000)
"""How many letters each has. The third does not fit into a context."""


def documents() -> list[str]:
    """Texts that the tiny model has not seen."""
    whole, begins, found = (DATA / "heldout.txt").read_text(encoding="utf-8"), 0, []
    for length in DOCUMENTS:
        found.append(whole[begins : begins + length])
        begins += length
    return found


def perplexity(
    python: str, url: str, model: str, tokenizer: Path, folder: Path, concurrent: int = 1
) -> dict[str, float]:
    """What lm-eval finds.

    Args:
        python: of an environment with lm-eval[api].
        url: of a server, up to /v1.
        model: its name there.
        tokenizer: a folder with the tokenizer's files.
        folder: an empty one to work in.
        concurrent: requests at a time.
    """
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents())
    (folder / "heldout.jsonl").write_text(lines, encoding="utf-8")
    arguments = {
        "model": model, "base_url": f"{url}/completions", "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface", "max_length": CONTEXT, "num_concurrent": concurrent,
    }  # fmt: skip
    client(
        python, "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks", "heldout", "--include_path", shutil.copytree(TASK, folder / "task"),
        "--batch_size", "2", "--output_path", "results.json",
        cwd=folder, environment={"HF_HOME": str(folder / "home")},
    )  # fmt: skip
    (path,) = folder.glob("results*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["results"]["heldout"]
    return {name.partition(",")[0]: value for name, value in found.items() if "perp" in name}
