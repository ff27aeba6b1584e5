"""What vllm.LLM says of models that it refuses: reads {name: [model, arguments]} as JSON from
standard input, and prints {name: message}."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    said = {}
    for name, (model, arguments) in json.load(sys.stdin).items():
        try:
            LLM(model, enforce_eager=True, max_model_len=512, **arguments)
        except Exception as error:
            said[name] = str(error)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
