"""What the owner of a key block sums over queries: gradients by keys and values, and the key effects.

    p_ij = exp(s_ij - logsumexp_i)     dP_ij = g_i . v_j     D_i = g_i . z_i
    grad_v_j = sum_i p_ij g_i          grad_k_j = sum_i p_ij (dP_ij - D_i) ds_ij/d(q_i . k_j) q_i
    effect_j = sum_i w_ij (dP_ij - D_i),  w = (a' - a)/(1 - a), a = p_ij; where key j is the row's largest,
               w = a' - a from the leave-one-out logsumexp and D_i = g_i . loo_z_i

Inputs as in attention.py, grad_z (C, batch, heads, queries, v_dim), and per row, float32 contiguous: logsumexp;
top_key and top_weight (the a' - a of the largest key, from key_patch_effects.py); D and loo D per cotangent.
Outputs: grad_k, grad_v (C, batch, kv_heads, keys, dim) in the input dtype; effect (C, batch, keys, kv_heads)
float32. Either the gradients or the effects may be absent; their share of the work is then not compiled.

Logits, p, w, dP and all sums are float32; the operands of a product are in the input dtype (float16: TF32, see
tiles.weigh). Effects never round p or w: they are summed from float32 tiles.

One program owns BLOCK_N keys of one key/value head for CHUNK cotangents, which share p and w, and loops over the
query blocks of every query head of its group: no atomics, sums in a fixed order. Tiles are held transposed,
[BLOCK_N, BLOCK_M], so that p and dS enter their products from registers. Per tile: 1 product for p, 1 for w,
and per cotangent dP, and 2 for the gradients. Bytes per tile: BLOCK_M (head_dim + CHUNK v_dim) elements.
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
    dot_precision,
    run,
    scoring_arguments,
    sizes_of,
    strides,
)
from atp_fast.kernels.tiles import (
    key_weights,
    load_rows,
    logits,
    soften,
    store_rows,
    visible,
    weigh,
)


@triton.jit(do_not_specialize=["queries", "keys", "window", "cotangents"])
def _key_blocks_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_corrupted_ptr,
    grad_ptr,
    mask_ptr,
    logsumexp_ptr,
    top_key_ptr,
    top_weight_ptr,
    mean_ptr,
    loo_mean_ptr,
    grad_k_ptr,
    grad_v_ptr,
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
):
    GRADS: tl.constexpr = grad_k_ptr is not None
    EFFECTS: tl.constexpr = effect_ptr is not None
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_N)
    block = pid % blocks
    batch_head = pid // blocks % (batches * kv_heads)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    first = pid // blocks // (batches * kv_heads) * CHUNK
    group = heads // kv_heads
    start_n = (block * BLOCK_N).to(tl.int32)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    shift = keys - queries

    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    k = load_rows(k_ptr, offs_n, keys, stride_kn, stride_kd, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, offs_n, keys, stride_vn, stride_vd, V_DIM, BLOCK_V)
    if EFFECTS:
        k_corrupted_ptr += batch * stride_xb + kv_head * stride_xh
        x = load_rows(k_corrupted_ptr, offs_n, keys, stride_xn, stride_xd, HEAD_DIM, BLOCK_D)

    # the queries that may see one of these keys
    low = 0
    high = queries
    if CAUSAL:
        low = tl.maximum(start_n - shift, 0) // BLOCK_M * BLOCK_M
    if window is not None:
        high = tl.minimum(start_n + BLOCK_N - 1 + window - shift, queries)
    per_head = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)

    grad_k = ()
    grad_v = ()
    effect = ()
    for _ in tl.static_range(CHUNK):
        if GRADS:
            grad_k = grad_k + (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)
            grad_v = grad_v + (tl.zeros([BLOCK_N, BLOCK_V], tl.float32),)
        if EFFECTS:
            effect = effect + (tl.zeros([BLOCK_N], tl.float32),)

    for step in range(0, group * per_head):
        head = kv_head * group + step // per_head
        start_m = low + step % per_head * BLOCK_M
        offs_m = start_m + rows
        inside = offs_m < queries
        row = (batch * heads + head) * queries
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        # [BLOCK_M, BLOCK_D]
        q = load_rows(q_base, offs_m, queries, stride_qm, stride_qd, HEAD_DIM, BLOCK_D)
        lse = tl.load(logsumexp_ptr + row + offs_m, mask=inside, other=float("inf"))
        # rows without an admissible key: every weight 0
        lse = tl.where(lse == float("-inf"), float("inf"), lse)[None, :]
        seen = visible((offs_m + shift)[None, :] - offs_n[:, None], window, CAUSAL)
        # [BLOCK_N, BLOCK_M]
        s = logits(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)
        p = tl.where(seen, tl.exp(s - lse), 0.0)
        if EFFECTS:
            raw = tl.dot(x, tl.trans(q), input_precision=PRECISION)
            w = key_weights(p, s, logits(raw, scale, softcap), lse)
            top = tl.load(top_key_ptr + row + offs_m, mask=inside, other=-1).to(tl.int32)
            top_weight = tl.load(top_weight_ptr + row + offs_m, mask=inside, other=0.0)
            is_top = top[None, :] == offs_n[:, None]
            w = tl.where(seen, tl.where(is_top, top_weight[None, :], w), 0.0)

        new_grad_k = ()
        new_grad_v = ()
        new_effect = ()
        for c in tl.static_range(CHUNK):
            present = tl.where(first + c < cotangents, queries, 0)
            g_base = grad_ptr + (first + c) * stride_gc + batch * stride_gb + head * stride_gh
            # [BLOCK_M, BLOCK_V]
            g = load_rows(g_base, offs_m, present, stride_gm, stride_gd, V_DIM, BLOCK_V)
            row_c = (first + c) * batches * heads * queries + row + offs_m
            mean = tl.load(mean_ptr + row_c, mask=offs_m < present, other=0.0)[None, :]
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            if GRADS:
                ds = soften(p * (dp - mean), s, softcap)
                new_grad_v = new_grad_v + (weigh(p, g, grad_v[c], PRECISION),)
                new_grad_k = new_grad_k + (weigh(ds, q, grad_k[c], PRECISION),)
            if EFFECTS:
                loo = tl.load(loo_mean_ptr + row_c, mask=offs_m < present, other=0.0)[None, :]
                total = tl.sum(w * (dp - tl.where(is_top, loo, mean)), 1)
                new_effect = new_effect + (effect[c] + total,)
        if GRADS:
            grad_k = new_grad_k
            grad_v = new_grad_v
        if EFFECTS:
            effect = new_effect

    # a masked key's sums are meaningless, even infinite: they are dropped here, once, not in every tile
    real = offs_n < keys
    if mask_ptr is not None:
        masks = mask_ptr + batch * stride_mb + offs_n.to(tl.int64) * stride_mn
        real = tl.load(masks, mask=real, other=0) != 0
    for c in tl.static_range(CHUNK):
        if first + c < cotangents:
            row = (((first + c) * batches + batch) * kv_heads + kv_head) * keys
            if GRADS:
                dk = tl.where(real[:, None], grad_k[c] * scale, 0.0)
                dv = tl.where(real[:, None], grad_v[c], 0.0)
                store_rows(grad_k_ptr + row * HEAD_DIM, offs_n, keys, dk, HEAD_DIM, BLOCK_D)
                store_rows(grad_v_ptr + row * V_DIM, offs_n, keys, dv, V_DIM, BLOCK_V)
            if EFFECTS:
                column = ((first + c) * batches + batch) * keys + offs_n.to(tl.int64)
                out = tl.where(real, effect[c], 0.0)
                tl.store(effect_ptr + column * kv_heads + kv_head, out, mask=offs_n < keys)


CONFIGS = {
    (2, 64): (Blocks(64, 64, 4, 8, 2), Blocks(64, 64, 2, 4, 2)),
    (2, 128): (Blocks(64, 64, 2, 8, 2), Blocks(64, 64, 1, 8, 2)),
    (2, 256): (Blocks(32, 64, 1, 8, 1),),
    (4, 64): (Blocks(32, 64, 2, 8, 1),),
    (4, 128): (Blocks(32, 32, 1, 8, 1),),
    (4, 256): (Blocks(16, 32, 1, 8, 1),),
}
EFFECT_CONFIGS = {
    (2, 64): (Blocks(64, 64, 4, 8, 2),),
    (2, 128): (Blocks(64, 64, 4, 8, 2),),
    (2, 256): (Blocks(32, 64, 2, 8, 1),),
    (4, 64): (Blocks(32, 64, 2, 8, 1),),
    (4, 128): (Blocks(32, 32, 1, 8, 1),),
    (4, 256): (Blocks(16, 32, 1, 8, 1),),
}


def launch_key_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_z: Tensor,
    logsumexp: Tensor,
    mean: Tensor,
    scoring: Scoring,
    *,
    grads: bool,
    patch: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_k and grad_v if grads, else None; the key effects if patch, else None.

    mean: (C, batch, heads, queries), D; patch: k_corrupted, top_key, top_weight and the leave-one-out D.
    """
    sizes = sizes_of(q, k, v)
    cotangents = grad_z.shape[0]
    kv = (cotangents, sizes.batch, sizes.kv_heads, sizes.keys)
    grad_k = grad_v = effect = None
    if grads:
        grad_k = q.new_empty((*kv, sizes.head_dim))
        grad_v = q.new_empty((*kv, sizes.v_dim))
    if patch is not None:
        effect = torch.empty(
            (cotangents, sizes.batch, sizes.keys, sizes.kv_heads),
            dtype=torch.float32,
            device=q.device,
        )
    k_corrupted, top_key, top_weight, loo_mean = patch or (None, None, None, None)
    if cotangents * sizes.batch * sizes.kv_heads * sizes.keys == 0:
        return grad_k, grad_v, effect
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_corrupted_ptr": k_corrupted,
        "grad_ptr": grad_z,
        "logsumexp_ptr": logsumexp,
        "top_key_ptr": top_key,
        "top_weight_ptr": top_weight,
        "mean_ptr": mean,
        "loo_mean_ptr": loo_mean,
        "grad_k_ptr": grad_k,
        "grad_v_ptr": grad_v,
        "effect_ptr": effect,
        "batches": sizes.batch,
        "cotangents": cotangents,
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("x", k if k_corrupted is None else k_corrupted, "bhnd"),
        **strides("g", grad_z, "cbhmd"),
        **scoring_arguments(scoring, sizes),
        "PRECISION": dot_precision(q.dtype),
    }
    configs = CONFIGS if grads else EFFECT_CONFIGS
    choices = (blocks,) if blocks else candidates(configs, q.dtype, sizes.head_dim, sizes.v_dim)
    heads = sizes.batch * sizes.kv_heads

    def programs(b: Blocks) -> int:
        return triton.cdiv(sizes.keys, b.block_n) * heads * triton.cdiv(cotangents, b.chunk)

    run(_key_blocks_kernel, programs, arguments, choices, q)
    return grad_k, grad_v, effect
