"""`python -m qwen3_ascend.cli`."""

from qwen3_ascend.cli import main

main(prog_name="qwen3-ascend")
