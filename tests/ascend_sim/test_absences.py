"""Planted absences and releases: each shows what the older wheel or CANN shows, and goes away."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import cann, faults
from ascend_sim.test_faults import run_with

NORM_QUANT = "npu_add_rms_norm_dynamic_quant"
SCATTER = "npu_scatter_pa_kv_cache"
WIDTH = 128


def dev(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).npu()


def rotate(layout: str, width: int = WIDTH, heads: int = 8) -> None:
    leading = (1, 4) if layout == "BSND" else (4,)
    query, key = dev(*leading, heads, width), dev(*leading, 8, width)
    cos, sin = dev(*leading, 1, width), dev(*leading, 1, width)
    torch_npu.npu_apply_rotary_pos_emb(query, key, cos, sin, layout=layout)
    torch.npu.synchronize()


def scatter(**named: str) -> None:
    cache = torch.zeros(2, 128, 2, WIDTH, dtype=torch.bfloat16).npu()
    rows, slots = dev(3, 2, WIDTH), torch.arange(3, dtype=torch.int32).npu()
    torch_npu.npu_scatter_pa_kv_cache(rows, rows, cache, cache.clone(), slots, **named)
    torch.npu.synchronize()


def masked_norm() -> None:
    x, gamma = dev(4, 64), dev(64)
    torch_npu.npu_add_rms_norm_dynamic_quant(x, x, gamma, output_mask=[True, False])
    torch.npu.synchronize()


def schema(name: str) -> str:
    return str(getattr(torch.ops.npu, name).default._schema)


def test_an_absent_attribute_leaves_the_operator() -> None:
    with faults.without_attribute(NORM_QUANT):
        with pytest.raises(AttributeError, match=f"no attribute '{NORM_QUANT}'"):
            getattr(torch_npu, NORM_QUANT)
        assert NORM_QUANT in schema(NORM_QUANT)
    masked_norm()


def test_an_absent_operator_has_no_schema() -> None:
    with faults.without_operator(NORM_QUANT):
        assert not hasattr(torch_npu, NORM_QUANT) and not hasattr(torch.ops.npu, NORM_QUANT)
        assert NORM_QUANT not in dir(torch.ops.npu) and SCATTER in dir(torch.ops.npu)
        assert hasattr(torch.ops.npu, SCATTER)
    assert NORM_QUANT in schema(NORM_QUANT)
    masked_norm()


def test_an_absent_operator_of_atb() -> None:
    with faults.without_operator("_npu_paged_attention"):
        assert not hasattr(torch.ops.atb, "_npu_paged_attention")
        assert hasattr(torch.ops.atb, "_npu_reshape_and_cache")
    assert hasattr(torch.ops.atb, "_npu_paged_attention")


def test_without_cache_mode_the_plain_cache_is_refused() -> None:
    whole = schema(SCATTER)
    assert "cache_mode" in whole
    with faults.without_cache_mode():
        shown = schema(SCATTER)
        assert "cache_mode" not in shown and "slot_mapping" in shown and "->" in shown
        arguments = getattr(torch.ops.npu, SCATTER).default._schema.arguments
        assert "cache_mode" not in [each.name for each in arguments]
        with pytest.raises(
            RuntimeError, match="Unknown keyword argument 'cache_mode' for operator"
        ):
            scatter(cache_mode="Norm")
        with pytest.raises(RuntimeError, match="PA_NZ"):
            scatter()
    assert schema(SCATTER) == whole
    scatter(cache_mode="Norm")


def test_torch_refuses_an_unknown_argument_in_the_words_of_the_plant() -> None:
    """The plant speaks as torch does of an argument that the real schema lacks."""
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'cache_form' for operator"):
        scatter(cache_mode="Norm", cache_form="Norm")


def test_rotary_without_tnd() -> None:
    rotate("TND")
    with faults.rotary_without_tnd():
        rotate("BSND")
        with pytest.raises(RuntimeError, match="q shape dims is not four"):
            rotate("TND")
        with pytest.raises(RuntimeError, match="head size must be one of"):
            rotate("BSND", width=64)
    rotate("TND", width=64)


@pytest.mark.parametrize(("heads", "rule"), [(68, None), (69, "unified buffer"), (250, "than 255")])
def test_rotary_heads_have_to_fit_a_core(heads: int, rule: str | None) -> None:
    """With 8 key heads: 76 fit, 77 do not."""
    if rule is None:
        rotate("BSND", heads=heads)
        return
    with pytest.raises(RuntimeError, match=rule):
        rotate("BSND", heads=heads)


def test_a_masked_output_of_the_whole_shape() -> None:
    masked_norm()
    with (
        faults.whole_masked_output(),
        pytest.raises(RuntimeError, match="EZ1001.*same with output"),
    ):
        masked_norm()
    masked_norm()


def test_an_operator_that_refuses_some_calls() -> None:
    assert "aclnnSwiGlu" in ascend_sim.operators()
    wide = faults.refusing("aclnnSwiGlu", "too wide", lambda x, *rest: x.layout.size[-1] > 64)
    with wide:
        torch_npu.npu_swiglu(dev(2, 64), dim=-1)
        with pytest.raises(RuntimeError, match="aclnnSwiGlu: too wide"):
            torch_npu.npu_swiglu(dev(2, 128), dim=-1)
    torch_npu.npu_swiglu(dev(2, 128), dim=-1)


@pytest.mark.parametrize(("columns", "wrong"), [(7840, False), (7872, True)])
@pytest.mark.parametrize("rows", [1, 3])
def test_corrupt_wide_rows(columns: int, wrong: bool, rows: int) -> None:
    x = dev(rows, 2 * columns)
    expected = torch_npu.npu_dynamic_quant(torch_npu.npu_swiglu(x, dim=-1))[1].cpu()
    with faults.corrupt_wide_swiglu():
        scale = torch_npu.npu_dequant_swiglu_quant(x, activate_left=True, quant_mode=1)[1].cpu()
    assert torch.allclose(scale, expected, rtol=0.01) != wrong


# -------------------------------------------------------------------------- graph handlers
def imported_handlers() -> Any:
    return importlib.import_module("torch_npu.npu._npugraph_handlers.npugraph_handler")


@pytest.fixture
def specs() -> Iterator[Any]:
    """The wheel under test has the newest form, and has it again afterwards."""
    registry = imported_handlers()._NPU_GRAPH_OP_HANDLERS
    before = {name: handler.get_update_specs(name) for name, handler in registry.items()}
    yield registry
    after = {name: handler.get_update_specs(name) for name, handler in registry.items()}
    assert after == before and any(before.values())


def test_handlers_with_a_table(specs: Any) -> None:
    with faults.graph_handlers("table"):
        paged = specs["_npu_paged_attention.default"]
        assert not hasattr(paged, "get_update_specs") and not hasattr(paged, "UPDATE_SPECS")
        assert paged._OP_ARG_SPECS["_npu_paged_attention.default"] == (7, "context_lens")
        assert not hasattr(specs["npu_fused_infer_attention_score.out"], "_OP_ARG_SPECS")


@pytest.mark.parametrize("paged", [True, False])
def test_hard_coded_handlers(paged: bool, specs: Any) -> None:
    plant = faults.graph_handlers("hard_coded" if paged else "hard_coded_without_paged")
    with plant:
        with pytest.raises(ModuleNotFoundError):
            imported_handlers()
        source = inspect.getsource(torch_npu.npu.graphs)
        assert "actual_seq_lengths_kv" in source
        assert ("_npu_paged_attention.default" in source) == paged
        assert ("_npu_paged_attention.default" in specs) == paged
    assert "class NPUGraph" in inspect.getsource(torch_npu.npu.graphs)


# -------------------------------------------------------------------------------- generations
def attempts() -> dict[str, bool]:
    """What works at this moment."""

    def works(call: Any, *values: Any, **named: Any) -> bool:
        try:
            call(*values, **named)
        except RuntimeError:
            return False
        return True

    return {
        "rotary TND": works(rotate, "TND"),
        "rotary BSND": works(rotate, "BSND"),
        "rotary 64": works(rotate, "BSND", width=64),
        "cache_mode": works(scatter, cache_mode="Norm"),
        "masked output": works(masked_norm),
    }


EVERYTHING = {"rotary TND", "rotary BSND", "rotary 64", "cache_mode", "masked output"}
WORKS = {
    "8.3": {"rotary BSND"},
    "8.5": {"rotary BSND", "masked output"},
    "9.0": EVERYTHING - {"rotary TND"},
    "9.1": EVERYTHING,
}


@pytest.mark.parametrize("name", cann.GENERATIONS)
def test_what_works_with_which_release(name: str) -> None:
    with cann.pretending(name):
        assert cann.current().name == name
        assert {attempt for attempt, worked in attempts().items() if worked} == WORKS[name]
    assert cann.current().name == "9.1" and all(attempts().values())


SHOW = """
from ascend_sim import cann
from torch_npu.npu.utils import get_cann_version
print(cann.current().name, get_cann_version("CANN"))
print("cache_mode" in str(torch.ops.npu.npu_scatter_pa_kv_cache.default._schema))
"""


@pytest.mark.parametrize(("name", "version"), [("8.3", "8.3.RC1"), ("9.0", "9.0.0")])
def test_the_environment_chooses_the_release(name: str, version: str) -> None:
    shown = run_with({"ASCEND_SIM_CANN": name}, SHOW).split()
    assert shown[-3:] == [name, version, str(name == "9.0")]


def test_an_unknown_release_is_refused() -> None:
    with pytest.raises(ValueError, match="ASCEND_SIM_CANN=9.2 is none of 8.3, 8.5, 9.0, 9.1"):
        cann.named("9.2")


def test_faults_for_a_whole_process() -> None:
    shown = run_with({"ASCEND_SIM_FAULTS": "no_atb,without_cache_mode"}, SHOW).split()
    assert shown[-1] == "False"
    with pytest.raises(ValueError, match="with_luck is none of no_atb"):
        faults.plant_for_the_process(["with_luck"])


PLANTS: list[AbstractContextManager[None]] = [plant() for plant in faults.PLANTS.values()]


@pytest.mark.parametrize("plant", PLANTS, ids=list(faults.PLANTS))
def test_every_named_plant_goes_away(plant: AbstractContextManager[None]) -> None:
    with plant:
        pass
    assert all(attempts().values())
