"""First-order effects of nodes, added in place to the scores of all pairs.

    I[c, b, i, w] = sum_d (corrupted - clean)[b, i, w, d] grad[c, b, i, w, d], or grad itself
    score[j, w]  += sum_b sum_c weights[c] |I|,  effect[j, w] += sum_b I of the first c,  j = i + first[b], live[b, i] only

grad: (C, batch, positions, width, dim), values (batch, positions, width, dim), float32, bfloat16 or float16, any strides;
differences, products and sums float32; score, effect: (columns, width) float32 with contiguous rows, per_pair (pairs,
columns, width) the same. width is the number of heads or of neurons, dim head_dim, 1 for neurons and effects, d_model for writes.

One program owns BLOCK_M of one column's nodes and goes over the pairs and their cotangents in order: no atomics. Each
gradient and, where dim fits a tile, each value is read once. Bytes per element of grad: its size, and twice that by C.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import Blocks, cdiv, check_dtype, run, strides
from atp_fast.kernels.tiles import load_rows

_MAX_BLOCK_D = 1024
_TILE = 2048


@triton.jit(do_not_specialize=["batch", "positions", "cotangents"])
def _add_effects_kernel(
    grad_ptr,
    clean_ptr,
    corrupted_ptr,
    weights_ptr,
    live_ptr,
    first_ptr,
    score_ptr,
    effect_ptr,
    pair_ptr,
    rows_ptr,
    stride_gc,
    stride_gb,
    stride_gi,
    stride_gw,
    stride_gd,
    stride_xb,
    stride_xi,
    stride_xw,
    stride_xd,
    stride_yb,
    stride_yi,
    stride_yw,
    stride_yd,
    stride_sj,
    stride_pb,
    stride_pj,
    batch,
    positions,
    cotangents,
    width,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAIR_SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK_M)
    column = pid // blocks
    offs_m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < width
    score = tl.zeros([BLOCK_M], tl.float32)
    effect = tl.zeros([BLOCK_M], tl.float32)
    for b in range(0, batch):
        b = tl.cast(b, tl.int64)
        i = column
        if first_ptr is not None:
            i -= tl.load(first_ptr + b)
        counts = (i >= 0) & (i < positions)
        if live_ptr is not None:
            counts &= tl.load(live_ptr + b * positions + i, mask=counts, other=0) != 0
        limit = tl.where(counts, width, 0)
        g_ptr = grad_ptr + b * stride_gb + i * stride_gi
        if clean_ptr is not None:
            x_ptr = clean_ptr + b * stride_xb + i * stride_xi
            y_ptr = corrupted_ptr + b * stride_yb + i * stride_yi
        if clean_ptr is not None and HEAD_DIM <= BLOCK_N:
            # [BLOCK_M, BLOCK_N]
            y = load_rows(y_ptr, offs_m, limit, stride_yw, stride_yd, HEAD_DIM, BLOCK_N)
            x = load_rows(x_ptr, offs_m, limit, stride_xw, stride_xd, HEAD_DIM, BLOCK_N)
            delta = y.to(tl.float32) - x.to(tl.float32)
        pair_score = tl.zeros([BLOCK_M], tl.float32)
        pair_effect = tl.zeros([BLOCK_M], tl.float32)
        for c in range(0, cotangents):
            if HEAD_DIM <= BLOCK_N:
                g = load_rows(g_ptr, offs_m, limit, stride_gw, stride_gd, HEAD_DIM, BLOCK_N)
                g = g.to(tl.float32)
                if clean_ptr is not None:
                    g = g * delta
                found = tl.sum(g, 1)
            else:
                products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for d in range(0, HEAD_DIM, BLOCK_N):
                    d = tl.cast(d, tl.int64)
                    g = load_rows(g_ptr + d * stride_gd, offs_m, limit, stride_gw, stride_gd, HEAD_DIM - d, BLOCK_N)  # fmt: skip
                    y = load_rows(y_ptr + d * stride_yd, offs_m, limit, stride_yw, stride_yd, HEAD_DIM - d, BLOCK_N)  # fmt: skip
                    x = load_rows(x_ptr + d * stride_xd, offs_m, limit, stride_xw, stride_xd, HEAD_DIM - d, BLOCK_N)  # fmt: skip
                    products += g.to(tl.float32) * (y.to(tl.float32) - x.to(tl.float32))
                found = tl.sum(products, 1)
            pair_score += tl.load(weights_ptr + c) * tl.abs(found)
            pair_effect = tl.where(c == 0, found, pair_effect)
            g_ptr += stride_gc
        score += pair_score
        effect += pair_effect
        if pair_ptr is not None:
            p_ptrs = pair_ptr + tl.load(rows_ptr + b) * stride_pb + column * stride_pj + offs_m
            kept = pair_effect if PAIR_SIGNED else pair_score
            tl.store(p_ptrs, tl.load(p_ptrs, mask=inside, other=0.0) + kept, mask=inside)
    s_ptrs = score_ptr + column * stride_sj + offs_m
    tl.store(s_ptrs, tl.load(s_ptrs, mask=inside, other=0.0) + score, mask=inside)
    if effect_ptr is not None:
        e_ptrs = effect_ptr + column * stride_sj + offs_m
        tl.store(e_ptrs, tl.load(e_ptrs, mask=inside, other=0.0) + effect, mask=inside)


def default_blocks(width: int, dim: int) -> Blocks:
    """A tile of 2048 elements at most, whole vectors up to 1024 wide: nothing for an autotuner to choose."""
    block_d = min(triton.next_power_of_2(max(dim, 1)), _MAX_BLOCK_D)
    block_w = min(triton.next_power_of_2(max(width, 1)), _TILE // block_d)
    return Blocks(block_w, block_d, 1, 4 if block_w * block_d > 512 else 1, 1)


def launch_add_effects(
    grad: Tensor,
    weights: Tensor,
    score: Tensor,
    effect: Tensor | None,
    clean: Tensor | None,
    corrupted: Tensor | None,
    live: Tensor | None,
    first: Tensor | None,
    per_pair: Tensor | None,
    rows: Tensor | None,
    pair_signed: bool,
    *,
    blocks: Blocks | None = None,
) -> None:
    """Adds to score, effect and per_pair. What is written is read before: no launch may be repeated."""
    check_dtype("grad", grad)
    cotangents, batch, positions, width, dim = grad.shape
    columns = score.shape[0]
    if score.numel() == 0 or cotangents == 0 or batch == 0:
        return
    nothing = dict.fromkeys(("b", "i", "w", "d"), 0)

    def value_strides(name: str, x: Tensor | None) -> dict[str, int]:
        if x is not None:
            return strides(name, x, "biwd")
        return {f"stride_{name}{axis}": step for axis, step in nothing.items()}

    arguments: dict[str, Any] = {
        "grad_ptr": grad,
        "clean_ptr": clean,
        "corrupted_ptr": corrupted,
        "weights_ptr": weights,
        "live_ptr": None if live is None else live.contiguous().view(torch.uint8),
        "first_ptr": first,
        "score_ptr": score,
        "effect_ptr": effect,
        "pair_ptr": per_pair,
        "rows_ptr": rows,
        **strides("g", grad, "cbiwd"),
        **value_strides("x", clean),
        **value_strides("y", corrupted),
        "stride_sj": score.stride(0),
        "stride_pb": 0 if per_pair is None else per_pair.stride(0),
        "stride_pj": 0 if per_pair is None else per_pair.stride(1),
        "batch": batch,
        "positions": positions,
        "cotangents": cotangents,
        "width": width,
        "HEAD_DIM": dim,
        "V_DIM": dim,
        "PAIR_SIGNED": pair_signed,
    }
    chosen = blocks or default_blocks(width, dim)
    run(
        _add_effects_kernel,
        lambda b: columns * cdiv(width, b.block_m),
        arguments,
        (chosen,),
        grad,
    )
