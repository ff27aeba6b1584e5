"""`qwen3-ascend serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwen3_ascend.cli.generating import load_shown
from qwen3_ascend.cli.options import UserPath, given, options_of
from qwen3_ascend.cli.terminal import to_stderr
from qwen3_ascend.options import share
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions, ServeOptions


@click.command()
@click.argument("checkpoint", type=UserPath())
@options_of(ServeOptions, EngineOptions, DeviceOptions)
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Hash every tensor (default), or believe the files. A CPU hashes beside the work, and "
    "ends no answer before all is hashed; an NPU before it copies.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress bar, and nothing but errors.")
def serve(checkpoint: Path, verify: bool, quiet: bool, **values: Any) -> None:
    """Answer OpenAI's interface with CHECKPOINT, to try it locally.

    Chat and text completions, whole or streamed, at http://127.0.0.1:8000/v1, until Ctrl-C.
    Sampling parameters that a request leaves out come from the model's generation_config.json.

    This is one process on one device, without keys, metrics or tool parsers. For production,
    serve CHECKPOINT with vLLM: `vllm serve CHECKPOINT`.

    \b
    qwen3-ascend serve out/
    qwen3-ascend serve out/ --port 0 --served-model-name qwen3
    curl http://127.0.0.1:8000/v1/models
    """
    kinds = (ServeOptions, EngineOptions, DeviceOptions)
    for_server, *for_load = share(given(values), *kinds)
    options = ServeOptions(**for_server)
    from qwen3_ascend.runtime.serving import server

    with server.open_socket(options) as bound:
        llm, loaded = load_shown(checkpoint, verify, quiet, *for_load)
        name = server.model_name(checkpoint, options)

        def say() -> None:
            if not quiet:
                to_stderr(f"{loaded}\n{name} at {server.url_of(bound)}; Ctrl-C ends it")

        server.serve(server.Server(llm, name, bound, options), say)
