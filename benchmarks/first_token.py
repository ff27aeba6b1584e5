"""Our first token, for startup.py: the counterpart of peers/first_token.c.

    python first_token.py CHECKPOINT THREADS TOKENS

Loads a checkpoint, reads a prompt of so many tokens, says which the most probable next one is and
waits until its input ends, so that its memory can be read. On the way it prints a line after each
stage, with the bytes of private memory that the process has by then.
"""

from __future__ import annotations

import os
import sys

from process_memory import PRIVATE, status


def tell(stage: str) -> None:
    """Says that a stage is done, and the private memory."""
    print(stage, status(os.getpid())[PRIVATE], flush=True)


def main() -> None:
    """See the module docstring."""
    folder, threads, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tell("python")
    import torch

    tell("torch")
    from qwen3_ascend import SamplingParams, load

    tell("imports")
    torch.set_num_threads(threads)
    llm = load(folder, "cpu")
    tell("load")
    prompt = list(range(1000, 1000 + count))
    greedy = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
    print("token", *llm.generate([prompt], greedy)[0].token_ids, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
