"""What SGLang 0.5.23 lacks where there is no CANN and no Triton for Ascend.

These are packages that no registry has and that a container of SGLang brings along. Importing this
module defines them, and has to come before torch_npu: ASCEND_SIM_THEN names it to every process.

- `sgl_kernel_npu`, SGLang's kernels: the two that serving a dense Qwen3 calls are written in torch
  below, after what their sources compute (sgl-project/sgl-kernel-npu). Neither is part of loading.
  The others that are asked for at import say so when called.
- `torchair`, the graph engine of a CANN, whose libraries torch_npu's copy of it loads. SGLang asks
  it for a compiler while it is imported, for functions that it does not compile on an NPU.

SGLang's other Triton kernels are its own, and run in Triton's interpreter: see run_sglang.py.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch

from handover import torchvision_schemas

__all__ = ["torchvision_schemas"]  # imported for what it defines


def split_qkv_rmsnorm_rope(
    fused: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    query_size: int,
    key_size: int,
    head_size: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel of norm/split_qkv_rmsnorm_rope.py: fused [tokens, q | k | v], sin and cos
    [tokens, 1, 1, head_size]. Norms in float32, rounds, and rotates halves."""
    query, key, value = fused.split([query_size, key_size, key_size], dim=-1)
    sin, cos = (each.reshape(-1, 1, head_size).float() for each in (sin, cos))

    def prepared(
        part: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        heads = part.reshape(len(part), -1, head_size).float()
        normed = heads * (heads.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
        normed = normed if bias is None else normed + bias.float()
        normed = normed.to(torch.bfloat16).float()
        first, second = normed.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1) * sin + normed * cos
        return rotated.to(part.dtype).reshape(part.shape)

    return prepared(query, q_weight, q_bias), prepared(key, k_weight, k_bias), value.contiguous()


class AllocateExtension:
    """The kernel of mem_cache/allocator.py: places in the cache for the new tokens of each row,
    first in its last page, which is partly full, then in free pages."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._run, grid[0])

    def _run(
        self,
        rows: int,
        lengths_before: torch.Tensor,
        lengths: torch.Tensor,
        last_places: torch.Tensor,
        free_pages: torch.Tensor,
        places: torch.Tensor,
        _rows_at_most: int,
        page_size: int,
        _tokens_at_most: int,
    ) -> None:
        """lengths_before, lengths and last_places [rows], free_pages [pages], places [tokens]. The
        last place of a row that has none yet is -1."""
        free = iter(free_pages.tolist())
        found: list[int] = []
        for row in range(rows):
            before, length = int(lengths_before[row]), int(lengths[row])
            place = int(last_places[row])
            for position in range(before, length):
                place = next(free) * page_size if position % page_size == 0 else place + 1
                found.append(place)
        places.copy_(torch.tensor(found, dtype=places.dtype))


def absent(name: str) -> Callable[..., NoReturn]:
    """A kernel that nothing here should call."""

    def called(*_args: object, **_named: object) -> NoReturn:
        raise NotImplementedError(f"{name} is not on a registry and has no replacement here")

    return called


def define(name: str, **members: object) -> None:
    """Makes a module importable, and the packages that it lies in."""
    whole = ""
    for part in name.split("."):
        parent, whole = sys.modules.get(whole), f"{whole}.{part}".lstrip(".")
        if whole not in sys.modules:
            module: Any = ModuleType(whole)
            module.__path__ = []  # a package, in which nothing else is found
            sys.modules[whole] = module
            if parent is not None:
                setattr(parent, part, module)
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def define_all() -> None:
    kernels = "sgl_kernel_npu"
    define(f"{kernels}.norm.split_qkv_rmsnorm_rope", split_qkv_rmsnorm_rope=split_qkv_rmsnorm_rope)
    define(f"{kernels}.mem_cache.allocator", alloc_extend_kernel=AllocateExtension())
    sinks = ("attention_sinks_prefill_triton", "attention_sinks_triton")
    define(f"{kernels}.attention.sinks_attention", **{name: absent(name) for name in sinks})
    transfers = ("TransferDirection", "transfer_kv_dim_exchange", "transfer_mamba_state")
    define(f"{kernels}.kvcacheio", **{name: absent(name) for name in transfers})
    define("torchair", get_npu_backend=lambda compiler_config: absent("torchair"))
    define("torchair.ge_concrete_graph.ge_converter.experimental.patch_for_hcom_allreduce")
    define("torchair.configs.compiler_config", CompilerConfig=SimpleNamespace)


def keep_one_rule_for_each_seed() -> None:
    """Torch's tracer has a rule for each function of torch, by name, and refuses two for one.

    SGLang lets torch_npu 2.13 put its functions in the place of torch.cuda's. Then torch 2.13 finds
    two rules for torch.npu.manual_seed, SGLang's Qwen3, which is decorated, cannot be imported, and
    SGLang goes on with that of transformers. Nothing is traced here, so torch's rules can go.
    """
    from torch._dynamo.trace_rules import torch_name_rule_map

    for rules in torch_name_rule_map:
        for name in ("manual_seed", "manual_seed_all"):
            rules.pop(f"torch.cuda.random.{name}", None)


def apply() -> None:
    """What SGLang calls in each of its processes."""
    if os.environ.get("HANDOVER_LOADING"):
        from sglang.srt.model_loader.loader import DefaultModelLoader

        from handover.device_work import record_with

        folder = Path(os.environ["HANDOVER_LOADING"])
        record_with(DefaultModelLoader, folder, rank=lambda: 0, weights=True)


define_all()
keep_one_rule_for_each_seed()
