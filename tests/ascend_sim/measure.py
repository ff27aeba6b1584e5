"""How fast the simulator is: `python -m ascend_sim.measure` with PYTHONPATH=tests.

Prints launches per second, eager and replayed, for a stream of small operators and for the
operators of a Qwen3-shaped decode layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ascend_sim

ascend_sim.install()

import torch  # noqa: E402  (the simulator has to come first)
import torch_npu  # noqa: E402

HALF = torch.bfloat16
HIDDEN, HEADS, KV_HEADS, WIDTH, MLP, BLOCK, BATCH = 256, 4, 2, 128, 512, 128, 4


def decode_layer() -> Callable[[], None]:
    """Quantized decode of one layer: 11 launches."""

    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(-99, 99, (rows, columns), dtype=torch.int8).npu()
        return torch_npu.npu_format_cast(codes, 29), torch.rand(columns).npu() / 1000

    torch_npu.npu.config.allow_internal_format = True
    qkv_size = (HEADS + 2 * KV_HEADS) * WIDTH
    qkv, o, up, down = (
        weight(*shape)
        for shape in ((HIDDEN, qkv_size), (HEADS * WIDTH, HIDDEN), (HIDDEN, 2 * MLP), (MLP, HIDDEN))
    )
    gamma, head_gamma = torch.ones(HIDDEN).to(HALF).npu(), torch.ones(WIDTH).to(HALF).npu()
    cos, sin = (torch.rand(BATCH, 1, WIDTH).to(HALF).npu() for _ in range(2))
    keys, values = (torch.randn(8, BLOCK, KV_HEADS, WIDTH).to(HALF).npu() for _ in range(2))
    slots = torch.arange(BATCH, dtype=torch.int32).npu()
    table = torch.arange(2 * BATCH, dtype=torch.int32).view(BATCH, 2).npu()
    x, residual = torch.randn(2, BATCH, HIDDEN).to(HALF).npu().unbind()
    lengths = torch.full((BATCH,), 40, dtype=torch.int32)
    out = torch.empty(BATCH, HEADS, WIDTH, dtype=HALF, device="npu")

    def product(
        w: tuple[torch.Tensor, torch.Tensor], codes: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        return torch_npu.npu_quant_matmul(
            codes, w[0], w[1], pertoken_scale=scale, output_dtype=HALF
        )

    def run() -> None:
        codes, _, total, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(x, residual, gamma)
        q, k, v = (
            product(qkv, codes, scale).view(BATCH, -1, WIDTH).split((HEADS, KV_HEADS, KV_HEADS), 1)
        )
        q, k = (torch_npu.npu_rms_norm(t, head_gamma)[0] for t in (q, k))
        torch_npu.npu_apply_rotary_pos_emb(q, k, cos, sin, "TND")
        torch_npu._npu_reshape_and_cache(k, v.contiguous(), keys, values, slots)
        torch_npu._npu_paged_attention(q, keys, values, KV_HEADS, HEADS, 0.1, table, lengths, out)
        attended = product(o, *torch_npu.npu_dynamic_quant(out.view(BATCH, -1)))
        codes, _, _, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(attended, total, gamma)
        gated = torch_npu.npu_swiglu(product(up, codes, scale))
        product(down, *torch_npu.npu_dynamic_quant(gated))

    return run


def rate(run: Callable[[], None], repeats: int) -> float:
    """Launches per second of `repeats` runs."""
    run()
    torch.npu.synchronize()
    ascend_sim.reset_trace()
    run()
    torch.npu.synchronize()
    entries = ascend_sim.trace_entries()
    each = len(ascend_sim.trace.launches(entries)) or sum(e.launches for e in entries)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.npu.synchronize()
    return each * repeats / (time.perf_counter() - start)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        run()
    return graph.replay


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(4, 64).npu()
    torch.npu.synchronize()
    layer = decode_layer()
    for name, run, repeats in (("small add", lambda: x + x, 3000), ("decode layer", layer, 60)):
        print(f"{name}: {rate(run, repeats):.0f} launches/s eager")
        print(f"{name}: {rate(captured(run), repeats):.0f} launches/s replayed")


if __name__ == "__main__":
    main()
