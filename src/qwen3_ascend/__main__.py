"""`python -m qwen3_ascend`."""

from qwen3_ascend.cli import main

main(prog_name="qwen3-ascend")
