"""attention_vjp, query_patch_effects and key_patch_effects in one pass over the tiles: what the sweep calls.

The formulas are in those modules. grad_z is read once for the three row products (D, the leave-one-out D, the
query effects), then the owner of a key block sums gradients and key effects together: given dP, the exact key fix
costs one more product per tile, shared by the cotangents of the program; the query fix costs one more forward.
"""

from __future__ import annotations

from torch import Tensor

from atp_fast.kernels.attention import Outputs, launch_attention
from atp_fast.kernels.attention_vjp import launch_query_blocks
from atp_fast.kernels.key_blocks import launch_key_blocks
from atp_fast.kernels.key_patch_effects import launch_top_weights
from atp_fast.kernels.launch import Blocks, Scoring
from atp_fast.kernels.row_dots import launch_row_dots


def launch_attention_vjp_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_corrupted: Tensor,
    k_corrupted: Tensor,
    stats: Outputs,
    grad_z: Tensor,
    scoring: Scoring,
    *,
    query_blocks: Blocks | None = None,
    key_blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v, effect_q, effect_k; stats from launch_attention of q, k, v."""
    moved = launch_attention(q_corrupted, k, v, scoring).z - stats.z
    mean, loo_mean, effect_q = launch_row_dots(grad_z, stats.z, stats.loo_z, moved)
    weight = launch_top_weights(q, k, v, k_corrupted, stats.top_key, stats.loo_logsumexp, scoring)
    grad_q = launch_query_blocks(
        q, k, v, grad_z, stats.logsumexp, mean, scoring, blocks=query_blocks
    )
    patch = (k_corrupted, stats.top_key, weight, loo_mean)
    grad_k, grad_v, effect_k = launch_key_blocks(
        q, k, v, grad_z, stats.logsumexp, mean, scoring, grads=True, patch=patch, blocks=key_blocks
    )
    return grad_q, grad_k, grad_v, effect_q.transpose(-1, -2), effect_k
