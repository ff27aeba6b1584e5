"""Trials of the forms of an operation: values of the model's own sizes, and what must come out.

A trial raises if a form does not give what the definition gives on the host, with the tolerance
that conformance.py allows: one code, and the last bits of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_ascend.checkpoint.config import ExpertsConfig, Qwen3Config
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.schemes import W8A8
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.runtime.backends.base import QuantizedActivation, as_codes
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.npu import formats
from qwen3_ascend.runtime.backends.npu.experts import (
    ChooseExperts,
    GateExperts,
    Int8Experts,
    RouteCodes,
    RoutedRows,
    choose_then_normalize,
)
from qwen3_ascend.runtime.backends.npu.operators import (
    CacheWrite,
    GatedQuant,
    MaskedAttention,
    NormQuant,
    Rotate,
)
from qwen3_ascend.runtime.backends.reference import rms_norm, rotate_half

ROWS = (1, 3, 17)
"""Tokens: one, a few, and more than there are rows in a tile."""

BLOCKS, BLOCK_SIZE, SLOTS = 3, 128, (129, 300, 7)
"""A small cache, and where three tokens go in it."""

SCALE_BOUND = 2.0**-7
"""Relative difference of the scale of a row, if its largest value was rounded to bfloat16."""

ROTATED_BOUND = 2.0**-5
"""Of values up to four: a unit of bfloat16 in either product."""

CONTEXTS = (5, 200)
"""Tokens of two requests."""

ATTENDED_BOUND = 2.0**-5
"""Of means of values up to four, whose probabilities may have been rounded to bfloat16."""

PEAK = 4.5
"""Gate and up of the largest value of a row: beyond what random values reach, and not so far that
the others would all get code zero."""


class Mismatch(Exception):
    """A form has computed something else than the definition."""


def cache_write(config: Qwen3Config) -> Callable[[CacheWrite], None]:
    """Three tokens into a cache of three blocks, and nothing else changed."""
    width = (config.num_kv_heads, config.head_dim)
    key, value = (_normal(len(SLOTS), *width, seed=seed) for seed in (1, 2))
    slots = torch.tensor(SLOTS, dtype=torch.int32)

    def trial(write: CacheWrite) -> None:
        shape = (BLOCKS, BLOCK_SIZE, *width)
        cache = LayerKV(*(torch.zeros(shape, dtype=torch.bfloat16).to("npu") for _ in range(2)))
        write(key.to("npu"), value.to("npu"), cache, slots.to("npu"))
        for name, held, rows in (("keys", cache.keys, key), ("values", cache.values, value)):
            expected = torch.zeros(shape, dtype=torch.bfloat16)
            expected.flatten(0, 1)[slots] = rows
            if not torch.equal(held.cpu(), expected):
                raise Mismatch(f"the {name} do not lie where they belong")

    return trial


def norm_quant(config: Qwen3Config) -> Callable[[NormQuant], None]:
    """Sums of the model's hidden size, and a first layer, which has nothing to add."""
    weight, epsilon = _normal(config.hidden_size, seed=3), config.rms_norm_eps

    def trial(form: NormQuant) -> None:
        for rows in ROWS:
            hidden, delta = (_normal(rows, config.hidden_size, seed=seed) for seed in (4, 5))
            for added in (None, delta):
                total = hidden if added is None else hidden + added
                expected = rms_norm(total.float(), weight, epsilon)
                on_device = None if added is None else added.to("npu")
                codes, summed = form(hidden.to("npu"), on_device, weight.to("npu"), epsilon)
                _compare_codes(codes, expected)
                _compare("the sum", summed, total, SCALE_BOUND * float(total.abs().max()))

    return trial


def gated_quant(config: Qwen3Config) -> Callable[[GatedQuant], None]:
    """Rows of the model's own intermediate size, each with its largest value at another place: a
    kernel that computes a row in tiles has to find it in any of them."""

    def trial(form: GatedQuant) -> None:
        for rows in ROWS:
            gate_up = gated_rows(rows, config.intermediate_size)
            gate, up = gate_up.float().chunk(2, dim=-1)
            _compare_codes(form(gate_up.to("npu")), F.silu(gate) * up)

    return trial


def gated_rows(rows: int, inner: int) -> Tensor:
    """Gate and up [rows, 2 * inner], whose largest products lie at places spread over a row."""
    gate_up = _normal(rows, 2 * inner, seed=6)
    places = torch.linspace(inner - 1, 0, rows).long()
    gate_up[torch.arange(rows), places] = PEAK
    gate_up[torch.arange(rows), inner + places] = PEAK
    return gate_up


def expert_choice(config: Qwen3Config) -> Callable[[ChooseExperts], None]:
    """Logits of as many experts as the model has, some of them equal."""
    experts = mixture_of(config)

    def trial(form: ChooseExperts) -> None:
        for rows in ROWS:
            logits = _normal(rows, experts.count, seed=16)
            logits[:, 0] = logits[:, -1] = logits.amax(-1)
            found = form(logits.to("npu"), experts.per_token, experts.normalize)
            order = logits.sort(dim=-1, descending=True, stable=True).indices
            chosen = order[:, : experts.per_token]
            if not torch.equal(found.chosen.cpu().long(), chosen):
                raise Mismatch("the experts are not those of the greatest logits")
            shares = logits.float().softmax(-1).gather(-1, chosen)
            if experts.normalize:
                shares = shares / shares.sum(-1, keepdim=True)
            _compare("the weights", found.weights, shares, SCALE_BOUND)

    return trial


def expert_route(config: Qwen3Config) -> Callable[[RouteCodes], None]:
    """Tokens of the model's hidden size, each of them given to several experts."""
    experts = mixture_of(config)

    def trial(form: RouteCodes) -> None:
        for rows in ROWS:
            x = _normal(rows, config.hidden_size, seed=12)
            logits = _normal(rows, experts.count, seed=13).to("npu")
            routing = choose_then_normalize(logits, experts.per_token, True)
            routed = form(x.to("npu"), routing)
            places, chosen = routed.places.cpu().long(), routing.chosen.cpu().long().flatten()
            owners = torch.empty_like(places)
            owners[places] = torch.arange(rows).repeat_interleave(experts.per_token)
            _compare_codes(as_codes(routed.values), x.float()[owners])
            if not torch.equal(routed.counts.cpu(), chosen.bincount(minlength=experts.count)):
                raise Mismatch("the counts of rows are not those of the experts")

    return trial


def expert_gate(config: Qwen3Config) -> Callable[[GateExperts], None]:
    """A few experts of the model's own sizes, one of them without rows."""
    experts, hidden = mixture_of(config), config.hidden_size
    shape = (3, 2 * experts.intermediate_size, hidden)
    weight = _normal(*shape, seed=14) / hidden**0.5
    linear = quantize(W8A8(), weight, None, ASCEND_A2_A3.layout(W8A8(), "", shape))
    codes, scale = quantize_tokens(_normal(5, hidden, seed=15))
    owners = torch.tensor([0, 0, 0, 2, 2])

    def trial(form: GateExperts) -> None:
        loaded = Int8Experts.load(linear, formats.upload_packed)
        counts = owners.bincount(minlength=3)
        fed = QuantizedActivation(codes.to("npu"), scale.to("npu"))
        routed = RoutedRows(fed, torch.arange(5, dtype=torch.int32).to("npu"), counts.to("npu"))
        products = [
            linear.matrix(int(owner)).scheme.decode(linear.matrix(int(owner)).codes())
            @ (codes[row].float() * scale[row])
            for row, owner in enumerate(owners)
        ]
        gate, up = torch.stack(products).chunk(2, dim=-1)
        _compare_codes(form(routed, loaded), F.silu(gate) * up)

    return trial


def mixture_of(config: Qwen3Config) -> ExpertsConfig:
    """The mixtures of a model that has some."""
    assert config.experts is not None, "a dense model has no experts to try"
    return config.experts


def rotate(config: Qwen3Config) -> Callable[[Rotate], None]:
    """All heads of three tokens, each with angles of its own."""
    tokens, width = len(SLOTS), config.head_dim
    query = _normal(tokens, config.num_heads, width, seed=7)
    key = _normal(tokens, config.num_kv_heads, width, seed=8)
    angles = torch.linspace(0, 6, tokens * width // 2).view(tokens, 1, -1).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def trial(form: Rotate) -> None:
        results = form(*(tensor.to("npu") for tensor in (query, key, cos, sin)))
        for name, given, actual in zip(("query", "key"), (query, key), results, strict=True):
            values = given.float()
            expected = values * cos.float() + rotate_half(values) * sin.float()
            _compare(f"the {name}", actual, expected, ROTATED_BOUND)

    return trial


def masked_attention(config: Qwen3Config) -> Callable[[MaskedAttention], None]:
    """Two requests whose contexts end in the first and in the second of two blocks, one shared."""
    shape = (BLOCKS + 1, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    query = _normal(len(CONTEXTS), config.num_heads, config.head_dim, seed=9)
    keys, values = (_normal(*shape, seed=seed) for seed in (10, 11))
    table = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
    hidden = torch.arange(table.shape[1] * BLOCK_SIZE) >= torch.tensor(CONTEXTS).unsqueeze(1)

    def trial(form: MaskedAttention) -> None:
        cache = LayerKV(keys.to("npu"), values.to("npu"))
        actual = form(query.to("npu"), cache, table.to("npu"), hidden.unsqueeze(1).to("npu"))
        expected = []
        for row, length in enumerate(CONTEXTS):
            places = (held[table[row].long()].flatten(0, 1)[:length] for held in (keys, values))
            expected.append(_attention(query[row], *places))
        _compare("attention", actual, torch.stack(expected), ATTENDED_BOUND)

    return trial


def _attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Of one token [heads, head_dim] over [places, kv_heads, head_dim]."""
    group = query.shape[0] // keys.shape[1]
    keys, values = (each.float().repeat_interleave(group, 1) for each in (keys, values))
    scores = torch.einsum("hd,khd->hk", query.float(), keys) * query.shape[-1] ** -0.5
    return torch.einsum("hk,khd->hd", scores.softmax(-1), values)


def _compare_codes(actual: QuantizedActivation, expected: Tensor) -> None:
    codes, scale = quantize_tokens(expected)
    off = int((actual.codes.cpu().int() - codes.int()).abs().max())
    stretch = float((actual.scale.cpu() / scale - 1).abs().max())
    if off > 1 or not stretch <= SCALE_BOUND:
        shape = list(expected.shape)
        raise Mismatch(f"of {shape}, codes are up to {off} and scales {stretch:.2g} off")


def _compare(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    error = float((actual.cpu().float() - expected.float()).abs().max())
    if not error <= bound:
        raise Mismatch(f"{name} is {error:.2g} off, {bound:.2g} allowed")


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
