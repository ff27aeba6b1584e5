"""What a user may choose about running a checkpoint: sizes of the engine, and the device.

How tokens are chosen is SamplingParams (runtime/engine/request.py), which each request has anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from qwen3_ascend.files.text import parse_size
from qwen3_ascend.geometry import CACHE_BLOCK_TOKENS
from qwen3_ascend.options import check_options, option


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine; each field says what it is for.

    Raises:
        OptionError: on construction, naming an option whose value is not taken.
    """

    block_size: int = option(
        CACHE_BLOCK_TOKENS, "Tokens of a block of the key/value cache.", least=1
    )
    kv_cache_tokens: int | None = option(
        None,
        "Tokens that fit into the key/value cache.",
        least=1,
        unset="a full context for each answer of a batch, as far as memory goes; on a CPU, a "
        "quarter of what is available",
    )
    max_batch: int = option(16, "Answers that are computed together.", least=1)
    step_tokens: int = option(
        2048,
        "Tokens of prompts and answers computed in one step: more of them read long prompts "
        "faster, fewer of them keep running answers smooth.",
        least=1,
    )
    prefix_cache: bool = option(
        True, "Keep the keys and values of beginnings that several prompts have in common."
    )

    def __post_init__(self) -> None:
        check_options(self)


def check_prefetch(setting: int | str) -> None:
    """ValueError unless a setting of `prefetch` is off, auto or a size."""
    if setting in ("off", "auto"):
        return
    try:
        parse_size(setting)
    except ValueError:
        raise ValueError(f"{setting!r} is not off, auto or a size such as 64MiB") from None


def check_port(port: object) -> None:
    """ValueError unless a port is one of TCP's, or 0."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ValueError(f"{port!r} is not a port: give 0 to 65535")


def parse_buckets(text: str) -> tuple[int, ...]:
    """Batch sizes of a text such as 1,2,4; ValueError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of batch sizes such as 1,2,4") from None


def check_buckets(buckets: object) -> None:
    """ValueError unless buckets are batch sizes of 1 or more."""
    sizes = [*buckets] if isinstance(buckets, Iterable) else []
    if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"{buckets!r} must be batch sizes of 1 or more")


@dataclass(frozen=True)
class DeviceOptions:
    """The device and how it is used; each field says what it is for.

    A value that no device takes is refused on every device, also where the option has no effect.

    Raises:
        OptionError: on construction, naming an option whose value is not taken.
    """

    device: str = option(
        "auto",
        "Where to compute; auto takes an NPU if there is one, else the CPU.",
        choices=("auto", "npu", "cpu"),
    )
    dtype: str = option(
        "auto",
        "Type of activations; auto is bfloat16, and float32 needs a CPU.",
        choices=("auto", "bfloat16", "float32"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Type in which keys and values are kept; auto is that of activations. int8 takes about "
        "half the memory, with a scale for each token and head, and needs a CPU.",
        choices=("auto", "int8"),
    )
    attention: str = option(
        "auto",
        "NPU: kernel of attention; paged needs ATB, auto is fused, but paged with CANN 8, whose "
        "fused kernel reads a long context on one core.",
        choices=("auto", "fused", "paged"),
    )
    graph: bool = option(True, "NPU: capture steps of answers once and replay them.")
    graph_lengths: str = option(
        "auto",
        "NPU: how captured steps learn the lengths of contexts. update tells each layer anew in "
        "every step, which costs the host some time; masked captures steps for contexts of up to "
        "512, 1024, 2048 and so on tokens and hides on the device what lies behind the end of "
        "each, which reads up to twice the keys; auto is update wherever torch_npu offers it.",
        choices=("auto", "update", "masked"),
    )
    buckets: Sequence[int] | None = option(
        None,
        "NPU: batch sizes to capture.",
        metavar="N,N,...",
        unset="1, 2, 4, 8 and every 8th up to max_batch",
        rule=check_buckets,
        parse=parse_buckets,
    )
    run_ahead: bool = option(
        True,
        "NPU: give the device the next step before the tokens of the last one are read, where "
        "tokens are simply the most probable ones. The host's work is hidden behind the device's; "
        "an answer that ends costs one row in vain.",
    )
    prefetch: int | str = option(
        "off",
        "NPU: weights of an MLP to fetch ahead into L2; auto is half of the L2. Off until somebody "
        "has measured a gain on a card: `qwen3-ascend doctor` measures it.",
        metavar="off|auto|SIZE",
        rule=check_prefetch,
    )

    def __post_init__(self) -> None:
        check_options(self)


class LoadOptions(TypedDict, total=False):
    """The fields of both, but for device and dtype, as keywords of `load`; a test compares them."""

    block_size: int
    kv_cache_tokens: int | None
    max_batch: int
    step_tokens: int
    prefix_cache: bool
    kv_cache_dtype: str
    attention: str
    graph: bool
    graph_lengths: str
    buckets: Sequence[int] | None
    run_ahead: bool
    prefetch: int | str


@dataclass(frozen=True)
class ServeOptions:
    """How `qwen3-ascend serve` is reached, and what it takes in; each field says what it is for.

    Raises:
        OptionError: on construction, naming an option whose value is not taken.
    """

    host: str = option(
        "127.0.0.1",
        "Address to listen on. Whoever reaches it may use the model: there are no keys.",
    )
    port: int = option(
        8000, "Port to listen on; 0 takes a free one and prints it.", rule=check_port
    )
    served_model_name: str | None = option(
        None, "Name by which clients ask for the model.", unset="the folder's name"
    )
    max_requests: int = option(
        1024,
        "Answers that are computed or wait at a time; a client that asks for more is told to try "
        "again later (429).",
        least=1,
    )
    max_body: int | str = option(
        "4MiB", "Largest body of a request.", metavar="SIZE", rule=parse_size
    )
    grace: int = option(
        10,
        "Seconds that answers get to end after Ctrl-C or SIGTERM; a second Ctrl-C ends at once.",
        least=0,
    )
    access_log: bool = option(False, "Print a line to standard error for each request.")

    def __post_init__(self) -> None:
        check_options(self)
