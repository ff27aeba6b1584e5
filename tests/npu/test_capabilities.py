"""What a machine lacks is met by another form, and the tokens stay those of the CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ascend_sim
import pytest
import torch_npu
from ascend_sim import cann
from ascend_sim.cann import pretending
from npu.lacks import LACKS

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.npu import graph_updates
from qwen3_ascend.runtime.backends.npu.capabilities import (
    FUSED_LENGTHS,
    OPERATIONS,
    PAGED_LENGTHS,
    Capabilities,
    probe,
)
from qwen3_ascend.runtime.backends.npu.device import in_one_line, open_device
from qwen3_ascend.runtime.backends.npu.graph_updates import UpdatedArgument, update_support
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

Patch = pytest.MonkeyPatch

PROMPTS = [f"What does {word} mean?" for word in ("river", "bicycle", "house")]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


def tokens_of(path: Path, device: str = "npu", **options: Any) -> list[tuple[int, ...]]:
    if device == "npu":
        options = {"buckets": (1, 2, 4), **options}
    llm = load(path, device=device, kv_cache_tokens=1024, max_batch=4, **options)
    return [answer.token_ids for answer in llm.generate(PROMPTS, PARAMS)]


def probed() -> Capabilities:
    open_device()
    return probe(SMALL_CONFIG)


CHOSEN = {
    "8.3": {"cache_write": 1, "norm_quant": 1},
    "8.5": {"cache_write": 1},
    "9.0": {},
    "9.1": {},
}
"""The numbers of the forms that are used with each CANN and a wheel of it, where not the first."""


@pytest.mark.every_mode
@pytest.mark.parametrize("cann", [name for name in CHOSEN if name <= cann.current().name])
def test_each_cann_has_its_forms_and_the_tokens_of_the_cpu(
    cann: str, checkpoints: dict[str, Path]
) -> None:
    """With graphs, whose updates are of three generations; in a process that pretends an older
    CANN, only that and those before: what its wheel lacks cannot be given back."""
    expected = tokens_of(checkpoints["w8a8"], "cpu")
    ascend_sim.reset_trace()
    with pretending(cann):
        capabilities = probed()
        tokens = tokens_of(checkpoints["w8a8"])
    assert tokens == expected and ascend_sim.trace.replays()
    for name, choice in capabilities.choices.items():
        form = CHOSEN[cann].get(name, 0)
        assert choice.form is OPERATIONS[name].forms[form], name
        assert bool(choice.reason) == bool(form)
    unusable = {name for name, each in capabilities.supports.items() if not each.usable}
    assert unusable == ({"paged_update"} if cann == "8.3" else set())


@pytest.mark.every_mode
@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_is_met_by_another_form_and_equal_tokens(
    lack: str, checkpoints: dict[str, Path]
) -> None:
    plant, field, form, reason = LACKS[lack]
    expected = tokens_of(checkpoints["w8a8"], "cpu")
    sound = probed()
    with plant():
        capabilities = probed()
        tokens = tokens_of(checkpoints["w8a8"])
    for name, choice in capabilities.choices.items():
        forms = OPERATIONS[name].forms
        usual = forms.index(sound.choices[name].form)
        assert choice.form is forms[max(form, usual) if name == field else usual], name
    assert reason in capabilities.choices[field].reason
    assert tokens == expected


@pytest.mark.parametrize(("inner", "form"), [(3072, 0), (9728, 1), (25600, 1)])
def test_wide_rows_are_tried_at_the_width_of_the_model(inner: int, form: int) -> None:
    """A kernel that is wrong only where a row takes several tiles: Qwen3-4B and larger."""
    open_device()
    config = dataclasses.replace(SMALL_CONFIG, intermediate_size=inner)
    with ascend_sim.faults.corrupt_wide_swiglu():
        chosen = probe(config).gated_quant
    assert chosen.form is OPERATIONS["gated_quant"].forms[form]
    assert ("codes are up to" in chosen.reason) == bool(form)
    assert probe(config).gated_quant.form is OPERATIONS["gated_quant"].forms[0]


def test_what_torch_npu_raises_becomes_one_line() -> None:
    raised = RuntimeError(
        "npu_x:../third_party/op-plugin/x.cpp:124 NPU function error: call aclnnX failed, error "
        "code is 161002\n[ERROR] 2026 (PID:1) ERR00100 PTA call acl api failed\n[Error]: Parameter "
        "verification failed.\n   EZ1001: the shape is wrong\n  TraceBack (most recent call last):"
    )
    assert in_one_line(raised) == (
        "call aclnnX failed, error code is 161002: EZ1001: the shape is wrong"
    )
    assert in_one_line(OSError()) == "OSError"
    assert in_one_line(RuntimeError("no stack\nbut lines")) == "no stack"


def test_an_operation_without_any_form_says_what_was_tried(monkeypatch: Patch) -> None:
    for name in ("npu_apply_rotary_pos_emb", "npu_rotary_mul"):
        monkeypatch.delattr(torch_npu, name)
    with pytest.raises(DeviceError, match="rotary embedding: no operator for it.*npu_rotary_mul"):
        probed()


@pytest.mark.parametrize("field", OPERATIONS)
def test_each_form_can_be_asked_for(field: str) -> None:
    capabilities = probed()
    for form in OPERATIONS[field].forms:
        changed = capabilities.using(field, form)
        assert changed.choices[field].form is form
        others = {name: choice for name, choice in changed.choices.items() if name != field}
        assert others.items() <= capabilities.choices.items()


# ----------------------------------------------------------------------- updates of graphs
OF_CANN_8_5 = """
    def update_capture_record(self, record, update_input):
        if record.__name__ in ["npu_fused_infer_attention_score.out"]:
            position, key = 6, "actual_seq_lengths_kv"
        elif record.__name__ == "_npu_paged_attention.default":
            position, key = 7, "context_lens"
"""
"""The names in npu/graphs.py of torch_npu 2.9.0; 2.7.1 has the first of them only, and in no table
the key of it."""

OF_CANN_8_3 = """
    def __torch_dispatch__(self, func):
        elif func.__name__ == "npu_fused_infer_attention_score.out":
"""

ARGUMENTS = (FUSED_LENGTHS, PAGED_LENGTHS)


def with_code(code: str, patch: Patch, folder: Path) -> None:
    """A torch_npu without handlers, whose npu/graphs.py is this."""
    path = folder / "graphs.py"
    path.write_text("class Mode:\n" + "\n".join(f"    # {line}" for line in code.splitlines()))
    spec = importlib.util.spec_from_file_location("old_graphs", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    patch.setattr(torch_npu.npu, "graphs", module)
    patch.setitem(sys.modules, graph_updates.HANDLERS, None)


def usable() -> list[bool]:
    return [update_support(argument).usable for argument in ARGUMENTS]


def test_updates_of_wheels_without_handlers(monkeypatch: Patch, tmp_path: Path) -> None:
    with_code(OF_CANN_8_5, monkeypatch, tmp_path)
    assert usable() == [True, True]
    assert update_support(PAGED_LENGTHS).detail == "npu/graphs.py"


def test_updates_of_wheels_that_do_not_record_paged_attention(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    """There a replay would attend over the lengths of the capture."""
    with_code(OF_CANN_8_3, monkeypatch, tmp_path)
    assert usable() == [True, False]
    assert "does not update it" in update_support(PAGED_LENGTHS).detail


def handlers_of_cann_9_0() -> ModuleType:
    """The registry of torch_npu 2.10.0: no get_update_specs, and no table for the fused kernel."""
    fused = type("_IFAv1DefaultHandler", (), {})
    table = {"_npu_paged_attention.default": (7, "context_lens")}
    simple = type("_SimpleGraphHandler", (), {"_OP_ARG_SPECS": table})
    module = ModuleType(graph_updates.HANDLERS)
    registry = {FUSED_LENGTHS.operator: fused, PAGED_LENGTHS.operator: simple}
    module.__dict__["_NPU_GRAPH_OP_HANDLERS"] = registry
    return module


def test_updates_of_wheels_whose_handlers_have_tables(monkeypatch: Patch) -> None:
    module = handlers_of_cann_9_0()
    monkeypatch.setitem(sys.modules, graph_updates.HANDLERS, module)
    assert usable() == [True, True]
    assert update_support(PAGED_LENGTHS).detail == "its table of handlers"
    module.__dict__["_NPU_GRAPH_OP_HANDLERS"].pop(FUSED_LENGTHS.operator)
    assert usable() == [False, True]


def test_an_argument_that_does_not_exist_is_not_updated() -> None:
    """torch_npu itself ignores an unknown key in silence."""
    for argument in ARGUMENTS:
        wrong = UpdatedArgument(argument.operator, "context_length", argument.by_keyword)
        assert "does not update it" in update_support(wrong).detail
        assert not update_support(wrong).usable
    unknown = UpdatedArgument("npu_no_such_operator.out", "lengths", by_keyword=True)
    assert not update_support(unknown).usable


@pytest.mark.every_mode
def test_without_updates_steps_run_eagerly_with_a_warning(
    checkpoints: dict[str, Path], monkeypatch: Patch, tmp_path: Path
) -> None:
    expected = tokens_of(checkpoints["w8a8"], "cpu")
    with_code(OF_CANN_8_3, monkeypatch, tmp_path)
    ascend_sim.reset_trace()
    with pytest.warns(UserWarning, match="not captured as graphs.*context_lens.*graph=off"):
        assert tokens_of(checkpoints["w8a8"], attention="paged") == expected
    assert ascend_sim.trace.replays() == []
    assert tokens_of(checkpoints["w8a8"], attention="paged", graph=False) == expected


# ----------------------------------------------------------- where a refusal ends the process
WITH_TASK_QUEUE_2 = """
import sys, ascend_sim
ascend_sim.install()
from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime.backends.npu.capabilities import OPERATIONS, probe
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG
llm = load(sys.argv[1], device="npu", kv_cache_tokens=1024, max_batch=4, graph=False)
for answer in llm.generate(sys.argv[2:], SamplingParams(max_new_tokens=12, ignore_eos=True)):
    print(*answer.token_ids)
capabilities = probe(SMALL_CONFIG)
choices = capabilities.choices.items()
print(all(choice.form is OPERATIONS[name].forms[-1] for name, choice in choices))
"""


def test_with_a_queue_that_does_not_survive_refusals_nothing_is_tried(
    checkpoints: dict[str, Path],
) -> None:
    """TASK_QUEUE_ENABLE=2 is read once, so this is a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WITH_TASK_QUEUE_2, str(checkpoints["w8a8"]), *PROMPTS],
        env=os.environ | {"TASK_QUEUE_ENABLE": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    expected = [" ".join(map(str, tokens)) for tokens in tokens_of(checkpoints["w8a8"], "cpu")]
    assert done.stdout.splitlines()[-4:] == [*expected, "True"], done.stderr
