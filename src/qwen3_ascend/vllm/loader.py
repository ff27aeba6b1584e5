"""Fills a model of vLLM with a checkpoint: each rank reads its own ranges of the stored bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.config.utils import replace
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import in_the_same_node_as
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.checked import CheckedWeights, in_order_of_use
from qwen3_ascend.checkpoint.layout import ND
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.manifest import LinearEntry
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError, UserError
from qwen3_ascend.vllm.linears import copying
from qwen3_ascend.vllm.names import PLUGIN
from qwen3_ascend.vllm.one_line import say_in_one_line
from qwen3_ascend.vllm.shards import Rank, Rows, rows_of, shard_of


class StoredLoader(BaseModelLoader):
    """See the module docstring; vLLM makes the model, and calls this to fill it.

    In speculative decoding the target and its draft have one loader, and either may be of another
    format; that one is filled by vLLM's own.
    """

    @override
    def download_model(self, model_config: Any) -> None:
        """The front end has downloaded it (recognition.settle)."""

    @override
    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Fills every parameter, and ends the process if a byte is not the manifest's."""
        if model_config.quantization != PLUGIN:
            own = get_model_loader(replace(self.load_config, load_format="auto"))
            own.load_weights(model, model_config)
            return
        group = get_tp_group()
        with say_in_one_line(speaks=group.rank_in_group == 0):
            reader = CheckpointReader(Path(model_config.model))
            filling = Filling(model, reader)
            problem = _problem(filling, _to_check(filling.names, group))
            _agree(problem, group)


class Filling:
    """One filling of one rank's model.

    Attributes:
        names: of the stored tensors that this pipeline stage has.
    """

    def __init__(self, model: torch.nn.Module, reader: CheckpointReader) -> None:
        self._model, self._reader = model, reader
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters())
        manifest = reader.manifest
        self._linears = [name for name in manifest.linears if self._is_here(f"{name}.weight")]
        self._tensors = [name for name in manifest.tensors if self._is_here(name)]
        stored = {
            f"{name}.{suffix}"
            for name in self._linears
            for suffix in manifest.linears[name].tensors
        }
        self.names = [n for n in in_order_of_use(reader) if n in stored or n in self._tensors]

    def run(self, checked: Collection[str]) -> None:
        """Copies every byte once, those of `checked` after their hash.

        Raises:
            CheckpointError: if a tensor is damaged, or the model has no place for it.
        """
        with (
            _default_floats(),
            CheckedWeights(self._reader, checked=checked) as weights,
            copying(current_platform.device_type) as copy,
        ):
            for name in self._linears:
                self._fill_linear(name, weights.linear(name), copy)
            for name in self._tensors:
                self._fill_plain(name, weights.tensor(name))
        self._check_filled()

    def _fill_linear(self, name: str, linear: Linear, copy: Any) -> None:
        entry, module = self._reader.manifest.linears[name], self._modules.get(name)
        if len(entry.shape) > 2:
            self._fill_experts(name, entry, linear, copy)
            return
        if module is None:
            raise CheckpointError(f"linear {name}: the model of vLLM has no such layer")
        if isinstance(module, ParallelLMHead):
            self._fill_head(name, entry, module, linear, copy)
        else:
            module.quant_method.take(module, shard_of(linear, entry, _rank(module)), copy)

    def _fill_experts(self, name: str, entry: LinearEntry, linear: Linear, copy: Any) -> None:
        """vLLM 0.23 has one module of experts, newer ones have another in it for the weights."""
        experts, _, place = name.rpartition(".")
        found = self._modules.get(f"{experts}.routed_experts")
        module = self._modules.get(experts) if found is None else found
        if module is None:
            raise CheckpointError(f"linear {name}: the model of vLLM has no such experts")
        parallel = module.moe_config.moe_parallel_config
        part = shard_of(linear, entry, Rank(parallel.tp_rank, parallel.tp_size))
        module.quant_method.take_linear(module, place, part, copy)

    def _fill_head(
        self, name: str, entry: LinearEntry, module: Any, linear: Linear, copy: Any
    ) -> None:
        if entry.layout == ND:
            self._fill_plain(f"{name}.weight", linear.weight)
            return
        indices = module.shard_indices
        start, stop = indices.org_vocab_start_index, indices.org_vocab_end_index
        rows = Rows(start, stop - start, module.num_embeddings_per_partition)
        module.quant_method.take(module, rows_of(linear, rows), copy)

    def _fill_plain(self, name: str, tensor: Tensor) -> None:
        parameter = self._parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"tensor {name}: the model of vLLM has no such parameter")
        load = getattr(parameter, "weight_loader", default_weight_loader)
        load(parameter, tensor)

    def _check_filled(self) -> None:
        """A parameter that nothing fills would be computed with as it happens to be."""
        owners = (*(f"{name}." for name in self._linears), *self._tensors)
        left = [name for name in self._parameters if not name.startswith(owners)]
        if left:
            raise CheckpointError(f"the checkpoint has nothing for {left[0]} of the model of vLLM")

    def _is_here(self, name: str) -> bool:
        """Whether this stage of the pipeline has a weight; a pooling model has no head at all."""
        if name == f"{LM_HEAD}.weight" and LM_HEAD not in self._modules:
            return False
        return not is_pp_missing_parameter(name, self._model)


@contextmanager
def _default_floats() -> Iterator[None]:
    """torch's own type where none is said; vLLM loads with that of the model, which trials and
    self-checks of kernels are not written for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _rank(module: Any) -> Rank:
    """The place of this rank in the group that divides a linear, which may be one of its own."""
    copies = module.num_kv_head_replicas if isinstance(module, QKVParallelLinear) else 1
    return Rank(module.tp_rank, module.tp_size, copies)


def _to_check(names: list[str], group: Any) -> list[str]:
    """The tensors that this rank hashes: ranks that read the same files share the work."""
    if group.world_size > 1 and all(in_the_same_node_as(group.cpu_group)):
        return names[group.rank_in_group :: group.world_size]
    return names


def _problem(filling: Filling, checked: list[str]) -> str | None:
    try:
        filling.run(checked)
    except UserError as error:
        return str(error)
    return None


def _agree(problem: str | None, group: Any) -> None:
    """CheckpointError on every rank of a group if any of them has met a problem."""
    problems: list[str | None] = [problem] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(problems, problem, group=group.cpu_group)
    for found in problems:
        if found is not None:
            raise CheckpointError(found)
