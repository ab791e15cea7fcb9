"""Attention forward with leave-one-out statistics.

    z_i = sum_j p_ij v_j,  p = softmax over admissible keys and the sink (value 0)
    top_key_i = argmax_j s_ij;  over everything else: loo_logsumexp_i and loo_z_i, the mean of v

q: (batch, heads, queries, head_dim); k: (batch, kv_heads, keys, head_dim); v: (batch, kv_heads, keys, v_dim).
Outputs, float32 and contiguous: z, loo_z (batch, heads, queries, v_dim); logsumexp, loo_logsumexp (batch, heads,
queries); top_key int64. Logits, weights and sums are float32; operands of products stay in the input dtype, and
the weights of a narrow dtype go in as a high and a low part, so that z keeps about 2**-17 (it is the mean that
the effects are taken against).

One program owns BLOCK_M queries of one head and passes over the keys twice. The first pass finds, without a
reduction in its loop, the largest logit, its key and the second largest. With these known the second pass
accumulates everything but the top key at a fixed offset: no rescaling, and no gather of a deposed top key's
value inside the loop, which no prefetch could hide. The price is one more product q k^T in an op that runs
once per layer, beside (5 C + 2) products of the backward pass.

Bytes moved per program: (2 head_dim + v_dim) elements per key in reach, from L2 but for the first program of a
head; head_dim elements and (2 v_dim + 4) float32 per query.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    LOG2_E,
    binary_logits,
    exp,
    hide,
    keys_in_reach,
    keys_seen_whole,
    load_rows,
    row_products,
    sigmoid,
    store_rows,
)

# weights are at most 1; so much larger, the low part of a float16 weight is no subnormal number
PARTS_SCALE = tl.constexpr(2.0**15)


@triton.jit
def query_block(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_mb,
    heads,
    kv_heads,
    queries,
    keys,
    window,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The queries that this program owns: batch and head, first query, the keys in their reach, pointers to their head.

    Of the keys [low, high) in reach the tiles in [whole, rest) are seen whole, by all of the queries.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    # the last queries see the most keys: they start first
    block = blocks - 1 - pid % blocks
    batch_head = pid // blocks
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    start_m = (block * BLOCK_M).to(tl.int32)
    low, high = keys_in_reach(start_m, queries, keys, window, CAUSAL, BLOCK_M, BLOCK_N)
    whole, rest = keys_seen_whole(
        start_m, low, high, queries, keys, window, CAUSAL, mask_ptr is not None, BLOCK_M, BLOCK_N
    )
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    return batch_head, head, start_m, low, high, whole, rest, q_ptr, k_ptr, v_ptr, mask_ptr


@triton.jit
def tile_logits(
    q,
    q_ptr,
    k_ptr,
    mask_ptr,
    start_n,
    whole,
    rest,
    offs_m,
    cols,
    stride_qm,
    stride_qd,
    stride_kn,
    stride_kd,
    stride_mn,
    queries,
    keys,
    scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] logits in units of logit_unit, -inf where a key is not admissible."""
    left = keys - start_n
    k_base = k_ptr + tl.cast(start_n, tl.int64) * stride_kn
    # [BLOCK_N, BLOCK_D]
    k = load_rows(k_base, cols, left, stride_kn, stride_kd, HEAD_DIM, BLOCK_D)
    s = row_products(
        q, k, q_ptr, offs_m, queries, stride_qm, stride_qd, k_base, cols, left, stride_kn, stride_kd,
        HEAD_DIM, BLOCK_D, WIDTH, PRECISION,
    )  # fmt: skip
    if not RAW:
        s = binary_logits(s, scale, softcap)
    if (start_n < whole) | (start_n >= rest):
        positions = offs_m + (keys - queries)
        s = hide(s, positions, mask_ptr, start_n, cols, stride_mn, keys, window, CAUSAL)
    return s


@triton.jit
def logit_unit(scale, RAW: tl.constexpr):
    """What makes tile_logits logits to the base 2: RAW ones are products q . k, which leaves the scale to the exponent."""
    return scale * LOG2_E if RAW else 1.0


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    mask_ptr,
    z_ptr,
    logsumexp_ptr,
    top_key_ptr,
    loo_logsumexp_ptr,
    loo_z_ptr,
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

    # per column of the tile: largest and second largest logit so far, and the tile of the largest
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    second = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    tile = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start_n in range(low, high, BLOCK_N):
        s = tile_logits(
            q, q_ptr, k_ptr, mask_ptr, start_n, whole, rest, offs_m, cols, stride_qm, stride_qd, stride_kn, stride_kd,
            stride_mn, queries, keys, scale, window, softcap, HEAD_DIM, BLOCK_D, WIDTH, CAUSAL, RAW, PRECISION,
        )  # fmt: skip
        second = tl.maximum(second, tl.minimum(best, s))
        tile = tl.where(s > best, start_n, tile)
        best = tl.maximum(best, s)
    largest = tl.max(best, 1)
    at = tile + cols[None, :]
    top = tl.min(tl.where(best == largest[:, None], at, 2147483647), 1)
    offset = tl.max(tl.where(at == top[:, None], second, best), 1)
    top = tl.where(largest == float("-inf"), -1, top)
    # from here on to the base 2
    offset = offset * unit
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head) * LOG2_E
        offset = tl.maximum(offset, sink)
    offset = tl.where(offset == float("-inf"), 0.0, offset)

    loo_z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        total += tl.exp2(sink - offset)
    for start_n in range(low, high, BLOCK_N):
        s = tile_logits(
            q, q_ptr, k_ptr, mask_ptr, start_n, whole, rest, offs_m, cols, stride_qm, stride_qd, stride_kn, stride_kd,
            stride_mn, queries, keys, scale, window, softcap, HEAD_DIM, BLOCK_D, WIDTH, CAUSAL, RAW, PRECISION,
        )  # fmt: skip
        p = tl.exp2(s * unit - offset[:, None])
        p = tl.where((start_n + cols)[None, :] == top[:, None], 0.0, p)
        total += tl.sum(p, 1)
        # [BLOCK_N, BLOCK_V]
        v_base = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
        v = load_rows(v_base, cols, keys - start_n, stride_vn, stride_vd, V_DIM, BLOCK_V)
        if v.dtype == tl.float32:
            loo_z = tl.dot(p, v, loo_z, input_precision=PRECISION)
        else:
            p = p * PARTS_SCALE
            coarse = p.to(v.dtype)
            fine = (p - coarse.to(tl.float32)).to(v.dtype)
            loo_z = tl.dot(coarse, v, loo_z, input_precision=PRECISION)
            loo_z = tl.dot(fine, v, loo_z, input_precision=PRECISION)
    empty = total == 0
    if q.dtype != tl.float32:
        loo_z = loo_z / PARTS_SCALE
    loo_z = loo_z / tl.where(empty, 1.0, total)[:, None]
    loo_logsumexp = (offset + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E
    loo_logsumexp = tl.where(empty, float("-inf"), loo_logsumexp)

    # join the top key again
    nothing = largest == float("-inf")
    largest = largest * unit / LOG2_E
    lead = tl.where(nothing, float("-inf"), largest - loo_logsumexp)
    v_top_rows = tl.where(nothing, keys, top)
    v_top = load_rows(v_ptr, v_top_rows, keys, stride_vn, stride_vd, V_DIM, BLOCK_V)
    z = sigmoid(-lead)[:, None] * loo_z + sigmoid(lead)[:, None] * v_top.to(tl.float32)
    gap = tl.abs(tl.where(nothing | empty, 0.0, lead))
    joined = tl.maximum(largest, loo_logsumexp) + tl.log(1.0 + exp(-gap))
    logsumexp = tl.where(nothing, loo_logsumexp, tl.where(empty, largest, joined))

    row = batch_head * queries
    inside = offs_m < queries
    tl.store(logsumexp_ptr + row + offs_m, logsumexp, mask=inside)
    tl.store(loo_logsumexp_ptr + row + offs_m, loo_logsumexp, mask=inside)
    tl.store(top_key_ptr + row + offs_m, top.to(tl.int64), mask=inside)
    store_rows(z_ptr + row * V_DIM, offs_m, queries, V_DIM, z, V_DIM, BLOCK_V)
    store_rows(loo_z_ptr + row * V_DIM, offs_m, queries, V_DIM, loo_z, V_DIM, BLOCK_V)
    if out_ptr is not None:
        out_ptr += batch_head // heads * stride_ob + head * stride_oh
        store_rows(out_ptr, offs_m, queries, stride_om, z, V_DIM, BLOCK_V)


_NARROW = {
    64: (Blocks(64, 64, 1, 4, 3, majors=(9,)), Blocks(64, 64, 1, 4, 2, majors=(8, 10))),
    128: (
        Blocks(64, 64, 1, 4, 3, majors=(9,)),
        Blocks(128, 64, 1, 8, 2, majors=(10,)),
        Blocks(64, 64, 1, 8, 2, majors=(8,)),
    ),
    256: (
        Blocks(64, 16, 1, 8, 1, width=64, majors=(9,)),
        Blocks(64, 32, 1, 8, 2, width=64, majors=(8, 10)),
    ),
}
_FLOAT32 = {
    64: (
        Blocks(64, 32, 1, 4, 1, majors=(9,)),
        Blocks(64, 32, 1, 4, 2, majors=(10,)),
        Blocks(64, 32, 1, 4, 2, width=32, majors=(8,)),
    ),
    128: (
        Blocks(64, 32, 1, 4, 2, width=32, majors=(9,)),
        Blocks(32, 16, 1, 4, 2, width=16, majors=(8, 10)),
    ),
    256: (
        Blocks(64, 16, 1, 8, 1, width=16, majors=(9,)),
        Blocks(32, 16, 1, 8, 2, width=16, majors=(10,)),
        Blocks(32, 16, 1, 4, 1, width=16, majors=(8,)),
    ),
}
CONFIGS = {
    **{(dtype, dim): _NARROW[dim] for dtype in (torch.bfloat16, torch.float16) for dim in _NARROW},
    **{(torch.float32, dim): choices for dim, choices in _FLOAT32.items()},
}


class Outputs(NamedTuple):
    """z and the statistics of every query row, float32; the fields of the reference's AttentionStats."""

    z: Tensor
    logsumexp: Tensor
    top_key: Tensor
    loo_logsumexp: Tensor
    loo_z: Tensor


def takes_raw(scoring: Scoring) -> bool:
    """Whether products q . k rank as their logits do, so that the largest need not be scaled to be found."""
    return scoring.softcap is None and scoring.scale > 0


def rounded_arguments(out: Tensor | None) -> dict[str, Any]:
    """Where z is stored in out's dtype too: (batch, heads, queries, v_dim), its rows contiguous."""
    steps = dict.fromkeys(("stride_ob", "stride_oh", "stride_om"), 0)
    if out is not None:
        steps = dict(zip(steps, out.stride(), strict=False))
    return {"out_ptr": out, **steps}


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    *,
    out: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Outputs:
    """Attention output before rounding to q's dtype, and its row statistics; out: see rounded_arguments."""
    sizes = sizes_of(q, k, v)
    rows = (sizes.batch, sizes.heads, sizes.queries)
    found = Outputs(
        torch.empty((*rows, sizes.v_dim), dtype=torch.float32, device=q.device),
        torch.empty(rows, dtype=torch.float32, device=q.device),
        torch.empty(rows, dtype=torch.int64, device=q.device),
        torch.empty(rows, dtype=torch.float32, device=q.device),
        torch.empty((*rows, sizes.v_dim), dtype=torch.float32, device=q.device),
    )
    if found.logsumexp.numel() == 0:
        return found
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "sinks_ptr": None
        if scoring.sinks is None
        else scoring.sinks.to(torch.float32).contiguous(),
        "z_ptr": found.z,
        "logsumexp_ptr": found.logsumexp,
        "top_key_ptr": found.top_key,
        "loo_logsumexp_ptr": found.loo_logsumexp,
        "loo_z_ptr": found.loo_z,
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
        _attention_fwd_kernel,
        lambda b: heads * cdiv(sizes.queries, b.block_m),
        arguments,
        choices,
        q,
    )
    return found
