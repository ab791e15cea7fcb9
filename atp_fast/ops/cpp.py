"""The ops on the CPU: allocates, passes addresses and strides to atp_fast._C, keeps tensors alive meanwhile.

Results carry no autograd graph; the ops are called on plain tensors (see reference.py for what they compute).
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_fast import _C
from atp_fast.ops.reference import (
    AttentionEffects,
    AttentionStats,
    Norm,
    Scoring,
    accumulation_dtype,
)

_Passed = tuple[int, int, tuple[int, ...]]
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _passed(x: Tensor) -> _Passed:
    """(address, dtype, strides) of a tensor, the only way by which one reaches the extension."""
    if x.device.type != "cpu" or x.layout != torch.strided:
        raise ValueError(f"backend 'cpp' needs strided CPU tensors, got {x.layout} on {x.device}")
    if x.is_neg():
        raise ValueError("backend 'cpp' needs resolved tensors, got one with the negative bit set")
    return x.data_ptr(), _DTYPES[x.dtype], x.stride()


_NOTHING: _Passed = (0, 0, ())


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _addresses(stats: AttentionStats) -> tuple[int, int, int, int, int]:
    z, logsumexp, top_key, loo_logsumexp, loo_z = (_address(x) for x in stats)
    return z, logsumexp, top_key, loo_logsumexp, loo_z


class _Options:
    """A Scoring as the extension takes it; holds the tensors whose addresses are in `passed`."""

    def __init__(self, scoring: Scoring, dtype: torch.dtype) -> None:
        self.sinks = None if scoring.sinks is None else scoring.sinks.to(dtype).contiguous()
        self.key_mask = None if scoring.key_mask is None else scoring.key_mask.contiguous()
        self.passed = (
            scoring.scale,
            scoring.causal,
            scoring.window or 0,
            scoring.softcap or 0.0,
            _address(self.sinks),
            _address(self.key_mask),
        )


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int, int]:
    batch, heads, queries, head_dim = q.shape
    return batch, heads, k.shape[1], queries, k.shape[2], head_dim, v.shape[3]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., depth) @ weight (depth, columns) + bias (columns,), all float32 or all float64.

    One of weight's strides must be 1. No element's bits depend on the other rows or on the number of threads.
    """
    depth, columns = weight.shape
    rows = x.reshape(-1, depth) if x.numel() else x.new_empty((x.shape[:-1].numel(), depth))
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype)
    bias = None if bias is None else bias.contiguous()
    _C.linear(
        (len(rows), columns, depth),
        _passed(rows),
        _passed(weight),
        _address(bias),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, statistics: bool = True
) -> tuple[Tensor, AttentionStats]:
    """z = softmax(scores) v, and the row statistics, those of the leave-one-out rule if they are asked for."""
    dtype = accumulation_dtype(q)
    rows, options = q.shape[:3], _Options(scoring, dtype)
    wide_z = torch.empty((*rows, v.shape[3]), dtype=dtype)
    z = wide_z if q.dtype == dtype else torch.empty(wide_z.shape, dtype=q.dtype)
    stats = AttentionStats(
        wide_z,
        torch.empty(rows, dtype=dtype),
        torch.empty(rows, dtype=torch.int64) if statistics else None,
        torch.empty(rows, dtype=dtype) if statistics else None,
        torch.empty(wide_z.shape, dtype=dtype) if statistics else None,
    )
    _C.attention(
        _sizes(q, k, v),
        options.passed,
        _passed(q),
        _passed(k),
        _passed(v),
        _NOTHING if z is wide_z else _passed(z),
        _addresses(stats),
        torch.get_num_threads(),
    )
    return z, stats


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor | None,
    stats: AttentionStats,
    grad_z: Tensor,
    scoring: Scoring,
    *,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v and the keys' effects; those not asked for are empty tensors."""
    dtype = accumulation_dtype(q)
    options, cotangents = _Options(scoring, dtype), grad_z.shape[0]
    stats = AttentionStats(
        stats.z.to(dtype).contiguous(),
        stats.logsumexp.to(dtype).contiguous(),
        _contiguous(stats.top_key, torch.int64),
        _contiguous(stats.loo_logsumexp, dtype),
        _contiguous(stats.loo_z, dtype),
    )
    grad_q, grad_k, grad_v = (
        torch.empty((cotangents, *x.shape) if gradients else (0,), dtype=q.dtype) for x in (q, k, v)
    )
    effect_shape = (cotangents, q.shape[0], k.shape[2], k.shape[1])
    effect = torch.empty(effect_shape if k_corrupted is not None else (0,), dtype=dtype)
    _C.attention_backward(
        _sizes(q, k, v),
        cotangents,
        options.passed,
        _passed(q),
        _passed(k),
        _passed(v),
        _NOTHING if k_corrupted is None else _passed(k_corrupted),
        _passed(grad_z),
        _addresses(stats),
        _passed(grad_q) if gradients else _NOTHING,
        _passed(grad_k) if gradients else _NOTHING,
        _passed(grad_v) if gradients else _NOTHING,
        0 if k_corrupted is None else effect.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_q, grad_k, grad_v, effect


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, stats: AttentionStats, grad_z: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of sum(z * grad_z) for every cotangent."""
    return _backward(q, k, v, None, stats, grad_z, scoring, gradients=True)[:3]


def _patched_query_effects(grad_z: Tensor, z_corrupted: Tensor, z: Tensor) -> Tensor:
    """g . (z' - z), (C, batch, queries, heads); exactly 0 where the query is unchanged."""
    return node_effects(z_corrupted - z, grad_z, None).transpose(-1, -2)


def query_patch_effects(
    q: Tensor, k: Tensor, v: Tensor, q_corrupted: Tensor, grad_z: Tensor, scoring: Scoring
) -> Tensor:
    """I_Q(i) = g_i . (z'_i - z_i), signed, (C, batch, queries, heads); z' serves every cotangent."""
    z, z_corrupted = (attention(x, k, v, scoring, False)[1].z for x in (q, q_corrupted))
    return _patched_query_effects(grad_z, z_corrupted, z)


def key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    grad_z: Tensor,
    stats: AttentionStats,
    scoring: Scoring,
) -> Tensor:
    """I_K(j) = sum_i (a' - a) (r_ij - mean of r over the row's other keys), (C, batch, keys, kv_heads)."""
    return _backward(q, k, v, k_corrupted, stats, grad_z, scoring, gradients=False)[3]


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
    """attention_vjp, query_patch_effects and key_patch_effects of the same inputs together."""
    z_corrupted = attention(q_corrupted, k, v, scoring, False)[1].z
    effect_q = _patched_query_effects(grad_z, z_corrupted, stats.z)
    grad_q, grad_k, grad_v, effect_k = _backward(
        q, k, v, k_corrupted, stats, grad_z, scoring, gradients=True
    )
    return AttentionEffects(grad_q, grad_k, grad_v, effect_q, effect_k)


def node_effects(delta: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
    """I = sum over the last axis of delta * grad, per cotangent; with weights, sum over C of w |I|.

    grad may have another dtype than delta as long as both accumulate in the same one.
    """
    dtype = accumulation_dtype(delta)
    if weights is not None:
        weights = weights.to(dtype).contiguous()
    shape = grad.shape[:-1] if weights is None else delta.shape[:-1]
    out = torch.empty(shape, dtype=dtype)
    _C.node_effects(
        grad.shape,
        _passed(delta),
        _passed(grad),
        _address(weights),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


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
    live = None if live is None else live.contiguous()
    _C.add_effects(
        (*grad.shape, len(score)),
        _passed(grad),
        _NOTHING if clean is None else _passed(clean),
        _NOTHING if corrupted is None else _passed(corrupted),
        weights.data_ptr(),
        _address(live),
        _address(first),
        _passed(score),
        _address(effect),
        _NOTHING if per_pair is None else _passed(per_pair),
        _address(rows),
        pair_signed,
        torch.get_num_threads(),
    )


def _row_sizes(x: Tensor, cotangents: int) -> tuple[int, int, int, int, int]:
    a, b, c = (1,) * (4 - x.ndim) + tuple(x.shape[:-1])
    return cotangents, a, b, c, x.shape[-1]


def _row_passed(x: Tensor, cotangents: bool) -> _Passed:
    """A tensor as five axes: cotangents, three leading ones, the width."""
    address, dtype, steps = _passed(x)
    ahead, steps = (steps[:1], steps[1:]) if cotangents else ((0,), steps)
    return address, dtype, ahead + (0,) * (4 - len(steps)) + steps


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Norm
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalised rows, and the means (None unless centred) and reciprocal deviations."""
    dtype = accumulation_dtype(x)
    y = torch.empty_like(x) if x.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype)
    mean = torch.empty(x.shape[:-1], dtype=dtype) if how.centred else None
    rstd = torch.empty(x.shape[:-1], dtype=dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    addresses = (weight.data_ptr(), _address(bias), _address(mean), rstd.data_ptr(), 0)
    _C.norm(
        _row_sizes(x, 1),
        _row_passed(x, False),
        _NOTHING,
        _row_passed(y, False),
        addresses,
        how.eps,
        how.offset,
        how.rounded,
        torch.get_num_threads(),
    )
    return y, mean, rstd


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
    weight = weight.to(accumulation_dtype(x))
    out = torch.empty((len(grad), *x.shape), dtype=x.dtype)
    before = None if before is None else before.contiguous()
    addresses = (weight.data_ptr(), 0, _address(mean), rstd.data_ptr(), _address(before))
    _C.norm(
        _row_sizes(x, len(grad)),
        _row_passed(x, False),
        _row_passed(grad, True),
        _row_passed(out, True),
        addresses,
        how.eps,
        how.offset,
        how.rounded,
        torch.get_num_threads(),
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    """Queries or keys rotated by position, or the adjoint; heads side by side in memory."""
    outer, batch, heads, positions, dim = x.shape
    out = torch.empty((outer, batch, positions, heads, dim), dtype=x.dtype).transpose(2, 3)
    _C.rotate(
        (outer, batch, heads, positions, dim, cos.shape[-1]),
        _passed(x),
        _passed(cos),
        _passed(sin),
        adjoint,
        _passed(out),
        torch.get_num_threads(),
    )
    return out


def gate_vjp(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients by gate and by up of every cotangent."""
    shape = (len(grad), *gate.shape)
    by_gate, by_up = (torch.empty(shape, dtype=gate.dtype) for _ in range(2))
    _C.gate_vjp(
        _row_sizes(gate, len(grad)),
        _row_passed(gate, False),
        _row_passed(up, False),
        _row_passed(grad, True),
        activation == "gelu_tanh",
        _row_passed(by_gate, True),
        _row_passed(by_up, True),
        torch.get_num_threads(),
    )
    return by_gate, by_up
