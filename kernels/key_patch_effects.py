"""Effects of patching each key alone, every row's softmax recomputed exactly (AtP* QK fix).

    effect_j = sum_i w_ij (dP_ij - D_i),   dP_ij = g_i . v_j,  D_i = g_i . z_i
    w = (a' - a)/(1 - a),  a = p_ij = exp(s_ij - logsumexp_i),  a' = sigmoid(logit(a) + s'_ij - s_ij)

Where key t is its row's largest, 1 - a would cancel; that part is (a' - a) g_i . (v_t - loo_z_i) with
a' - a = sigmoid(x') - sigmoid(x), x = s_it - loo_logsumexp_i, and needs no tiles. Inputs as in attention.py and
attention_vjp.py; result (C, batch, keys, kv_heads) float32. Logits, w, dP and sums are float32 and never rounded;
products take the inputs as they are. Four kernels:

  1. _top_vectors_kernel: u_i = (a' - a) (v_t - loo_z_i), (batch, heads, queries, v_dim) float32. One program owns
     BLOCK_M queries of one head and gathers k, k_corrupted and v of their top keys; products and logits float32.
     Bytes per query: 3 head_dim + v_dim elements and 2 v_dim float32.
  2. row_dots.py: g_i . u_i for every cotangent, in the pass over grad_z that yields D.
  3. _key_patch_effects_kernel: the sum over all other keys. One program owns BLOCK_N keys of one key/value head
     for CHUNK cotangents, which share w, and loops over the query blocks in reach of every query head of the
     group, or of a part of it where programs are few. Only tiles at the diagonal or a window's edge are masked. Per tile:
     2 products for w and 1 for SIDE cotangents, whose rows stand one behind the other; bytes: BLOCK_M (head_dim + CHUNK v_dim)
     elements.
  4. _top_effects_kernel: the parts of 2, summed by key. The owner of BLOCK_N keys multiplies the rows' one-hot
     choice [BLOCK_N, BLOCK_M] with CHUNK cotangents: a product, in a fixed order, instead of atomics.

More than 400 lines: the kernels are parts of one sum, and Triton wants every pointer and stride named.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.attention import Outputs
from atp_fast.kernels.launch import (
    Blocks,
    Scoring,
    Sizes,
    candidates,
    cdiv,
    dot_precision,
    group_parts,
    padded,
    run,
    scoring_arguments,
    shared_out,
    sizes_of,
    strides,
    window_of,
)
from atp_fast.kernels.row_dots import launch_row_dots
from atp_fast.kernels.tiles import (
    binary_change,
    binary_logits,
    key_weights,
    load_rows,
    logit_change,
    logits,
    queries_in_reach,
    row_products,
    sees_whole,
    sigmoid_difference,
    store_rows,
    visible,
)


@triton.jit
def _part_sums(x, SIDE: tl.constexpr, LANES: tl.constexpr):
    """x, [rows, SIDE * columns], summed over columns in LANES parts: [rows, SIDE, LANES].

    A part is every LANES-th pair of columns: of four parts each is what one lane holds of a matrix instruction's result, so
    that none has to be passed between lanes.
    """
    columns: tl.constexpr = x.shape[1] // SIDE
    pairs = tl.reshape(x, [x.shape[0], SIDE, columns // (2 * LANES), LANES, 2])
    parts = tl.permute(pairs, (0, 1, 3, 2, 4))
    return tl.sum(tl.reshape(parts, [x.shape[0], SIDE, LANES, columns // LANES]), 3)


@triton.jit(do_not_specialize=["queries", "keys", "window", "cotangents"])
def _key_patch_effects_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_corrupted_ptr,
    grad_ptr,
    mask_ptr,
    logsumexp_ptr,
    top_key_ptr,
    mean_ptr,
    effect_ptr,
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
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
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
    SIDE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_N)
    block = pid % blocks
    batch_head = pid // blocks % (batches * kv_heads)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    first = pid // blocks // (batches * kv_heads) * CHUNK
    part = tl.program_id(1)
    group = heads // kv_heads // tl.num_programs(1)
    start_n = (block * BLOCK_N).to(tl.int32)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    shift = keys - queries

    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    k = load_rows(k_ptr, offs_n, keys, stride_kn, stride_kd, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, offs_n, keys, stride_vn, stride_vd, V_DIM, BLOCK_V)
    k_corrupted_ptr += batch * stride_xb + kv_head * stride_xh
    k_corrupted = load_rows(k_corrupted_ptr, offs_n, keys, stride_xn, stride_xd, HEAD_DIM, BLOCK_D)

    low, per_head = queries_in_reach(start_n, queries, keys, window, CAUSAL, BLOCK_M, BLOCK_N)
    # the rows of SIDE cotangents
    side_c = first + tl.arange(0, SIDE * BLOCK_M) // BLOCK_M
    side_rows = tl.arange(0, SIDE * BLOCK_M) % BLOCK_M
    effect = ()
    for _ in tl.static_range(CHUNK // SIDE):
        effect = effect + (tl.zeros([BLOCK_N, SIDE, LANES], tl.float32),)

    head = (kv_head * tl.num_programs(1) + part) * group
    start_m = low
    for _ in tl.range(0, group * per_head, num_stages=STAGES):
        left = queries - start_m
        row = (batch * heads + head) * queries + start_m
        q_base = (
            q_ptr + batch * stride_qb + head * stride_qh + tl.cast(start_m, tl.int64) * stride_qm
        )
        # [BLOCK_M, BLOCK_D]
        q = load_rows(q_base, rows, left, stride_qm, stride_qd, HEAD_DIM, BLOCK_D)
        # a row beyond the end has q, g, D and this 0: it adds 0
        lse = tl.load(logsumexp_ptr + row + rows, mask=rows < left, other=0.0)[None, :]
        top = tl.load(top_key_ptr + row + rows, mask=rows < left, other=-1)
        # [BLOCK_N, BLOCK_M]
        raw = row_products(
            k, q, k_ptr, offs_n, keys, stride_kn, stride_kd, q_base, rows, left, stride_qm, stride_qd,
            HEAD_DIM, BLOCK_D, WIDTH, PRECISION,
        )  # fmt: skip
        x = binary_logits(raw, scale, softcap) - lse
        if not sees_whole(start_m, start_n, shift, window, CAUSAL, BLOCK_M, BLOCK_N):
            seen = visible((start_m + shift + rows)[None, :] - offs_n[:, None], window, CAUSAL)
            x = tl.where(seen, x, float("-inf"))
        p = tl.exp2(x)
        raw_patched = row_products(
            k_corrupted, q, k_corrupted_ptr, offs_n, keys, stride_xn, stride_xd,
            q_base, rows, left, stride_qm, stride_qd, HEAD_DIM, BLOCK_D, WIDTH, PRECISION,
        )  # fmt: skip
        w = key_weights(p, x, binary_change(raw_patched, raw, scale, softcap))
        w = tl.where(top[None, :] == offs_n[:, None], 0.0, w)
        # [BLOCK_N, SIDE * BLOCK_M]
        side_w = tl.broadcast_to(w[:, None, :], [BLOCK_N, SIDE, BLOCK_M])
        side_w = tl.reshape(side_w, [BLOCK_N, SIDE * BLOCK_M])

        new_effect = ()
        for j in tl.static_range(CHUNK // SIDE):
            # one that is not there repeats the last, and is not stored
            cotangent = tl.minimum(side_c + j * SIDE, cotangents - 1)
            g_base = grad_ptr + batch * stride_gb + head * stride_gh
            g_base += tl.cast(start_m, tl.int64) * stride_gm
            g_base += (cotangent * stride_gc)[:, None]
            # [SIDE * BLOCK_M, BLOCK_V]
            g = load_rows(g_base, side_rows, left, stride_gm, stride_gd, V_DIM, BLOCK_V)
            row_c = cotangent * batches * heads * queries + row + side_rows
            mean = tl.load(mean_ptr + row_c, mask=side_rows < left, other=0.0)[None, :]
            dp = row_products(
                v, g, v_ptr, offs_n, keys, stride_vn, stride_vd,
                g_base, side_rows, left, stride_gm, stride_gd, V_DIM, BLOCK_V, WIDTH, PRECISION,
            )  # fmt: skip
            total = _part_sums(side_w * (dp - mean), SIDE, LANES)
            new_effect = new_effect + (effect[j] + total,)
        effect = new_effect
        # the next head's first block behind this one's last; a division would cost more
        start_m += BLOCK_M
        behind = start_m >= low + per_head * BLOCK_M
        start_m = tl.where(behind, low, start_m)
        head += tl.where(behind, 1, 0)

    # a masked key's sums are meaningless, even infinite: they are dropped here, once, not in every tile
    real = offs_n < keys
    if mask_ptr is not None:
        masks = mask_ptr + batch * stride_mb + offs_n.to(tl.int64) * stride_mn
        real = tl.load(masks, mask=real, other=0) != 0
    for j in tl.static_range(CHUNK // SIDE):
        cs = first + j * SIDE + tl.arange(0, SIDE)
        columns = ((part * cotangents + cs)[None, :] * batches + batch) * keys + offs_n[:, None]
        mask = (cs < cotangents)[None, :] & (offs_n < keys)[:, None]
        out = tl.where(real[:, None], tl.sum(effect[j], 2), 0.0)
        tl.store(effect_ptr + columns * kv_heads + kv_head, out, mask=mask)


@triton.jit(do_not_specialize=["queries", "keys"])
def _top_vectors_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_corrupted_ptr,
    top_key_ptr,
    loo_logsumexp_ptr,
    loo_z_ptr,
    out_ptr,
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
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    heads,
    kv_heads,
    queries,
    keys,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    batch_head = pid // blocks
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    offs_m = ((pid % blocks) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    inside = offs_m < queries
    row = batch_head * queries

    top = tl.load(top_key_ptr + row + offs_m, mask=inside, other=-1)
    loo = tl.load(loo_logsumexp_ptr + row + offs_m, mask=inside, other=0.0)
    # a row without keys loads none
    at = tl.where(top < 0, keys, top)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    k_corrupted_ptr += batch * stride_xb + kv_head * stride_xh
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, offs_m, queries, stride_qm, stride_qd, HEAD_DIM, BLOCK_D).to(tl.float32)
    k = load_rows(k_ptr, at, keys, stride_kn, stride_kd, HEAD_DIM, BLOCK_D).to(tl.float32)
    x = load_rows(k_corrupted_ptr, at, keys, stride_xn, stride_xd, HEAD_DIM, BLOCK_D).to(tl.float32)
    raw = tl.sum(q * k, 1)
    change = logit_change(tl.sum(q * x, 1), raw, scale, softcap)
    weight = sigmoid_difference(logits(raw, scale, softcap) - loo, change)
    weight = tl.where(top < 0, 0.0, weight)
    # [BLOCK_M, BLOCK_V]
    v = load_rows(v_ptr, at, keys, stride_vn, stride_vd, V_DIM, BLOCK_V).to(tl.float32)
    loo_z = load_rows(loo_z_ptr + row * V_DIM, offs_m, queries, V_DIM, 1, V_DIM, BLOCK_V)
    u = weight[:, None] * (v - loo_z)
    store_rows(out_ptr + row * V_DIM, offs_m, queries, V_DIM, u, V_DIM, BLOCK_V)


@triton.jit(do_not_specialize=["queries", "keys", "window", "cotangents"])
def _top_effects_kernel(
    part_ptr,
    top_key_ptr,
    effect_ptr,
    batches,
    cotangents,
    heads,
    kv_heads,
    queries,
    keys,
    window,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_N)
    batch_head = pid // blocks % (batches * kv_heads)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    cs = pid // blocks // (batches * kv_heads) * CHUNK + tl.arange(0, CHUNK)
    group = heads // kv_heads
    start_n = ((pid % blocks) * BLOCK_N).to(tl.int32)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    low, per_head = queries_in_reach(start_n, queries, keys, window, CAUSAL, BLOCK_M, BLOCK_N)

    effect = tl.zeros([BLOCK_N, CHUNK], tl.float32)
    for step in range(0, group * per_head):
        offs_m = low + step % per_head * BLOCK_M + rows
        inside = offs_m < queries
        row = (batch * heads + kv_head * group + step // per_head) * queries + offs_m
        top = tl.load(top_key_ptr + row, mask=inside, other=-1)
        # [CHUNK, BLOCK_M]
        part_ptrs = part_ptr + cs[:, None] * (batches * heads * queries) + row[None, :]
        part = tl.load(part_ptrs, mask=(cs < cotangents)[:, None] & inside[None, :], other=0.0)
        # [BLOCK_N, BLOCK_M]
        chosen = tl.where(top[None, :] == offs_n[:, None], 1.0, 0.0)
        effect = tl.dot(chosen, tl.trans(part), effect, input_precision=PRECISION)

    columns = (cs[None, :] * batches + batch) * keys + offs_n[:, None]
    mask = (cs < cotangents)[None, :] & (offs_n < keys)[:, None]
    tl.store(effect_ptr + columns * kv_heads + kv_head, effect, mask=mask)


_NARROW = {
    64: (
        Blocks(32, 64, 6, 4, 3, side=2, lanes=4, majors=(9,)),
        Blocks(32, 128, 12, 8, 2, side=4, lanes=4, majors=(9,)),
        Blocks(32, 128, 4, 8, 2, side=4, majors=(10,)),
        Blocks(32, 64, 4, 4, 2, side=2, lanes=4, majors=(8,)),
        Blocks(32, 128, 4, 8, 2, side=2, lanes=4, majors=(8,)),
    ),
    128: (
        Blocks(32, 128, 6, 8, 2, side=2, lanes=4, majors=(9,)),
        Blocks(32, 128, 4, 8, 2, side=2, majors=(10,)),
        Blocks(32, 64, 2, 4, 2, majors=(8,)),
    ),
    256: (
        Blocks(32, 64, 1, 4, 2, width=64, majors=(9, 10)),
        Blocks(32, 64, 1, 8, 2, width=64, majors=(8,)),
    ),
}
_FLOAT32 = {
    64: (
        Blocks(64, 64, 4, 4, 1, majors=(9,)),
        Blocks(32, 64, 2, 4, 2, width=16, side=2),
    ),
    128: (
        Blocks(32, 128, 4, 8, 1, width=32, side=2, majors=(9,)),
        Blocks(32, 64, 4, 4, 2, width=16, side=2, majors=(9,)),
        Blocks(32, 64, 2, 4, 2, width=16, side=2, majors=(8, 10)),
    ),
    256: (Blocks(32, 64, 2, 4, 2, width=16, side=2),),
}
CONFIGS = {
    **{(dtype, dim): _NARROW[dim] for dtype in (torch.bfloat16, torch.float16) for dim in _NARROW},
    **{(torch.float32, dim): choices for dim, choices in _FLOAT32.items()},
}
VECTOR_CONFIGS = {
    (dtype, dim): (Blocks(2048 // dim, 1, 1, 4, 1),)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for dim in (64, 128, 256)
}
# the head size does not enter
EFFECT_BLOCKS = Blocks(64, 128, 16, 8, 2)


def launch_top_vectors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    stats: Outputs,
    scoring: Scoring,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """u, (batch, heads, queries, v_dim) float32: its product with g is the row's part of its top key's effect."""
    sizes = sizes_of(q, k, v)
    out = torch.empty(stats.z.shape, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_corrupted_ptr": k_corrupted,
        "top_key_ptr": stats.top_key,
        "loo_logsumexp_ptr": stats.loo_logsumexp,
        "loo_z_ptr": stats.loo_z,
        "out_ptr": out,
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("x", k_corrupted, "bhnd"),
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "queries": sizes.queries,
        "keys": sizes.keys,
        "scale": scoring.scale,
        "softcap": scoring.softcap,
        "HEAD_DIM": sizes.head_dim,
        "V_DIM": sizes.v_dim,
        "BLOCK_D": padded(sizes.head_dim),
        "BLOCK_V": padded(sizes.v_dim),
    }
    choices = candidates(VECTOR_CONFIGS, q, sizes.head_dim, sizes.v_dim)
    heads = sizes.batch * sizes.heads
    run(
        _top_vectors_kernel,
        lambda b: heads * cdiv(sizes.queries, b.block_m),
        arguments,
        (blocks,) if blocks else choices,
        q,
    )
    return out


def launch_top_effects(
    part: Tensor, top_key: Tensor, sizes: Sizes, scoring: Scoring, *, blocks: Blocks | None = None
) -> Tensor:
    """The rows' parts, (C, batch, heads, queries) float32, summed by top key: (C, batch, keys, kv_heads)."""
    cotangents = part.shape[0]
    shape = (cotangents, sizes.batch, sizes.keys, sizes.kv_heads)
    effect = torch.empty(shape, dtype=torch.float32, device=part.device)
    if effect.numel() == 0:
        return effect
    arguments: dict[str, Any] = {
        "part_ptr": part,
        "top_key_ptr": top_key,
        "effect_ptr": effect,
        "batches": sizes.batch,
        "cotangents": cotangents,
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "queries": sizes.queries,
        "keys": sizes.keys,
        "window": window_of(scoring, sizes),
        "HEAD_DIM": sizes.head_dim,
        "V_DIM": sizes.v_dim,
        "CAUSAL": scoring.causal,
        "PRECISION": dot_precision(torch.float32),
    }
    heads = sizes.batch * sizes.kv_heads

    def programs(b: Blocks) -> int:
        return cdiv(sizes.keys, b.block_n) * heads * cdiv(cotangents, b.chunk)

    run(_top_effects_kernel, programs, arguments, (blocks or EFFECT_BLOCKS,), part)
    return effect


def launch_other_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    grad_z: Tensor,
    top_key: Tensor,
    logsumexp: Tensor,
    mean: Tensor,
    scoring: Scoring,
    *,
    blocks: Blocks | None = None,
    parts: int | None = None,
) -> Tensor:
    """Effects without the parts of rows whose largest key is the patched one; mean is D, logsumexp to the base 2.

    parts: into how many a group's query heads go (launch.group_parts chooses).
    """
    sizes = sizes_of(q, k, v)
    cotangents = grad_z.shape[0]
    shape = (cotangents, sizes.batch, sizes.keys, sizes.kv_heads)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=torch.float32, device=q.device)
    choices = shared_out(candidates(CONFIGS, q, sizes.head_dim, sizes.v_dim), cotangents)
    choices = (blocks,) if blocks else choices
    heads = sizes.batch * sizes.kv_heads

    def programs(b: Blocks) -> int:
        return cdiv(sizes.keys, b.block_n) * heads * cdiv(cotangents, b.chunk)

    parts = parts or group_parts(programs(choices[0]), sizes, q)
    effect = torch.empty((parts, *shape), dtype=torch.float32, device=q.device)
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_corrupted_ptr": k_corrupted,
        "grad_ptr": grad_z,
        "logsumexp_ptr": logsumexp,
        "top_key_ptr": top_key.to(torch.int32),
        "mean_ptr": mean,
        "effect_ptr": effect,
        "batches": sizes.batch,
        "cotangents": cotangents,
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("x", k_corrupted, "bhnd"),
        **strides("g", grad_z, "cbhmd"),
        **scoring_arguments(scoring, sizes),
        "PRECISION": dot_precision(q.dtype),
    }
    run(_key_patch_effects_kernel, programs, arguments, choices, q, parts)
    return effect[0] if parts == 1 else effect.sum(0)


def launch_key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    grad_z: Tensor,
    stats: Outputs,
    scoring: Scoring,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """Signed effects, (C, batch, keys, kv_heads) float32; stats from launch_attention of q, k, v."""
    top_vectors = launch_top_vectors(q, k, v, k_corrupted, stats, scoring)
    mean, top_part, binary = launch_row_dots(
        grad_z, stats.z, top_vectors, logsumexp=stats.logsumexp
    )
    rows = (grad_z, stats.top_key, binary, mean, scoring)
    others = launch_other_effects(q, k, v, k_corrupted, *rows, blocks=blocks)
    return others + launch_top_effects(top_part, stats.top_key, sizes_of(q, k, v), scoring)
