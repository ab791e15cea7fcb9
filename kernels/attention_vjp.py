"""Vector-Jacobian products of attention for C cotangents that share the recomputed weights.

    p_ij = exp(s_ij - logsumexp_i)   dP_ij = g_i . v_j   D_i = g_i . z_i
    dS_ij = p_ij (dP_ij - D_i) ds_ij/d(q_i . k_j)
    grad_q_i = sum_j dS_ij k_j       grad_k_j = sum_i dS_ij q_i       grad_v_j = sum_i p_ij g_i

Shapes and dtypes as in attention.py; grad_z and grad_q are (C, batch, heads, queries, v_dim and head_dim). The
owner of a key block sums grad_k and grad_v (key_blocks.py), the owner of a query block sums grad_q (here), each
from its own recomputed p: one more p and dP per tile than one kernel would need, and no atomics. D comes from one
read of grad_z (row_dots.py).

One program of the kernel below owns BLOCK_M queries of one head for CHUNK cotangents, whose g stay on chip, and
loops over the keys in reach. p, dP, dS and sums are float32, operands of products in the input dtype (float16:
TF32, see tiles.weigh). Per tile: 1 product for p and 2 per cotangent. Bytes per tile:
BLOCK_N (head_dim + v_dim) elements.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.key_blocks import launch_key_blocks
from atp_fast.kernels.launch import (
    Blocks,
    Scoring,
    candidates,
    dot_precision,
    run,
    scoring_arguments,
    sizes_of,
    strides,
)
from atp_fast.kernels.row_dots import launch_row_dots
from atp_fast.kernels.tiles import load_rows, logits, soften, store_rows, visible, weigh


@triton.jit(do_not_specialize=["queries", "keys", "window", "cotangents"])
def _query_blocks_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    mask_ptr,
    logsumexp_ptr,
    mean_ptr,
    grad_q_ptr,
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
    stride_gc,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_gd,
    stride_mb,
    stride_mn,
    batches,
    cotangents,
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
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    # the last queries see the most keys: they start first
    block = blocks - 1 - pid % blocks
    batch_head = pid // blocks % (batches * heads)
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    first = pid // blocks // (batches * heads) * CHUNK
    start_m = (block * BLOCK_M).to(tl.int32)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    positions = offs_m + (keys - queries)

    low = 0
    high = keys
    if window is not None:
        low = tl.maximum(start_m + (keys - queries) - window + 1, 0) // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.minimum(start_m + BLOCK_M + (keys - queries), keys)

    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    q_ptr += batch * stride_qb + head * stride_qh
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    row = batch_head * queries + offs_m
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, offs_m, queries, stride_qm, stride_qd, HEAD_DIM, BLOCK_D)
    lse = tl.load(logsumexp_ptr + row, mask=offs_m < queries, other=float("inf"))
    # rows without an admissible key: every weight 0
    lse = tl.where(lse == float("-inf"), float("inf"), lse)[:, None]
    g = ()
    mean = ()
    grad_q = ()
    for c in tl.static_range(CHUNK):
        present = tl.where(first + c < cotangents, queries, 0)
        g_base = grad_ptr + (first + c) * stride_gc + batch * stride_gb + head * stride_gh
        # [BLOCK_M, BLOCK_V]
        g = g + (load_rows(g_base, offs_m, present, stride_gm, stride_gd, V_DIM, BLOCK_V),)
        row_c = (first + c) * batches * heads * queries + row
        mean = mean + (tl.load(mean_ptr + row_c, mask=offs_m < present, other=0.0)[:, None],)
        grad_q = grad_q + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)

    for start_n in range(low, high, BLOCK_N):
        offs_n = start_n + cols
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
        k = load_rows(k_ptr, offs_n, keys, stride_kn, stride_kd, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, offs_n, keys, stride_vn, stride_vd, V_DIM, BLOCK_V)
        real = offs_n < keys
        if mask_ptr is not None:
            masks = mask_ptr + offs_n.to(tl.int64) * stride_mn
            real = tl.load(masks, mask=real, other=0) != 0
        seen = visible(positions[:, None] - offs_n[None, :], window, CAUSAL) & real[None, :]
        # [BLOCK_M, BLOCK_N]
        s = logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
        p = tl.where(seen, tl.exp(s - lse), 0.0)
        new_grad_q = ()
        for c in tl.static_range(CHUNK):
            dp = tl.dot(g[c], tl.trans(v), input_precision=PRECISION)
            ds = soften(p * (dp - mean[c]), s, softcap)
            new_grad_q = new_grad_q + (weigh(ds, k, grad_q[c], PRECISION),)
        grad_q = new_grad_q

    for c in tl.static_range(CHUNK):
        if first + c < cotangents:
            out = ((first + c) * batches * heads + batch_head) * queries * HEAD_DIM
            dq = grad_q[c] * scale
            store_rows(grad_q_ptr + out, offs_m, queries, dq, HEAD_DIM, BLOCK_D)


CONFIGS = {
    (2, 64): (Blocks(64, 64, 4, 8, 2), Blocks(64, 64, 2, 4, 2)),
    (2, 128): (Blocks(64, 64, 2, 8, 2),),
    (2, 256): (Blocks(64, 32, 1, 8, 1),),
    (4, 64): (Blocks(64, 32, 2, 8, 1),),
    (4, 128): (Blocks(32, 32, 1, 8, 1),),
    (4, 256): (Blocks(32, 16, 1, 8, 1),),
}


def launch_query_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_z: Tensor,
    logsumexp: Tensor,
    mean: Tensor,
    scoring: Scoring,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """grad_q; mean is D, (C, batch, heads, queries) float32."""
    sizes = sizes_of(q, k, v)
    cotangents = grad_z.shape[0]
    grad_q = q.new_empty((cotangents, *q.shape))
    if grad_q.numel() == 0:
        return grad_q
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "grad_ptr": grad_z,
        "logsumexp_ptr": logsumexp,
        "mean_ptr": mean,
        "grad_q_ptr": grad_q,
        "batches": sizes.batch,
        "cotangents": cotangents,
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("g", grad_z, "cbhmd"),
        **scoring_arguments(scoring, sizes),
        "PRECISION": dot_precision(q.dtype),
    }
    choices = (blocks,) if blocks else candidates(CONFIGS, q.dtype, sizes.head_dim, sizes.v_dim)
    heads = sizes.batch * sizes.heads

    def programs(b: Blocks) -> int:
        return triton.cdiv(sizes.queries, b.block_m) * heads * triton.cdiv(cotangents, b.chunk)

    run(_query_blocks_kernel, programs, arguments, choices, q)
    return grad_q


def launch_attention_vjp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    logsumexp: Tensor,
    grad_z: Tensor,
    scoring: Scoring,
    *,
    query_blocks: Blocks | None = None,
    key_blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v; z and logsumexp are the statistics of launch_attention."""
    (mean,) = launch_row_dots(grad_z, z)
    grad_q = launch_query_blocks(q, k, v, grad_z, logsumexp, mean, scoring, blocks=query_blocks)
    grad_k, grad_v, _ = launch_key_blocks(
        q, k, v, grad_z, logsumexp, mean, scoring, grads=True, blocks=key_blocks
    )
    return grad_q, grad_k, grad_v
