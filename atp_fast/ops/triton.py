"""Backend "triton": the ops by the kernels of atp_fast.kernels, on CUDA or in Triton's interpreter.

Functions and arguments are those of reference.py; inputs arrive checked by atp_fast.ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_fast.kernels.attention import Outputs, launch_attention
from atp_fast.kernels.attention_vjp import launch_attention_vjp
from atp_fast.kernels.attention_vjp_effects import launch_attention_vjp_effects
from atp_fast.kernels.key_patch_effects import launch_key_patch_effects
from atp_fast.kernels.launch import INTERPRETED as INTERPRETED
from atp_fast.kernels.launch import Scoring as KernelScoring
from atp_fast.kernels.node_effects import launch_node_effects
from atp_fast.kernels.query_patch_effects import launch_query_patch_effects
from atp_fast.ops.reference import AttentionEffects, AttentionStats, Scoring


def _outputs(stats: AttentionStats) -> Outputs:
    """The statistics as the kernels read them: float32 (top_key int64), contiguous."""
    top_key = stats.top_key.to(torch.int64).contiguous()
    wide = stats._replace(top_key=top_key)
    return Outputs(*(x if x is top_key else x.to(torch.float32).contiguous() for x in wide))


def attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, AttentionStats]:
    """z in q's dtype and the row statistics."""
    out = launch_attention(q, k, v, KernelScoring(*scoring))
    return out.z.to(q.dtype), AttentionStats(*out)


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, stats: AttentionStats, grad_z: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of every cotangent."""
    rows = _outputs(stats)
    grads: tuple[Tensor, Tensor, Tensor] = launch_attention_vjp(
        q, k, v, rows.z, rows.logsumexp, grad_z, KernelScoring(*scoring)
    )
    return grads


def query_patch_effects(
    q: Tensor, k: Tensor, v: Tensor, q_corrupted: Tensor, grad_z: Tensor, scoring: Scoring
) -> Tensor:
    """Signed, (C, batch, queries, heads)."""
    effects: Tensor = launch_query_patch_effects(
        q, k, v, q_corrupted, grad_z, KernelScoring(*scoring)
    )
    return effects


def key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    grad_z: Tensor,
    stats: AttentionStats,
    scoring: Scoring,
) -> Tensor:
    """Signed, (C, batch, keys, kv_heads)."""
    effects: Tensor = launch_key_patch_effects(
        q, k, v, k_corrupted, grad_z, _outputs(stats), KernelScoring(*scoring)
    )
    return effects


def attention_vjp_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_corrupted: Tensor,
    k_corrupted: Tensor,
    stats: AttentionStats,
    grad_z: Tensor,
    scoring: Scoring,
) -> AttentionEffects:
    """Gradients and effects together."""
    return AttentionEffects(
        *launch_attention_vjp_effects(
            q, k, v, q_corrupted, k_corrupted, _outputs(stats), grad_z, KernelScoring(*scoring)
        )
    )


def node_effects(delta: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over C of weight * |I|, or the signed I."""
    effects: Tensor = launch_node_effects(delta, grad, weights)
    return effects
