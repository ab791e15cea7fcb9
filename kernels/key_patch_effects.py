"""Effects of patching each key alone, every row's softmax recomputed exactly (AtP* QK fix).

    effect_j = sum_i (a' - a)/(1 - a) (g_i . v_j - D_i),   a = p_ij, a' = sigmoid(logit(a) + s'_ij - s_ij)

and where key j is row i's largest, a' - a = sigmoid(x') - sigmoid(x), x = s_ij - loo_logsumexp_i, with D_i the
mean over the other keys, g_i . loo_z_i: there 1 - a would cancel. Tiles and sums are those of key_blocks.py.

The kernel below computes a' - a for the one largest key of each row, which so costs O(queries head_dim) and not
a second form in every tile. One program owns BLOCK_M queries of one head and gathers their top keys. q, k,
k_corrupted any float dtype; products, logits and result float32. Bytes per query: 3 head_dim elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels.attention import Outputs
from atp_fast.kernels.key_blocks import launch_key_blocks
from atp_fast.kernels.launch import (
    Blocks,
    Scoring,
    candidates,
    run,
    scoring_arguments,
    sizes_of,
    strides,
)
from atp_fast.kernels.row_dots import launch_row_dots
from atp_fast.kernels.tiles import load_rows, logits, sigmoid_difference


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def _top_weights_kernel(
    q_ptr,
    k_ptr,
    k_corrupted_ptr,
    mask_ptr,
    top_key_ptr,
    loo_logsumexp_ptr,
    weight_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    batch_head = pid // blocks
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    offs_m = ((pid % blocks) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    inside = offs_m < queries
    row = batch_head * queries + offs_m

    top = tl.load(top_key_ptr + row, mask=inside, other=-1)
    loo = tl.load(loo_logsumexp_ptr + row, mask=inside, other=0.0)
    # a row without keys loads none
    at = tl.where(top < 0, keys, top)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    k_corrupted_ptr += batch * stride_xb + kv_head * stride_xh
    # [BLOCK_M, BLOCK_D] each
    q = load_rows(q_ptr, offs_m, queries, stride_qm, stride_qd, HEAD_DIM, BLOCK_D).to(tl.float32)
    k = load_rows(k_ptr, at, keys, stride_kn, stride_kd, HEAD_DIM, BLOCK_D).to(tl.float32)
    x = load_rows(k_corrupted_ptr, at, keys, stride_xn, stride_xd, HEAD_DIM, BLOCK_D).to(tl.float32)
    s = logits(tl.sum(q * k, 1), scale, softcap)
    change = logits(tl.sum(q * x, 1), scale, softcap) - s
    weight = tl.where(top < 0, 0.0, sigmoid_difference(s - loo, change))
    tl.store(weight_ptr + row, weight, mask=inside)


CONFIGS = {
    (2, 64): (Blocks(32, 1, 1, 4, 1),),
    (2, 128): (Blocks(16, 1, 1, 4, 1),),
    (2, 256): (Blocks(8, 1, 1, 4, 1),),
    (4, 64): (Blocks(32, 1, 1, 4, 1),),
    (4, 128): (Blocks(16, 1, 1, 4, 1),),
    (4, 256): (Blocks(8, 1, 1, 4, 1),),
}


def launch_top_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    top_key: Tensor,
    loo_logsumexp: Tensor,
    scoring: Scoring,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """a' - a of every row's largest key, (batch, heads, queries) float32; 0 for rows without keys."""
    sizes = sizes_of(q, k, v)
    weight = torch.empty(top_key.shape, dtype=torch.float32, device=q.device)
    if weight.numel() == 0:
        return weight
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "k_corrupted_ptr": k_corrupted,
        "top_key_ptr": top_key,
        "loo_logsumexp_ptr": loo_logsumexp,
        "weight_ptr": weight,
        **strides("q", q, "bhmd"),
        **strides("k", k, "bhnd"),
        **strides("x", k_corrupted, "bhnd"),
        **scoring_arguments(scoring, sizes),
    }
    choices = (blocks,) if blocks else candidates(CONFIGS, q.dtype, sizes.head_dim)
    heads = sizes.batch * sizes.heads
    run(
        _top_weights_kernel,
        lambda b: heads * triton.cdiv(sizes.queries, b.block_m),
        arguments,
        choices,
        q,
    )
    return weight


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
    mean, loo_mean = launch_row_dots(grad_z, stats.z, stats.loo_z)
    weight = launch_top_weights(q, k, v, k_corrupted, stats.top_key, stats.loo_logsumexp, scoring)
    patch = (k_corrupted, stats.top_key, weight, loo_mean)
    return launch_key_blocks(
        q, k, v, grad_z, stats.logsumexp, mean, scoring, grads=False, patch=patch, blocks=blocks
    )[2]
