"""Backend "triton": the ops by the kernels of atp_fast.kernels, on CUDA or in Triton's interpreter.

Functions and arguments are those of reference.py; inputs arrive checked by atp_fast.ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atp_fast.kernels.add_effects import launch_add_effects
from atp_fast.kernels.attention import Outputs, launch_attention
from atp_fast.kernels.attention_vjp import launch_attention_vjp
from atp_fast.kernels.attention_vjp_effects import launch_attention_vjp_effects
from atp_fast.kernels.attention_z import launch_attention_z
from atp_fast.kernels.gate import launch_gate_vjp
from atp_fast.kernels.key_patch_effects import launch_key_patch_effects
from atp_fast.kernels.launch import INTERPRETED as INTERPRETED
from atp_fast.kernels.launch import Scoring as KernelScoring
from atp_fast.kernels.launch import check_dims
from atp_fast.kernels.node_effects import launch_node_effects
from atp_fast.kernels.norm import launch_norm, launch_norm_vjp
from atp_fast.kernels.query_patch_effects import launch_query_patch_effects
from atp_fast.kernels.rotate import launch_rotate
from atp_fast.ops.reference import AttentionEffects, AttentionStats, Norm, Scoring


def _width(q: Tensor, v: Tensor) -> int:
    """The columns that the kernels are given of q, k and v: one number for all, a multiple of 16."""
    check_dims(q, v)
    widest = max(q.shape[-1], v.shape[-1])
    return widest + -widest % 16


def _aligned(x: Tensor, width: int) -> Tensor:
    """x with `width` columns, zeros behind its own, and rows that start at multiples of 16 elements: a copy if need be.

    Rows that a kernel can only read element by element are slow. And where values were narrower than keys, one case of
    the test matrix (40 and 8 columns) went wrong on Hopper, compiled by Triton 3.6 and 3.7 alike; equal widths never did.
    """
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    if x.stride(-1) != 1 or any(step % 16 for step in x.stride()[:-1]) or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _outputs(stats: AttentionStats, width: int) -> Outputs:
    """The statistics as the kernels read them: float32 (top_key int64), contiguous, vectors of `width` columns."""
    top_key, loo_logsumexp, loo_z = stats.leave_one_out()
    return Outputs(
        *_mean_and_norm(stats, width),
        top_key.to(torch.int64).contiguous(),
        loo_logsumexp.to(torch.float32).contiguous(),
        _aligned(loo_z.to(torch.float32), width).contiguous(),
    )


def _mean_and_norm(stats: AttentionStats, width: int) -> tuple[Tensor, Tensor]:
    """z and logsumexp, all that the gradients need of the statistics."""
    z, logsumexp = (x.to(torch.float32) for x in stats[:2])
    return _aligned(z, width).contiguous(), logsumexp.contiguous()


def _columns(x: Tensor, like: Tensor) -> Tensor:
    """The columns of x that are not padding."""
    return x[..., : like.shape[-1]]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, statistics: bool = True
) -> tuple[Tensor, AttentionStats]:
    """z in q's dtype, heads side by side in memory as the layer's next product reads them, and the row statistics, those of
    the leave-one-out rule if they are asked for."""
    width = _width(q, v)
    aligned = tuple(_aligned(x, width) for x in (q, k, v))
    batch, heads, queries = q.shape[:3]
    z = torch.empty((batch, queries, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)
    if statistics:
        out = launch_attention(*aligned, KernelScoring(*scoring), out=z)
        stats = AttentionStats(*out)._replace(z=_columns(out.z, v), loo_z=_columns(out.loo_z, v))
    else:
        wide_z, logsumexp = launch_attention_z(*aligned, KernelScoring(*scoring), out=z)
        stats = AttentionStats(_columns(wide_z, v), logsumexp, None, None, None)
    return _columns(z, v), stats


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, stats: AttentionStats, grad_z: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of every cotangent."""
    width = _width(q, v)
    grad_q, grad_k, grad_v = launch_attention_vjp(
        *(_aligned(x, width) for x in (q, k, v)),
        *_mean_and_norm(stats, width),
        _aligned(grad_z, width),
        KernelScoring(*scoring),
    )
    return _columns(grad_q, q), _columns(grad_k, k), _columns(grad_v, v)


def query_patch_effects(
    q: Tensor, k: Tensor, v: Tensor, q_corrupted: Tensor, grad_z: Tensor, scoring: Scoring
) -> Tensor:
    """Signed, (C, batch, queries, heads)."""
    width = _width(q, v)
    effects: Tensor = launch_query_patch_effects(
        *(_aligned(x, width) for x in (q, k, v, q_corrupted, grad_z)), KernelScoring(*scoring)
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
    width = _width(q, v)
    effects: Tensor = launch_key_patch_effects(
        *(_aligned(x, width) for x in (q, k, v, k_corrupted, grad_z)),
        _outputs(stats, width),
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
    width = _width(q, v)
    found = AttentionEffects(
        *launch_attention_vjp_effects(
            *(_aligned(x, width) for x in (q, k, v, q_corrupted, k_corrupted)),
            _outputs(stats, width),
            _aligned(grad_z, width),
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


def add_effects(
    grad: Tensor,
    weights: Tensor,
    score: Tensor,
    effect: Tensor | None,
    clean: Tensor | None,
    corrupted: Tensor | None,
    live: Tensor | None,
    first: Tensor | None,
    per_pair: Tensor | None,
    rows: Tensor | None,
    pair_signed: bool,
) -> None:
    """Adds first-order effects to the scores of all pairs, in place."""
    launch_add_effects(
        grad,
        weights,
        score,
        effect,
        clean,
        corrupted,
        live,
        first,
        per_pair,
        rows,
        pair_signed,
    )


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Norm
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalised rows, and the means (None unless centred) and reciprocal deviations."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = x.shape[:-1]
    mean = torch.empty(rows, dtype=torch.float32, device=x.device) if how.centred else None
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x), mean, rstd
    launch_norm(x, weight, bias, how.eps, how.centred, how.rounded, how.offset, out)
    return out


def norm_vjp(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    grad: Tensor,
    how: Norm,
    before: Tensor | None,
) -> Tensor:
    """The adjoint of `norm` for every cotangent, added to `before`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    out = torch.empty((len(grad), *x.shape), dtype=x.dtype, device=x.device)
    before = None if before is None else before.contiguous()
    launch_norm_vjp(x, weight, mean, rstd, grad, how.offset, before, out)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    """Queries or keys rotated by position, or the adjoint; heads side by side in memory."""
    outer, batch, heads, positions, dim = x.shape
    shape = (outer, batch, positions, heads, dim)
    out = torch.empty(shape, dtype=x.dtype, device=x.device).transpose(2, 3)
    launch_rotate(x, cos, sin, adjoint, out)
    return out


def gate_vjp(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients by gate and by up of every cotangent."""
    rows = tuple(
        (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1]) for x in (gate, up)
    )
    grad = grad.contiguous()
    out = torch.empty_like(grad), torch.empty_like(grad)
    launch_gate_vjp(*rows, grad, activation == "gelu_tanh", out)
    return out
