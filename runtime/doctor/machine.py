"""What the machine offers, how it lays out weights, and what its operators compute."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.npu import diagnose
from qwen3_ascend.runtime.backends.npu.versions import advice, cann_line, published_cann
from qwen3_ascend.runtime.conformance import Case, cases
from qwen3_ascend.runtime.doctor.recorder import Recorder
from qwen3_ascend.runtime.doctor.report import Check, Status
from qwen3_ascend.runtime.options import DeviceOptions

if TYPE_CHECKING:  # it imports torch_npu, which may not be there
    from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities


def pairing(facts: dict[str, str]) -> Iterator[Check]:
    """Whether the wheel was published for the CANN that is there."""
    name = "torch_npu was published for this CANN"
    published = published_cann(facts["torch_npu"])
    found = cann_line(facts["CANN"])
    if published is None or found is None:
        detail = f"no table tells of torch_npu {facts['torch_npu']} with CANN {facts['CANN']}"
        yield Check("environment", name, "skipped", detail)
    elif published == found:
        yield Check("environment", name, "ok", f"CANN {found}")
    else:
        detail = (
            f"it was for CANN {published}, here is {facts['CANN']}; "
            f"{advice(facts['torch'], facts['CANN'])}"
        )
        yield Check("environment", name, "noted", detail)


def capabilities(config: Qwen3Config) -> Iterator[Check]:
    """What is used for each operation, and why nothing faster."""
    from qwen3_ascend.runtime.backends.npu.capabilities import probe

    found = probe(config)
    for choice in found.choices.values():
        status: Status = "noted" if choice.reason else "ok"
        because = f", because {choice.reason}" if choice.reason else ""
        yield Check("capabilities", choice.operation, status, f"{choice.form.name}{because}")
    for support in found.supports.values():
        status = "ok" if support.usable else "noted"
        yield Check("capabilities", support.what, status, support.detail)
    yield from _decoding(found)


def _decoding(found: Capabilities) -> Iterator[Check]:
    """What the defaults come to."""
    from qwen3_ascend.runtime.backends.npu.decoding import choose_decoding

    chosen = choose_decoding(DeviceOptions("npu"), found)
    detail = f"{chosen.attention}, because {chosen.attention_reason}"
    yield Check("capabilities", "attention=auto", "ok", detail)
    because = f", because {chosen.lengths_reason}" if chosen.lengths_reason else ""
    status: Status = "noted" if chosen.lengths_reason else "ok"
    detail = f"{chosen.lengths or 'steps are not captured'}{because}"
    yield Check("capabilities", "graph_lengths=auto", status, detail)


def forms(config: Qwen3Config) -> Iterator[Check]:
    """Every form of each operation is tried, also those that are not used here."""
    from qwen3_ascend.runtime.backends.npu.capabilities import (
        UNTRIED,
        objection,
        operations,
        refusals_are_fatal,
    )

    if refusals_are_fatal():
        yield Check("forms", "trying each", "skipped", UNTRIED)
        return
    for operation in operations(config).values():
        for form in operation.forms:
            objected = objection(form, operation.trial(config))
            detail = f"cannot be used: {objected}" if objected else ""
            status: Status = "noted" if objected else "ok"
            yield Check("forms", f"{operation.name} with {form.name}", status, detail)


def layouts() -> Iterator[Check]:
    """Self-checks S0 to S3."""
    for name, holds in diagnose.layout_checks():
        status: Status = "skipped" if holds is None else "ok" if holds else "failed"
        yield Check("layout", name, status, "this chip casts to ND" if holds is None else "")


def copying() -> Iterator[Check]:
    """How fast weights come to the device at best."""
    rate = f"{diagnose.copy_speed() / 1e9:.2f} GB/s"
    yield Check("load", "copies of 64 MiB into FRACTAL_NZ", "ok", rate)


def operators(recorder: Recorder, model: str, config: Qwen3Config) -> None:
    """Every operation against its definition, in the sizes of a model."""
    found: list[Case] = []

    def prepare() -> Iterator[Check]:
        npu = diagnose.open_backend(config, DeviceOptions("npu", graph=False))
        found.extend(cases(backends.reference_backend(config), npu, config))
        yield from ()

    recorder.run("operators", f"{model}: opening the device", prepare)
    for case in found:
        recorder.run(
            "operators", f"{model}: {case.name}", functools.partial(_compared, model, case)
        )


def _compared(model: str, case: Case) -> Iterator[Check]:
    for compared in case.compare():
        detail = f"{compared.error:.2g}, allowed {compared.bound:.2g}"
        status: Status = "ok" if compared.ok else "failed"
        yield Check("operators", f"{model}: {compared.name}", status, detail)
