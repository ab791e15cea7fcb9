"""Backend "triton": the ops by the kernels of atp_fast.kernels, on CUDA or in Triton's interpreter.

Functions and arguments are those of reference.py; inputs arrive checked by atp_fast.ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

_ROW = 16


def _aligned(x: Tensor) -> Tensor:
    """x with rows that start at multiples of 16 elements, and zeros behind columns that are no multiple: a copy if need be.

    Rows that a kernel can only read element by element are slow, and on Hopper Triton 3.6 and 3.7 made wrong code of
    narrow ones where keys and values differ in width.
    """
    missing = -x.shape[-1] % _ROW
    if missing:
        return F.pad(x, (0, missing))
    if x.stride(-1) != 1 or any(step % _ROW for step in x.stride()[:-1]) or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _outputs(stats: AttentionStats) -> Outputs:
    """The statistics as the kernels read them: float32 (top_key int64), contiguous, vectors aligned."""
    wide = (
        x.to(torch.float32) for x in (stats.z, stats.logsumexp, stats.loo_logsumexp, stats.loo_z)
    )
    z, logsumexp, loo_logsumexp, loo_z = wide
    return Outputs(
        _aligned(z).contiguous(),
        logsumexp.contiguous(),
        stats.top_key.to(torch.int64).contiguous(),
        loo_logsumexp.contiguous(),
        _aligned(loo_z).contiguous(),
    )


def _columns(x: Tensor, like: Tensor) -> Tensor:
    """The columns of x that are not padding."""
    return x[..., : like.shape[-1]]


def attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, AttentionStats]:
    """z in q's dtype and the row statistics."""
    out = launch_attention(_aligned(q), _aligned(k), _aligned(v), KernelScoring(*scoring))
    stats = AttentionStats(*out)
    stats = stats._replace(z=_columns(out.z, v), loo_z=_columns(out.loo_z, v))
    return stats.z.to(q.dtype), stats


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, stats: AttentionStats, grad_z: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of every cotangent."""
    rows = _outputs(stats)
    grad_q, grad_k, grad_v = launch_attention_vjp(
        *(_aligned(x) for x in (q, k, v)),
        rows.z,
        rows.logsumexp,
        _aligned(grad_z),
        KernelScoring(*scoring),
    )
    return _columns(grad_q, q), _columns(grad_k, k), _columns(grad_v, v)


def query_patch_effects(
    q: Tensor, k: Tensor, v: Tensor, q_corrupted: Tensor, grad_z: Tensor, scoring: Scoring
) -> Tensor:
    """Signed, (C, batch, queries, heads)."""
    effects: Tensor = launch_query_patch_effects(
        *(_aligned(x) for x in (q, k, v, q_corrupted, grad_z)), KernelScoring(*scoring)
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
        *(_aligned(x) for x in (q, k, v, k_corrupted, grad_z)),
        _outputs(stats),
        KernelScoring(*scoring),
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
    found = AttentionEffects(
        *launch_attention_vjp_effects(
            *(_aligned(x) for x in (q, k, v, q_corrupted, k_corrupted)),
            _outputs(stats),
            _aligned(grad_z),
            KernelScoring(*scoring),
        )
    )
    return found._replace(
        grad_q=_columns(found.grad_q, q),
        grad_k=_columns(found.grad_k, k),
        grad_v=_columns(found.grad_v, v),
    )


def node_effects(delta: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over C of weight * |I|, or the signed I."""
    effects: Tensor = launch_node_effects(delta, grad, weights)
    return effects
