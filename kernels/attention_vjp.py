"""Vector-Jacobian products of attention for C cotangents that share the recomputed weights.

    p_ij = exp(s_ij - logsumexp_i)   dP_ij = g_i . v_j   D_i = g_i . z_i
    dS_ij = p_ij (dP_ij - D_i) ds_ij/d(q_i . k_j)
    grad_q_i = sum_j dS_ij k_j       grad_k_j = sum_i dS_ij q_i       grad_v_j = sum_i p_ij g_i

Inputs as in attention.py; grad_z (C, batch, heads, queries, v_dim); logsumexp, to the base 2, and D float32, from one read of
grad_z (row_dots.py). Only tiles at the diagonal, a window's edge or the end are masked. Outputs have a leading C and the
dtype of q. Logits, p, dP, dS and sums are float32; operands of products are in the input dtype (float16: TF32, see
tiles.weigh).

No atomics: the owner of a key block sums grad_k and grad_v, the owner of a query block grad_q, each from its own
p and dP, in a fixed order. One program serves CHUNK cotangents, which share p.

_attention_vjp_key_kernel: BLOCK_N keys of one key/value head; loops over the query blocks in reach of every query
head of the group; where programs are few, of a part of it, and the parts, float32, are summed afterwards. Tiles are held
transposed, [BLOCK_N, BLOCK_M], so that p and dS enter their products from registers. Per tile: 1 product for p and 3 per
cotangent; bytes: BLOCK_M (head_dim + CHUNK v_dim) elements.
_attention_vjp_query_kernel: BLOCK_M queries of one head, whose g stay on chip; loops over the key blocks in reach.
Per tile: 1 product for p and 2 per cotangent; bytes: BLOCK_N (head_dim + v_dim) elements.

More than 400 lines: the kernels share one derivation, and Triton wants every pointer and stride named.
"""

from __future__ import annotations

from typing import Any

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
    group_parts,
    padded,
    run,
    scoring_arguments,
    shared_out,
    sizes_of,
    strides,
)
from atp_fast.kernels.row_dots import launch_row_dots
from atp_fast.kernels.tiles import (
    binary_logits,
    hide,
    keys_in_reach,
    keys_seen_whole,
    load_rows,
    queries_in_reach,
    row_products,
    sees_whole,
    soften,
    store_rows,
    visible,
    weigh,
)


@triton.jit(do_not_specialize=["queries", "keys", "window", "cotangents"])
def _attention_vjp_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    mask_ptr,
    logsumexp_ptr,
    mean_ptr,
    grad_k_ptr,
    grad_v_ptr,
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
    WIDTH: tl.constexpr,
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

    low, per_head = queries_in_reach(start_n, queries, keys, window, CAUSAL, BLOCK_M, BLOCK_N)
    grad_k = ()
    grad_v = ()
    for _ in tl.static_range(CHUNK):
        if grad_k_ptr is not None:
            grad_k = grad_k + (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)
        if grad_v_ptr is not None:
            grad_v = grad_v + (tl.zeros([BLOCK_N, BLOCK_V], tl.float32),)

    head = (kv_head * tl.num_programs(1) + part) * group
    start_m = low
    for _ in range(0, group * per_head):
        left = queries - start_m
        row = (batch * heads + head) * queries + start_m
        q_base = (
            q_ptr + batch * stride_qb + head * stride_qh + tl.cast(start_m, tl.int64) * stride_qm
        )
        # [BLOCK_M, BLOCK_D]
        q = load_rows(q_base, rows, left, stride_qm, stride_qd, HEAD_DIM, BLOCK_D)
        # a row beyond the end has q, g, D and this 0: it adds 0
        lse = tl.load(logsumexp_ptr + row + rows, mask=rows < left, other=0.0)[None, :]
        # [BLOCK_N, BLOCK_M]
        raw = row_products(
            k, q, k_ptr, offs_n, keys, stride_kn, stride_kd, q_base, rows, left, stride_qm, stride_qd,
            HEAD_DIM, BLOCK_D, WIDTH, PRECISION,
        )  # fmt: skip
        s = binary_logits(raw, scale, softcap)
        x = s - lse
        if not sees_whole(start_m, start_n, shift, window, CAUSAL, BLOCK_M, BLOCK_N):
            seen = visible((start_m + shift + rows)[None, :] - offs_n[:, None], window, CAUSAL)
            x = tl.where(seen, x, float("-inf"))
        p = tl.exp2(x)

        new_grad_k = ()
        new_grad_v = ()
        for c in tl.static_range(CHUNK):
            # one that is not there repeats the last, and is not stored
            cotangent = tl.minimum(first + c, cotangents - 1)
            g_base = grad_ptr + cotangent * stride_gc + batch * stride_gb + head * stride_gh
            g_base += tl.cast(start_m, tl.int64) * stride_gm
            # [BLOCK_M, BLOCK_V]
            g = load_rows(g_base, rows, left, stride_gm, stride_gd, V_DIM, BLOCK_V)
            # sliced, dP is a loop that nothing overlaps; otherwise grad_v's product runs while dS is formed
            if grad_v_ptr is not None and WIDTH < BLOCK_V:
                new_grad_v = new_grad_v + (weigh(p, g, grad_v[c], PRECISION),)
            if grad_k_ptr is not None:
                dp = row_products(
                    v, g, v_ptr, offs_n, keys, stride_vn, stride_vd,
                    g_base, rows, left, stride_gm, stride_gd, V_DIM, BLOCK_V, WIDTH, PRECISION,
                )  # fmt: skip
            if grad_v_ptr is not None and WIDTH >= BLOCK_V:
                new_grad_v = new_grad_v + (weigh(p, g, grad_v[c], PRECISION),)
            if grad_k_ptr is not None:
                row_c = cotangent * batches * heads * queries + row + rows
                mean = tl.load(mean_ptr + row_c, mask=rows < left, other=0.0)[None, :]
                ds = soften(p * (dp - mean), s, softcap)
                new_grad_k = new_grad_k + (weigh(ds, q, grad_k[c], PRECISION),)
        if grad_k_ptr is not None:
            grad_k = new_grad_k
        if grad_v_ptr is not None:
            grad_v = new_grad_v
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
    for c in tl.static_range(CHUNK):
        if first + c < cotangents:
            # heads side by side, as the products behind read them
            row = ((part * cotangents + first + c) * batches + batch) * keys * kv_heads + kv_head
            if grad_k_ptr is not None:
                dk = tl.where(real[:, None], grad_k[c] * scale, 0.0)
                k_out = grad_k_ptr + row * HEAD_DIM
                store_rows(k_out, offs_n, keys, kv_heads * HEAD_DIM, dk, HEAD_DIM, BLOCK_D)
            if grad_v_ptr is not None:
                dv = tl.where(real[:, None], grad_v[c], 0.0)
                v_out = grad_v_ptr + row * V_DIM
                store_rows(v_out, offs_n, keys, kv_heads * V_DIM, dv, V_DIM, BLOCK_V)


@triton.jit(do_not_specialize=["queries", "keys", "window", "cotangents"])
def _attention_vjp_query_kernel(
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
    WIDTH: tl.constexpr,
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

    low, high = keys_in_reach(start_m, queries, keys, window, CAUSAL, BLOCK_M, BLOCK_N)
    whole, rest = keys_seen_whole(
        start_m, low, high, queries, keys, window, CAUSAL, mask_ptr is not None, BLOCK_M, BLOCK_N
    )

    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    q_ptr += batch * stride_qb + head * stride_qh
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    row = batch_head * queries + offs_m
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, offs_m, queries, stride_qm, stride_qd, HEAD_DIM, BLOCK_D)
    lse = tl.load(logsumexp_ptr + row, mask=offs_m < queries, other=0.0)[:, None]
    g = ()
    mean = ()
    grad_q = ()
    for c in tl.static_range(CHUNK):
        # one that is not there repeats the last, and is not stored
        cotangent = tl.minimum(first + c, cotangents - 1)
        g_base = grad_ptr + cotangent * stride_gc + batch * stride_gb + head * stride_gh
        # [BLOCK_M, BLOCK_V]
        g = g + (load_rows(g_base, offs_m, queries, stride_gm, stride_gd, V_DIM, BLOCK_V),)
        row_c = cotangent * batches * heads * queries + row
        mean = mean + (tl.load(mean_ptr + row_c, mask=offs_m < queries, other=0.0)[:, None],)
        grad_q = grad_q + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)

    for start_n in range(low, high, BLOCK_N):
        left = keys - start_n
        k_base = k_ptr + tl.cast(start_n, tl.int64) * stride_kn
        v_base = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
        k = load_rows(k_base, cols, left, stride_kn, stride_kd, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base, cols, left, stride_vn, stride_vd, V_DIM, BLOCK_V)
        # [BLOCK_M, BLOCK_N]
        raw = row_products(
            q, k, q_ptr, offs_m, queries, stride_qm, stride_qd, k_base, cols, left, stride_kn, stride_kd,
            HEAD_DIM, BLOCK_D, WIDTH, PRECISION,
        )  # fmt: skip
        s = binary_logits(raw, scale, softcap)
        x = s - lse
        if (start_n < whole) | (start_n >= rest):
            x = hide(x, positions, mask_ptr, start_n, cols, stride_mn, keys, window, CAUSAL)
        p = tl.exp2(x)
        new_grad_q = ()
        for c in tl.static_range(CHUNK):
            cotangent = tl.minimum(first + c, cotangents - 1)
            g_base = grad_ptr + cotangent * stride_gc + batch * stride_gb + head * stride_gh
            dp = row_products(
                g[c], v, g_base, offs_m, queries, stride_gm, stride_gd,
                v_base, cols, left, stride_vn, stride_vd, V_DIM, BLOCK_V, WIDTH, PRECISION,
            )  # fmt: skip
            ds = soften(p * (dp - mean[c]), s, softcap)
            new_grad_q = new_grad_q + (weigh(ds, k, grad_q[c], PRECISION),)
        grad_q = new_grad_q

    for c in tl.static_range(CHUNK):
        if first + c < cotangents:
            # heads side by side, as the products behind read them
            out = ((first + c) * batches * heads + batch_head - head) * queries + head
            out_ptr = grad_q_ptr + out * HEAD_DIM
            dq = grad_q[c] * scale
            store_rows(out_ptr, offs_m, queries, heads * HEAD_DIM, dq, HEAD_DIM, BLOCK_D)


# bytes of a padded head from which grad_k and grad_v no longer fit the registers together
_WIDE = 512
KEY_CONFIGS = {
    (torch.bfloat16, 64): (
        Blocks(64, 64, 2, 4, 3, majors=(9,)),
        Blocks(32, 64, 2, 4, 3, majors=(9,)),
        Blocks(32, 128, 2, 8, 3, majors=(9,)),
        Blocks(32, 128, 2, 8, 2, majors=(10,)),
        Blocks(16, 128, 2, 8, 2, majors=(8,)),
        Blocks(32, 128, 1, 8, 2, majors=(8,)),
    ),
    (torch.bfloat16, 128): (
        Blocks(64, 64, 1, 4, 2, majors=(9,)),
        Blocks(32, 128, 1, 8, 2, majors=(9,)),
        Blocks(64, 128, 1, 8, 2, majors=(10,)),
        Blocks(64, 64, 1, 8, 2, majors=(8,)),
        Blocks(16, 128, 1, 8, 2, majors=(8,)),
    ),
    (torch.bfloat16, 256): (Blocks(32, 64, 1, 8, 2, width=64),),
    (torch.float16, 64): (Blocks(32, 128, 1, 8, 2),),
    (torch.float16, 128): (
        Blocks(32, 128, 1, 8, 2, majors=(10,)),
        Blocks(32, 64, 1, 8, 2, majors=(9,)),
        Blocks(16, 128, 1, 8, 2, majors=(8, 9)),
    ),
    (torch.float16, 256): (Blocks(32, 64, 1, 8, 2, width=64),),
    (torch.float32, 64): (
        Blocks(64, 128, 1, 8, 1, majors=(9,)),
        Blocks(32, 64, 1, 8, 2, width=16, majors=(9,)),
        Blocks(64, 32, 1, 8, 2, width=16, majors=(10,)),
        Blocks(16, 64, 1, 4, 2, width=16, majors=(8, 10)),
    ),
    (torch.float32, 128): (
        Blocks(16, 128, 1, 8, 1, majors=(9,)),
        Blocks(32, 64, 1, 4, 2, width=16, majors=(9,)),
        Blocks(32, 32, 1, 8, 2, width=16, majors=(10,)),
        Blocks(16, 32, 1, 4, 2, width=16, majors=(8,)),
    ),
    (torch.float32, 256): (
        Blocks(16, 64, 1, 8, 1, width=16, majors=(9,)),
        Blocks(16, 64, 1, 8, 2, width=16, majors=(9,)),
        Blocks(16, 32, 1, 8, 2, width=16, majors=(10,)),
        Blocks(16, 16, 1, 4, 1, width=16, majors=(8,)),
    ),
}
QUERY_CONFIGS = {
    (torch.bfloat16, 64): (
        Blocks(64, 64, 2, 4, 3, majors=(9,)),
        Blocks(64, 64, 3, 4, 3, majors=(9,)),
        Blocks(128, 64, 3, 8, 3, majors=(9,)),
        Blocks(128, 64, 2, 8, 2, majors=(10,)),
        Blocks(64, 64, 1, 4, 2, majors=(8,)),
    ),
    (torch.bfloat16, 128): (
        Blocks(128, 64, 2, 8, 3, majors=(9,)),
        Blocks(128, 64, 1, 8, 2, majors=(10,)),
        Blocks(64, 64, 1, 4, 2, majors=(8,)),
        Blocks(64, 64, 1, 8, 2, majors=(8,)),
    ),
    (torch.bfloat16, 256): (Blocks(64, 32, 1, 8, 2, width=64),),
    (torch.float16, 64): (Blocks(64, 64, 1, 4, 2),),
    (torch.float16, 128): (Blocks(64, 32, 1, 4, 2),),
    (torch.float16, 256): (Blocks(64, 32, 1, 8, 2, width=64),),
    (torch.float32, 64): (
        Blocks(64, 64, 1, 4, 1, majors=(9,)),
        Blocks(64, 32, 1, 8, 2, width=32, majors=(10,)),
        Blocks(32, 32, 1, 4, 2, width=16, majors=(8,)),
    ),
    (torch.float32, 128): (
        Blocks(128, 16, 1, 8, 1, majors=(9,)),
        Blocks(64, 32, 1, 4, 2, width=16, majors=(9,)),
        Blocks(32, 16, 1, 4, 2, width=16, majors=(8, 10)),
    ),
    (torch.float32, 256): (
        Blocks(64, 16, 1, 8, 2, width=16, majors=(9,)),
        Blocks(32, 16, 1, 8, 2, width=16, majors=(10,)),
        Blocks(32, 16, 1, 4, 1, width=16, majors=(8,)),
    ),
}


def launch_key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_z: Tensor,
    logsumexp: Tensor,
    mean: Tensor,
    scoring: Scoring,
    *,
    blocks: Blocks | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """grad_k and grad_v, heads side by side in memory; mean is D, (C, batch, heads, queries) float32, logsumexp to the base 2
    (row_dots.py).

    parts: into how many a group's query heads go (launch.group_parts chooses).
    """
    sizes = sizes_of(q, k, v)
    cotangents = grad_z.shape[0]
    if (k.numel() + v.numel()) * cotangents == 0:
        return tuple(x.new_empty((cotangents, *x.shape)) for x in (k, v))
    choices = shared_out(candidates(KEY_CONFIGS, q, sizes.head_dim, sizes.v_dim), cotangents)
    choices = (blocks,) if blocks else choices
    heads = sizes.batch * sizes.kv_heads

    def programs(b: Blocks) -> int:
        return cdiv(sizes.keys, b.block_n) * heads * cdiv(cotangents, b.chunk)

    parts = parts or group_parts(programs(choices[0]), sizes, q)
    wide = k.dtype if parts == 1 else torch.float32
    rows = (parts, cotangents, sizes.batch, sizes.keys, sizes.kv_heads)
    grad_k = torch.empty((*rows, sizes.head_dim), dtype=wide, device=k.device)
    grad_v = torch.empty((*rows, sizes.v_dim), dtype=wide, device=v.device)
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "grad_ptr": grad_z,
        "logsumexp_ptr": logsumexp,
        "mean_ptr": mean,
        "grad_k_ptr": grad_k,
        "grad_v_ptr": grad_v,
        "batches": sizes.batch,
        "cotangents": cotangents,
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("g", grad_z, "cbhmd"),
        **scoring_arguments(scoring, sizes),
        "PRECISION": dot_precision(q.dtype),
    }
    if q.element_size() * max(padded(sizes.head_dim), padded(sizes.v_dim)) < _WIDE:
        run(_attention_vjp_key_kernel, programs, arguments, choices, q, parts)
    else:
        for absent in ("grad_k_ptr", "grad_v_ptr"):
            without = {**arguments, absent: None}
            run(_attention_vjp_key_kernel, programs, without, choices, q, parts)
    grads = (g[0] if parts == 1 else g.sum(0).to(k.dtype) for g in (grad_k, grad_v))
    return tuple(g.transpose(2, 3) for g in grads)


def launch_query_gradients(
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
    """grad_q, heads side by side in memory; mean is D, (C, batch, heads, queries) float32, logsumexp to the base 2 (row_dots.py)."""
    sizes = sizes_of(q, k, v)
    cotangents = grad_z.shape[0]
    shape = (cotangents, sizes.batch, sizes.queries, sizes.heads, sizes.head_dim)
    grad_q = torch.empty(shape, dtype=q.dtype, device=q.device)
    if grad_q.numel() == 0:
        return grad_q.transpose(2, 3)
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
    choices = shared_out(candidates(QUERY_CONFIGS, q, sizes.head_dim, sizes.v_dim), cotangents)
    heads = sizes.batch * sizes.heads

    def programs(b: Blocks) -> int:
        return cdiv(sizes.queries, b.block_m) * heads * cdiv(cotangents, b.chunk)

    run(_attention_vjp_query_kernel, programs, arguments, (blocks,) if blocks else choices, q)
    return grad_q.transpose(2, 3)


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
    mean, binary = launch_row_dots(grad_z, z, logsumexp=logsumexp)
    rows = (grad_z, binary, mean, scoring)
    grad_q = launch_query_gradients(q, k, v, *rows, blocks=query_blocks)
    return grad_q, *launch_key_gradients(q, k, v, *rows, blocks=key_blocks)
