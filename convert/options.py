"""What a user may choose about a conversion, or an export."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_ascend.files.text import parse_size
from qwen3_ascend.options import check_options, option

HUBS = ("huggingface", "modelscope")

DEVICES = ("cpu", "npu")

EXPORT_FORMATS = ("ascendv1", "compressed-tensors", "huggingface")


@dataclass(frozen=True)
class WritingOptions:
    """Options of whatever writes weight files; each field says what it is for.

    Raises:
        OptionError: on construction, naming an option whose value is not taken.
    """

    max_memory: int | str = option(
        "2GiB",
        "Private memory to take beyond Python with torch loaded; source files that are mapped do "
        "not count.",
        metavar="SIZE",
        rule=parse_size,
    )
    threads: int | None = option(
        None,
        "Threads that work at a time; no byte of the output depends on it.",
        least=1,
        unset="one for each processor",
    )
    max_file_bytes: int | str = option(
        "4GiB",
        "Size at which a new output file begins.",
        metavar="SIZE",
        rule=parse_size,
    )
    overwrite: bool = option(
        False, "Replace what is already in OUTPUT; files that are not part of it stay."
    )
    restart: bool = option(
        False, "Discard what an interrupted run has left instead of continuing it."
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of recipes that look at what texts do to the inputs of linears."""

    calibration: str | None = option(
        None,
        'Texts to calibrate with: plain UTF-8 text, or a .jsonl file of {"text": ...} and '
        '{"messages": [...]}. Recipes that need none leave it aside.',
        metavar="FILE",
        unset="texts in eight languages, code and conversations, which ship with the package",
    )
    calibration_tokens: int = option(
        16384, "Tokens to calibrate with, in windows of 512 spread over the texts.", least=1
    )
    calibration_device: str = option(
        "cpu", "Where calibration computes; everything else runs on the CPU.", choices=DEVICES
    )


def _bits(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 16:
        raise ValueError(f"{value!r} is no number of bits above 0 and up to 16")


@dataclass(frozen=True)
class ConvertOptions(WritingOptions, CalibrationOptions):
    """Options of a conversion; each field says what it is for.

    Raises:
        OptionError: on construction, naming an option whose value is not taken.
    """

    revision: str | None = option(
        None,
        "Branch, tag or commit of a Hub model.",
        metavar="REV",
        unset="the hub's main branch",
    )
    hub: str = option(
        HUBS[0], "Where a MODEL that is no folder on this machine is looked for.", choices=HUBS
    )
    low_disk: bool = option(
        False,
        "Download weights into OUTPUT and remove each file as soon as it has been used, instead "
        "of keeping it in the hub's cache.",
    )
    retries: int = option(
        5,
        "Further attempts at a download that failed, with growing pauses; 5 come to about half a "
        "minute of patience.",
        least=0,
    )
    target_bpw: float | None = option(
        None,
        "Bits a weight, scales included, that the linears of the layers may take on average: those "
        "that gain most are raised above the recipe (int4 to int8, int8 to bf16). What each gains "
        "is measured first, which takes a while.",
        metavar="X",
        unset="as the recipe says",
        rule=_bits,
    )
    sensitivities: str | None = option(
        None,
        "With --target-bpw: the file of what was measured, written unless it is there; see "
        "`qwen3-ascend sensitivity`.",
        metavar="FILE",
        unset="OUTPUT.sensitivities.json, beside OUTPUT",
    )
    hash_source: bool = option(
        False,
        "Note the BLAKE3 of every source tensor in the manifest, for `verify --against`. The files "
        "of a hub are held against the hashes that it states anyway.",
    )
