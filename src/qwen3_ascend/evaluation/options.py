"""What a user may choose about an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_ascend.options import check_options, option


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation; each field says what it is for.

    Raises:
        OptionError: on construction, naming an option whose value is not taken.
    """

    window: int = option(
        512, "Tokens of a window; each is read from its beginning, and all but its first are "
        "scored.", least=2,
    )  # fmt: skip
    windows: int | None = option(
        None, "Windows to read, from the beginning of the text.", least=1, unset="all of the text"
    )
    device: str = option(
        "auto",
        "Where to compute; auto takes an NPU if there is one, else the CPU.",
        choices=("auto", "npu", "cpu"),
    )
    dtype: str = option(
        "auto",
        "Type of activations; auto is float32 on a CPU and bfloat16 on an NPU.",
        choices=("auto", "bfloat16", "float32"),
    )

    def __post_init__(self) -> None:
        check_options(self)
