"""Products of every cotangent with vectors of its row: dot_n[c, b, h, i] = sum_d grad_z[c, b, h, i, d] x_n[b, h, i, d].

With x = z it is the mean D that the softmax's gradient subtracts, with z' - z the effect of patching the query,
with the u of key_patch_effects.py the part of the row's largest key in that key's effect. grad_z: (C, batch, heads,
queries, v_dim), any strides; up to three x, (batch, heads, queries, v_dim) float32 contiguous; results (C, batch, heads,
queries) float32. On the way the rows' logsumexps become what the tiles take them as: to the base 2, and +inf for a row
without an admissible key, whose weights are then 0 without a test.

One program owns BLOCK_M rows of one head, keeps their x in registers and streams every cotangent past them:
grad_z is read once, x once. Bytes per grad_z element: its size, plus 4 per x and cotangent count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import Blocks, candidates, cdiv, padded, run, strides
from atp_fast.kernels.tiles import LOG2_E, load_rows


@triton.jit(do_not_specialize=["queries", "cotangents"])
def _row_dots_kernel(
    grad_ptr,
    x0_ptr,
    x1_ptr,
    x2_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    logsumexp_ptr,
    binary_ptr,
    stride_gc,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_gd,
    heads,
    queries,
    cotangents,
    total_rows,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    batch_head = pid // blocks
    offs_m = ((pid % blocks) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    inside = offs_m < queries
    row = batch_head * queries
    grad_ptr += (batch_head // heads) * stride_gb + (batch_head % heads) * stride_gh

    # [BLOCK_M, BLOCK_V] each
    x0 = load_rows(x0_ptr + row * V_DIM, offs_m, queries, V_DIM, 1, V_DIM, BLOCK_V)
    if x1_ptr is not None:
        x1 = load_rows(x1_ptr + row * V_DIM, offs_m, queries, V_DIM, 1, V_DIM, BLOCK_V)
    if x2_ptr is not None:
        x2 = load_rows(x2_ptr + row * V_DIM, offs_m, queries, V_DIM, 1, V_DIM, BLOCK_V)
    if logsumexp_ptr is not None:
        lse = tl.load(logsumexp_ptr + row + offs_m, mask=inside, other=0.0)
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        tl.store(binary_ptr + row + offs_m, lse, mask=inside)
    for _ in range(0, cotangents):
        g = load_rows(grad_ptr, offs_m, queries, stride_gm, stride_gd, V_DIM, BLOCK_V)
        g = g.to(tl.float32)
        tl.store(out0_ptr + row + offs_m, tl.sum(g * x0, 1), mask=inside)
        if x1_ptr is not None:
            tl.store(out1_ptr + row + offs_m, tl.sum(g * x1, 1), mask=inside)
        if x2_ptr is not None:
            tl.store(out2_ptr + row + offs_m, tl.sum(g * x2, 1), mask=inside)
        grad_ptr += stride_gc
        row += total_rows


CONFIGS = {
    (dtype, dim): (Blocks(2048 // dim, 1, 1, 4, 1),)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for dim in (64, 128, 256)
}


def launch_row_dots(
    grad_z: Tensor,
    *vectors: Tensor,
    logsumexp: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, ...]:
    """One (C, batch, heads, queries) tensor per vector, one to three; behind them logsumexp as the tiles take it, if given."""
    cotangents, batch, heads, queries, v_dim = grad_z.shape
    out = tuple(
        torch.empty(grad_z.shape[:-1], dtype=torch.float32, device=grad_z.device) for _ in vectors
    )
    binary = () if logsumexp is None else (torch.empty_like(logsumexp),)
    if out[0].numel() == 0:
        return *out, *binary
    absent = (None,) * (3 - len(vectors))
    wide = (*(x.to(torch.float32).contiguous() for x in vectors), *absent)
    arguments: dict[str, Any] = {
        "grad_ptr": grad_z,
        **{f"x{i}_ptr": x for i, x in enumerate(wide)},
        **{f"out{i}_ptr": x for i, x in enumerate((*out, *absent))},
        "logsumexp_ptr": logsumexp,
        "binary_ptr": binary[0] if binary else None,
        **strides("g", grad_z, "cbhmd"),
        "heads": heads,
        "queries": queries,
        "cotangents": cotangents,
        "total_rows": batch * heads * queries,
        "HEAD_DIM": v_dim,
        "V_DIM": v_dim,
        "BLOCK_V": padded(v_dim),
    }
    choices = (blocks,) if blocks else candidates(CONFIGS, grad_z, v_dim)
    run(
        _row_dots_kernel,
        lambda b: batch * heads * cdiv(queries, b.block_m),
        arguments,
        choices,
        grad_z,
    )
    return *out, *binary
