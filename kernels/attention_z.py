"""Attention forward without leave-one-out statistics: z and logsumexp, in one pass over the keys.

    z_i = sum_j p_ij v_j,  p = softmax over admissible keys and the sink (value 0)

q: (batch, heads, queries, head_dim); k: (batch, kv_heads, keys, head_dim); v: (batch, kv_heads, keys, v_dim).
Outputs, float32 and contiguous: z (batch, heads, queries, v_dim), logsumexp (batch, heads, queries). Logits, weights and sums
are float32; operands of products stay in the input dtype, the weights among them.

One program owns BLOCK_M queries of one head and keeps an online softmax to the base 2, which scale and log2(e) are folded into.
Tiles that all of its queries see whole, all but those on the diagonal and at a window's edge, are not masked.

Bytes moved per program: (head_dim + v_dim) elements per key in reach, from L2 but for the first program of a head; head_dim elements
and (v_dim + 1) float32 per query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.launch import (
    Blocks,
    Scoring,
    candidates,
    cdiv,
    dot_precision,
    run,
    scoring_arguments,
    sizes_of,
    strides,
)
from atp_fast.kernels.tiles import (
    keys_in_reach,
    load_rows,
    logits,
    row_products,
    store_rows,
    visible,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_keys(
    largest,
    total,
    z,
    q,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    start_n,
    offs_m,
    cols,
    stride_qm,
    stride_qd,
    stride_kn,
    stride_kd,
    stride_vn,
    stride_vd,
    stride_mn,
    queries,
    keys,
    scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax with BLOCK_N more keys: largest logit to the base 2, sum of weights, weighted values."""
    left = keys - start_n
    k_base = k_ptr + tl.cast(start_n, tl.int64) * stride_kn
    v_base = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
    # [BLOCK_N, BLOCK_D]
    k = load_rows(k_base, cols, left, stride_kn, stride_kd, HEAD_DIM, BLOCK_D)
    # [BLOCK_M, BLOCK_N]
    s = row_products(
        q, k, q_ptr, offs_m, queries, stride_qm, stride_qd, k_base, cols, left, stride_kn, stride_kd,
        HEAD_DIM, BLOCK_D, WIDTH, PRECISION,
    )  # fmt: skip
    s = s * (scale * LOG2_E) if softcap is None else logits(s, scale, softcap) * LOG2_E
    if MASKED:
        distance = (offs_m + (keys - queries))[:, None] - (start_n + cols)[None, :]
        seen = visible(distance, window, CAUSAL) & (cols < left)[None, :]
        if mask_ptr is not None:
            masks = mask_ptr + (start_n + cols).to(tl.int64) * stride_mn
            seen &= (tl.load(masks, mask=cols < left, other=0) != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(largest, tl.max(s, 1))
    # a row that has seen nothing yet
    base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(p, 1)
    # [BLOCK_N, BLOCK_V]
    v = load_rows(v_base, cols, left, stride_vn, stride_vd, V_DIM, BLOCK_V)
    z = tl.dot(p.to(v.dtype), v, z * shrink[:, None], input_precision=PRECISION)
    return higher, total, z


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def _attention_z_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    mask_ptr,
    z_ptr,
    logsumexp_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mb,
    stride_mn,
    heads,
    kv_heads,
    queries,
    keys,
    scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    # the last queries see the most keys: they start first
    block = blocks - 1 - pid % blocks
    batch_head = pid // blocks
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    start_m = (block * BLOCK_M).to(tl.int32)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)

    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    q_ptr += batch * stride_qb + head * stride_qh
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, offs_m, queries, stride_qm, stride_qd, HEAD_DIM, BLOCK_D)

    # keys [low, whole) and [rest, high) are masked, [whole, rest) are seen by every query
    low, high = keys_in_reach(start_m, queries, keys, window, CAUSAL, BLOCK_M, BLOCK_N)
    position = start_m + (keys - queries)
    whole = low
    rest = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        rest = (position + 1) // BLOCK_N * BLOCK_N
    if window is not None:
        whole = tl.cdiv(tl.maximum(position + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(tl.maximum(whole, low), tl.cdiv(high, BLOCK_N) * BLOCK_N)
    rest = tl.maximum(rest, whole)
    if mask_ptr is not None:
        rest = whole

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if sinks_ptr is not None:
        largest = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head) * LOG2_E
        total += 1.0
    if window is not None:
        for start_n in range(low, whole, BLOCK_N):
            largest, total, z = _add_keys(
                largest, total, z, q, q_ptr, k_ptr, v_ptr, mask_ptr, start_n, offs_m, cols, stride_qm, stride_qd,
                stride_kn, stride_kd, stride_vn, stride_vd, stride_mn, queries, keys, scale, window, softcap,
                HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, WIDTH, CAUSAL, PRECISION, True,
            )  # fmt: skip
    for start_n in range(whole, rest, BLOCK_N):
        largest, total, z = _add_keys(
            largest, total, z, q, q_ptr, k_ptr, v_ptr, mask_ptr, start_n, offs_m, cols, stride_qm, stride_qd,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mn, queries, keys, scale, window, softcap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, WIDTH, CAUSAL, PRECISION, False,
        )  # fmt: skip
    for start_n in range(rest, high, BLOCK_N):
        largest, total, z = _add_keys(
            largest, total, z, q, q_ptr, k_ptr, v_ptr, mask_ptr, start_n, offs_m, cols, stride_qm, stride_qd,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mn, queries, keys, scale, window, softcap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, WIDTH, CAUSAL, PRECISION, True,
        )  # fmt: skip
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    logsumexp = tl.where(empty, float("-inf"), (largest + tl.log2(total)) / LOG2_E)
    row = batch_head * queries
    tl.store(logsumexp_ptr + row + offs_m, logsumexp, mask=offs_m < queries)
    store_rows(z_ptr + row * V_DIM, offs_m, queries, z / total[:, None], V_DIM, BLOCK_V)


_NARROW = {
    64: (
        Blocks(128, 64, 1, 4, 3, majors=(9,)),
        Blocks(128, 128, 1, 8, 2, majors=(9,)),
        Blocks(128, 64, 1, 8, 3, majors=(8, 10)),
        Blocks(64, 64, 1, 4, 3),
    ),
    128: (
        Blocks(128, 64, 1, 8, 3, majors=(8, 9)),
        Blocks(128, 128, 1, 8, 2, majors=(9,)),
        Blocks(64, 64, 1, 4, 2),
    ),
    256: (
        Blocks(64, 32, 1, 8, 2, width=64),
        Blocks(128, 64, 1, 8, 2, majors=(9,)),
    ),
}
_FLOAT32 = {
    64: (Blocks(64, 32, 1, 4, 2, width=32),),
    128: (
        Blocks(64, 32, 1, 4, 2, width=32, majors=(9,)),
        Blocks(32, 16, 1, 4, 2, width=16, majors=(8, 10)),
    ),
    256: (
        Blocks(64, 16, 1, 8, 1, width=16, majors=(9,)),
        Blocks(32, 16, 1, 4, 1, width=16, majors=(8,)),
        Blocks(32, 16, 1, 8, 2, width=16, majors=(10,)),
    ),
}
CONFIGS = {
    **{(dtype, dim): _NARROW[dim] for dtype in (torch.bfloat16, torch.float16) for dim in _NARROW},
    **{(torch.float32, dim): choices for dim, choices in _FLOAT32.items()},
}


def launch_attention_z(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, *, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """z before rounding to q's dtype, and logsumexp."""
    sizes = sizes_of(q, k, v)
    rows = (sizes.batch, sizes.heads, sizes.queries)
    z = torch.empty((*rows, sizes.v_dim), dtype=torch.float32, device=q.device)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=q.device)
    if logsumexp.numel() == 0:
        return z, logsumexp
    sinks = scoring.sinks
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "sinks_ptr": None if sinks is None else sinks.to(torch.float32).contiguous(),
        "z_ptr": z,
        "logsumexp_ptr": logsumexp,
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **scoring_arguments(scoring, sizes),
        "PRECISION": dot_precision(q.dtype),
    }
    choices = (blocks,) if blocks else candidates(CONFIGS, q, sizes.head_dim, sizes.v_dim)
    heads = sizes.batch * sizes.heads
    run(
        _attention_z_kernel,
        lambda b: heads * cdiv(sizes.queries, b.block_m),
        arguments,
        choices,
        q,
    )
    return z, logsumexp
