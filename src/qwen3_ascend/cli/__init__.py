"""The command line. Each command is one call; heavy imports stay inside it, so that --help is
instant."""

from __future__ import annotations

import click

from qwen3_ascend.cli.checking import doctor, inspect, verify
from qwen3_ascend.cli.converting import convert, sensitivity
from qwen3_ascend.cli.environment import settle_libraries
from qwen3_ascend.cli.evaluating import evaluate, report
from qwen3_ascend.cli.exporting import export
from qwen3_ascend.cli.generating import generate
from qwen3_ascend.cli.serving import serve
from qwen3_ascend.cli.terminal import OneLineErrors
from qwen3_ascend.version import __version__

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=OneLineErrors, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="qwen3-ascend")
def main() -> None:
    """Take Qwen3 from the Hub to an Ascend NPU.

    \b
    qwen3-ascend convert Qwen/Qwen3-8B out/      quantize and lay out, offline, on any CPU
    qwen3-ascend sensitivity MODEL FILE          which linears deserve more bits
    qwen3-ascend generate out/ --prompt "..."    run the result
    qwen3-ascend serve out/                      the same behind OpenAI's interface, to try it
    qwen3-ascend export out/ to/ --format F      the same integers for another engine
    qwen3-ascend eval out/ --text FILE           how much quality it has kept
    qwen3-ascend report out/ -o report.html      a page about it
    qwen3-ascend inspect out/                    what is in it
    qwen3-ascend verify out/                     re-hash every byte
    qwen3-ascend doctor                          check this machine's NPU
    """
    settle_libraries()


for command in (
    convert,
    sensitivity,
    generate,
    serve,
    export,
    evaluate,
    report,
    inspect,
    verify,
    doctor,
):
    main.add_command(command)
