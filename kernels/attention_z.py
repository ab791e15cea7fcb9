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

from atp_fast.kernels.attention import (
    logit_unit,
    query_block,
    rounded_arguments,
    takes_raw,
    tile_logits,
)
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
from atp_fast.kernels.tiles import LOG2_E, load_rows, store_rows


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def _attention_z_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    mask_ptr,
    z_ptr,
    logsumexp_ptr,
    out_ptr,
    stride_ob,
    stride_oh,
    stride_om,
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
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch_head, head, start_m, low, high, whole, rest, q_ptr, k_ptr, v_ptr, mask_ptr = query_block(
        q_ptr, k_ptr, v_ptr, mask_ptr, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_mb,
        heads, kv_heads, queries, keys, window, CAUSAL, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    unit = logit_unit(scale, RAW)
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, offs_m, queries, stride_qm, stride_qd, HEAD_DIM, BLOCK_D)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if sinks_ptr is not None:
        largest = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head) * LOG2_E / unit
        total += 1.0
    for start_n in range(low, high, BLOCK_N):
        s = tile_logits(
            q, q_ptr, k_ptr, mask_ptr, start_n, whole, rest, offs_m, cols, stride_qm, stride_qd, stride_kn, stride_kd,
            stride_mn, queries, keys, scale, window, softcap, HEAD_DIM, BLOCK_D, WIDTH, CAUSAL, RAW, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(largest, tl.max(s, 1))
        # a row that has seen nothing yet
        base = tl.where(higher == float("-inf"), 0.0, higher) * unit
        p = tl.exp2(s * unit - base[:, None])
        shrink = tl.exp2(largest * unit - base)
        largest = higher
        total = total * shrink + tl.sum(p, 1)
        # [BLOCK_N, BLOCK_V]
        v_base = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
        v = load_rows(v_base, cols, keys - start_n, stride_vn, stride_vd, V_DIM, BLOCK_V)
        z = tl.dot(p.to(v.dtype), v, z * shrink[:, None], input_precision=PRECISION)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    logsumexp = tl.where(empty, float("-inf"), (largest * unit + tl.log2(total)) / LOG2_E)
    row = batch_head * queries
    tl.store(logsumexp_ptr + row + offs_m, logsumexp, mask=offs_m < queries)
    z = z / total[:, None]
    store_rows(z_ptr + row * V_DIM, offs_m, queries, V_DIM, z, V_DIM, BLOCK_V)
    if out_ptr is not None:
        out_ptr += batch_head // heads * stride_ob + head * stride_oh
        store_rows(out_ptr, offs_m, queries, stride_om, z, V_DIM, BLOCK_V)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    *,
    out: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """z before rounding to q's dtype, and logsumexp; out: see attention.rounded_arguments."""
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
        **rounded_arguments(out),
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **scoring_arguments(scoring, sizes),
        "RAW": takes_raw(scoring),
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
