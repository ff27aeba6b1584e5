"""Options: written once, explained by --help, checked alike in Python and on the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from support.command_line import run

from qwen3_ascend import OptionError, load
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.cli import main
from qwen3_ascend.cli.options import given
from qwen3_ascend.convert import ConvertOptions
from qwen3_ascend.files.text import parse_size
from qwen3_ascend.options import described, share
from qwen3_ascend.runtime import SamplingParams
from qwen3_ascend.runtime.options import (
    DeviceOptions,
    EngineOptions,
    LoadOptions,
    ServeOptions,
)

COMMANDS = {
    ConvertOptions: ["convert", "model", "out"],
    SamplingParams: ["generate", "out", "--prompt", "x"],
    EngineOptions: ["generate", "out", "--prompt", "x"],
    DeviceOptions: ["generate", "out", "--prompt", "x"],
    ServeOptions: ["serve", "out"],
}
FIELDS = [(kind, field.name) for kind in COMMANDS for field in dataclasses.fields(kind)]


def from_command_line(kind: type[Any], *options: str) -> Any:
    """The options that a command makes of its arguments."""
    name, *arguments = COMMANDS[kind]
    context = main.commands[name].make_context(name, [*arguments, *options])
    mine = {key: context.params[key] for key in described(kind)}
    return kind(**given(mine))


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(
    ("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value)
)
def test_help_explains_every_option_and_its_default(kind: type[Any], name: str) -> None:
    text = " ".join(run(COMMANDS[kind][0], "--help").out.split())
    option, default = described(kind)[name], getattr(kind(), name)
    shown = ("on" if default else "off") if isinstance(default, bool) else str(default)
    if default in (None, ()):
        assert option.unset, "a default of None or () needs words"
        shown = option.unset
    begins = text.index(f" {flag(name)} ")
    assert f" {option.help} [default: {shown}]" in text[begins:]


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_has_no_defaults_of_its_own(kind: type[Any]) -> None:
    """What is not given is not passed on, so the default is the same object."""
    made = from_command_line(kind)
    for field in dataclasses.fields(kind):
        assert getattr(made, field.name) is field.default
    for parameter in main.commands[COMMANDS[kind][0]].params:
        if parameter.name in described(kind):
            assert parameter.default is None


GIVEN: list[tuple[type[Any], list[str], dict[str, Any]]] = [
    (ConvertOptions, ["--revision", "main", "--hub", "modelscope", "--low-disk"],
     {"revision": "main", "hub": "modelscope", "low_disk": True}),
    (ConvertOptions, ["--retries", "0", "--threads", "3", "--max-memory", "0.5G", "--overwrite"],
     {"retries": 0, "threads": 3, "max_memory": "0.5G", "overwrite": True}),
    (EngineOptions, ["--block-size", "16", "--no-prefix-cache", "--kv-cache-tokens", "64"],
     {"block_size": 16, "prefix_cache": False, "kv_cache_tokens": 64}),
    (EngineOptions, ["--max-batch", "2", "--step-tokens", "7"],
     {"max_batch": 2, "step_tokens": 7}),
    (DeviceOptions, ["--device", "cpu", "--dtype", "float32", "--attention", "paged"],
     {"device": "cpu", "dtype": "float32", "attention": "paged"}),
    (DeviceOptions, ["--no-graph", "--buckets", "1,2,4", "--prefetch", "64MiB"],
     {"graph": False, "buckets": (1, 2, 4), "prefetch": "64MiB"}),
    (ServeOptions, ["--host", "::", "--port", "0", "--served-model-name", "mine", "--access-log"],
     {"host": "::", "port": 0, "served_model_name": "mine", "access_log": True}),
    (ServeOptions, ["--max-requests", "2", "--max-body", "1k", "--grace", "0"],
     {"max_requests": 2, "max_body": "1k", "grace": 0}),
    (SamplingParams, ["--temperature", "0.5", "--stop", "a", "--stop", "b", "--ignore-eos"],
     {"temperature": 0.5, "stop": ("a", "b"), "ignore_eos": True}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "fields"), GIVEN)
def test_both_ways_come_to_the_same(
    kind: type[Any], options: list[str], fields: dict[str, Any]
) -> None:
    assert from_command_line(kind, *options) == kind(**fields) != kind()


BAD: list[tuple[type[Any], str, str, Any]] = [
    (ConvertOptions, "hub", "elsewhere", "elsewhere"),
    (ConvertOptions, "retries", "-1", -1),
    (ConvertOptions, "threads", "0", 0),
    (ConvertOptions, "max_memory", "much", "much"),
    (ConvertOptions, "max_memory", "-1", -1),
    (ConvertOptions, "max_file_bytes", "2 apples", "2 apples"),
    (EngineOptions, "block_size", "0", 0),
    (EngineOptions, "kv_cache_tokens", "0", 0),
    (EngineOptions, "max_batch", "0", 0),
    (EngineOptions, "step_tokens", "-4", -4),
    (DeviceOptions, "device", "tpu", "tpu"),
    (DeviceOptions, "dtype", "float8", "float8"),
    (DeviceOptions, "attention", "typo", "typo"),
    (DeviceOptions, "prefetch", "much", "much"),
    (DeviceOptions, "buckets", "0", (0,)),
    (DeviceOptions, "buckets", "1,-2", (1, -2)),
    (ServeOptions, "port", "65536", 65536),
    (ServeOptions, "port", "-1", -1),
    (ServeOptions, "max_requests", "0", 0),
    (ServeOptions, "max_body", "much", "much"),
    (ServeOptions, "grace", "-1", -1),
]


@pytest.mark.parametrize(("kind", "name", "text", "value"), BAD)
def test_both_ways_refuse_by_the_same_rule(
    kind: type[Any], name: str, text: str, value: Any
) -> None:
    """On this machine without an NPU, and before anything is looked at: there is no model."""
    with pytest.raises(OptionError, match=f"^{name}: ") as refused:
        kind(**{name: value})
    reason = str(refused.value).removeprefix(f"{name}: ")
    said = run(*COMMANDS[kind], flag(name), text).one_line_error(flag(name))
    assert said.replace("'", "").find(reason.replace("'", "")) >= 0, (said, reason)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ConvertOptions, {"low_disk": "no"}),
        (ConvertOptions, {"threads": True}),
        (ConvertOptions, {"retries": None}),
        (ConvertOptions, {"max_memory": True}),
        (EngineOptions, {"max_batch": 2.5}),
        (EngineOptions, {"max_batch": "4"}),
        (EngineOptions, {"block_size": None}),
        (DeviceOptions, {"graph": "off"}),
        (DeviceOptions, {"buckets": ()}),
        (DeviceOptions, {"buckets": "1,2"}),
        (DeviceOptions, {"buckets": 3}),
        (DeviceOptions, {"device": None}),
        (DeviceOptions, {"prefetch": None}),
        (ServeOptions, {"port": True}),
        (ServeOptions, {"port": "8000"}),
        (ServeOptions, {"access_log": "yes"}),
    ],
)
def test_types_that_only_python_can_give(kind: type[Any], fields: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"^{next(iter(fields))}: "):
        kind(**fields)


def test_load_refuses_by_name_before_it_reads(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    with pytest.raises(OptionError, match="no option max_bacth; did you mean max_batch?"):
        load(nothing, max_bacth=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="no option zebra; known options: block_size, .*prefetch"):
        load(nothing, zebra=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="attention: 'typo'"):
        load(nothing, attention="typo")


def test_sampling_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    done = run("generate", tmp_path / "nothing", "-p", "x", "--top-p", "2")
    done.one_line_error("top_p")


def test_load_has_a_keyword_for_every_option() -> None:
    hints = get_type_hints(EngineOptions) | get_type_hints(DeviceOptions)
    assert get_type_hints(LoadOptions) == {
        name: hint for name, hint in hints.items() if name not in ("device", "dtype")
    }


def test_values_are_shared_out_by_name() -> None:
    values = {"max_batch": 2, "device": "cpu", "graph": False}
    assert share(values, EngineOptions, DeviceOptions) == [
        {"max_batch": 2}, {"device": "cpu", "graph": False}
    ]  # fmt: skip


def test_the_default_block_is_the_one_of_the_target() -> None:
    assert EngineOptions().block_size == ASCEND_A2_A3.block_size


def test_options_of_one_command_have_names_of_their_own() -> None:
    for command in main.commands.values():
        names = [name for item in command.params for name in (*item.opts, *item.secondary_opts)]
        assert len(names) == len(set(names))
        assert all(isinstance(item, click.Argument) or item.help for item in command.params)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("17", 17), ("17B", 17), ("2k", 2048), ("64M", 64 << 20), ("512MiB", 512 << 20),
     ("2G", 2 << 30), ("0.5 GB", 1 << 29), ("1TiB", 1 << 40), (" 3m ", 3 << 20), (50_000, 50_000)],
)  # fmt: skip
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "much", "-1", "1X", "1 2", "G", "1e3", "0x10", "1,5M", -1, True]
)
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size such as 512MiB or 2G"):
        parse_size(text)
