"""The definition of every op, in plain PyTorch: readable, vectorised, float64-capable.

Notation (ALGORITHMS: arXiv 2403.00745, restated in docs/algorithms.md). For one query row i: logits s_ij,
p = softmax(s), z_i = sum_j p_ij v_j, g_i = dm/dz_i, r_ij = g_i . v_j, D_i = g_i . z_i. Everything is computed
in float32 for narrow and float32 inputs, in float64 for float64 inputs; gradients are cast to the dtype of
grad_z at the end, effects stay wide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AttentionStats(NamedTuple):
    """Per query row, what the backward pass and the stable key fix need, in the accumulation dtype.

    z: attention output, (batch, heads, queries, v_dim), before rounding to the input dtype;
    logsumexp: over admissible keys and the sink, (batch, heads, queries), -inf where there are none;
    top_key: the key with the largest logit, int64, -1 where no key is admissible;
    loo_logsumexp: logsumexp over everything but top_key (other keys, sink), -inf where nothing else is;
    loo_z: mean of v over everything but top_key (a sink has value 0), 0 where nothing else is.
    The last three, which only the key fix needs, are None where they were not asked for.
    """

    z: Tensor
    logsumexp: Tensor
    top_key: Tensor | None
    loo_logsumexp: Tensor | None
    loo_z: Tensor | None

    def rows(self, count: int) -> AttentionStats:
        """Those of the first rows of the batch."""
        z, logsumexp, *rest = self
        return AttentionStats(
            z[:count], logsumexp[:count], *(None if x is None else x[:count] for x in rest)
        )

    def leave_one_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """top_key, loo_logsumexp and loo_z, which must be there."""
        assert self.top_key is not None
        assert self.loo_logsumexp is not None and self.loo_z is not None
        return self.top_key, self.loo_logsumexp, self.loo_z


class AttentionEffects(NamedTuple):
    """Gradients (C, batch, heads, positions, dim) and signed effects (C, batch, positions, heads)."""

    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    effect_q: Tensor
    effect_k: Tensor


class Scoring(NamedTuple):
    """How a query and a key become a logit; the fields of every attention op, checked."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    key_mask: Tensor | None


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))


def grouped(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, ...) -> (batch, heads, ...): each key/value head serves a run of query heads."""
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x


def ungrouped(x: Tensor, kv_heads: int, dim: int) -> Tensor:
    """Sum over the query heads of each key/value head along dim."""
    shape = (*x.shape[:dim], kv_heads, x.shape[dim] // kv_heads, *x.shape[dim + 1 :])
    return x.reshape(shape).sum(dim + 1)


def admissible(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """Which keys each query may attend to, bool, broadcastable to (batch, heads, queries, keys).

    The queries are the last ones: query i stands at position i + keys - queries.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    distance = (torch.arange(queries, device=q.device) + keys - queries)[:, None] - torch.arange(
        keys, device=q.device
    )
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if scoring.causal:
        allowed &= distance >= 0
    if scoring.window is not None:
        allowed &= distance < scoring.window
    if scoring.key_mask is not None:
        return allowed & scoring.key_mask[:, None, None, :]
    return allowed[None, None]


def score_derivative(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | float]:
    """Unmasked logits (batch, heads, queries, keys) and their derivative by the raw product q . k."""
    raw = scoring.scale * (wide(q) @ wide(grouped(k, q.shape[1])).transpose(-1, -2))
    if scoring.softcap is None:
        return raw, scoring.scale
    squashed = torch.tanh(raw / scoring.softcap)
    return scoring.softcap * squashed, scoring.scale * (1 - squashed.square())


def logits(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """Masked logits, -inf where a key is not admissible."""
    return score_derivative(q, k, scoring)[0].masked_fill(~admissible(q, k, scoring), -torch.inf)


def sink_logits(q: Tensor, scoring: Scoring) -> Tensor:
    """The sink's logit of every row, (batch, heads, queries, 1); -inf without sinks."""
    batch, heads, queries, _ = q.shape
    dtype = accumulation_dtype(q)
    if scoring.sinks is None:
        return torch.full((batch, heads, queries, 1), -torch.inf, dtype=dtype, device=q.device)
    return scoring.sinks.to(dtype)[None, :, None, None].expand(batch, heads, queries, 1)


def softmax_and_logsumexp(scores: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Weights on the keys (a row with nothing to attend to gets zeros) and the rows' logsumexp."""
    everything = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(everything, -1)
    finite = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    return torch.exp(scores - finite[..., None]), lse


def attention(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, statistics: bool = True
) -> tuple[Tensor, AttentionStats]:
    """z = softmax(scores) v, and the row statistics, those of the leave-one-out rule if they are asked for."""
    values = wide(grouped(v, q.shape[1]))
    scores, sink = logits(q, k, scoring), sink_logits(q, scoring)
    probs, lse = softmax_and_logsumexp(scores, sink)
    z = probs @ values
    if not statistics:
        return z.to(q.dtype), AttentionStats(z, lse, None, None, None)
    if scores.shape[-1] == 0:
        top = torch.full(lse.shape, -1, dtype=torch.int64, device=q.device)
        return z.to(q.dtype), AttentionStats(z, lse, top, sink[..., 0].clone(), torch.zeros_like(z))
    best, top = scores.max(-1)
    others = scores.scatter(-1, top[..., None], -torch.inf)
    loo_probs, loo_lse = softmax_and_logsumexp(others, sink)
    top = torch.where(torch.isneginf(best), -1, top)
    return z.to(q.dtype), AttentionStats(z, lse, top, loo_lse, loo_probs @ values)


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, stats: AttentionStats, grad_z: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of sum(z * grad_z) for every cotangent.

    dV = P^T g,  dP = g v^T,  dS = P (dP - D) ds/d(q.k),  dQ = dS k,  dK = dS^T q.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    g = wide(grad_z)
    scores, slope = score_derivative(q, k, scoring)
    scores = scores.masked_fill(~admissible(q, k, scoring), -torch.inf)
    probs = softmax_and_logsumexp(scores, sink_logits(q, scoring))[0]
    dp = g @ wide(grouped(v, heads)).transpose(-1, -2)
    d = (g * stats.z).sum(-1, keepdim=True)
    ds = probs * (dp - d) * slope
    grad_q = ds @ wide(grouped(k, heads))
    grad_k = ungrouped(ds.transpose(-1, -2) @ wide(q), kv_heads, 2)
    grad_v = ungrouped(probs.transpose(-1, -2) @ g, kv_heads, 2)
    return grad_q.to(grad_z.dtype), grad_k.to(grad_z.dtype), grad_v.to(grad_z.dtype)


def query_patch_effects(
    q: Tensor, k: Tensor, v: Tensor, q_corrupted: Tensor, grad_z: Tensor, scoring: Scoring
) -> Tensor:
    """I_Q(i) = sum_j (p'_ij - p_ij) r_ij = g_i . (z'_i - z_i), signed, (C, batch, queries, heads)."""
    values = wide(grouped(v, q.shape[1]))
    sink = sink_logits(q, scoring)
    probs = softmax_and_logsumexp(logits(q, k, scoring), sink)[0]
    patched = softmax_and_logsumexp(logits(q_corrupted, k, scoring), sink)[0]
    return (wide(grad_z) * ((patched - probs) @ values)).sum(-1).transpose(-1, -2)


def sigmoid_difference(x: Tensor, change: Tensor) -> Tensor:
    """sigmoid(x + change) - sigmoid(x) without cancellation.

    = sigmoid(x) sigmoid(-y) expm1(change) = sigmoid(y) sigmoid(-x) (-expm1(-change)), y = x + change:
    the first form for a fall, the second for a rise, so that no factor overflows.
    """
    y = x + change
    rise = torch.sigmoid(y) * torch.sigmoid(-x) * -torch.expm1(-change.clamp(min=0))
    fall = torch.sigmoid(x) * torch.sigmoid(-y) * torch.expm1(change.clamp(max=0))
    return torch.where(change > 0, rise, fall)


def key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    grad_z: Tensor,
    stats: AttentionStats,
    scoring: Scoring,
) -> Tensor:
    """I_K(j) = sum over the rows i that see key j of (a' - a) (r_ij - mean of r over the row's other keys).

    a = p_ij, a' = its value when key j alone is replaced. For a key that is not its row's largest, 1 - a >= 1/2
    and (a' - a)/(1 - a) (r_ij - D_i) is exact enough; for the largest one a comes from the leave-one-out
    statistics, a = sigmoid(s - loo_logsumexp), and the mean over the other keys is g_i . loo_z_i.
    Signed, (C, batch, keys, kv_heads); the query heads of a group are summed.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    g = wide(grad_z)
    if k.shape[-2] == 0:
        return g.new_zeros((g.shape[0], q.shape[0], 0, kv_heads))
    allowed = admissible(q, k, scoring)
    s = score_derivative(q, k, scoring)[0]
    change = (score_derivative(q, k_corrupted, scoring)[0] - s).masked_fill(~allowed, 0)
    lse = torch.where(torch.isneginf(stats.logsumexp), 0, stats.logsumexp)[..., None]
    a = torch.exp(s.masked_fill(~allowed, -torch.inf) - lse)

    # every key as if it were not the largest: weight (a' - a)/(1 - a), r against the row's mean
    others = torch.where(allowed, s - lse - torch.log1p(-a.clamp(max=0.75)), 0)
    weight = sigmoid_difference(others, change) / (1 - a.clamp(max=0.75))
    top_key, loo_logsumexp, loo_z = stats.leave_one_out()
    is_top = torch.zeros_like(a, dtype=torch.bool)
    is_top.scatter_(-1, top_key.clamp(min=0)[..., None], (top_key >= 0)[..., None])
    from_largest = torch.where(is_top, s - loo_logsumexp[..., None], 0)
    weight = torch.where(is_top, sigmoid_difference(from_largest, change), weight)
    weight = weight.masked_fill(~allowed, 0)

    r = g @ wide(grouped(v, heads)).transpose(-1, -2)
    mean = (g * stats.z).sum(-1, keepdim=True)
    loo_mean = (g * loo_z).sum(-1, keepdim=True)
    effect = (weight * (r - torch.where(is_top, loo_mean, mean))).sum(-2)
    return ungrouped(effect, kv_heads, 2).transpose(-1, -2)


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
    return AttentionEffects(
        *attention_vjp(q, k, v, stats, grad_z, scoring),
        query_patch_effects(q, k, v, q_corrupted, grad_z, scoring),
        key_patch_effects(q, k, v, k_corrupted, grad_z, stats, scoring),
    )


def node_effects(delta: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
    """I = sum over the last axis of delta * grad, per cotangent; with weights, sum over C of w |I|."""
    effect = (wide(delta) * wide(grad)).sum(-1)
    if weights is None:
        return effect
    score: Tensor = torch.tensordot(weights.to(effect.dtype), effect.abs(), dims=1)
    return score


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
    """I = sum over dim of (corrupted - clean) * grad, or grad itself; adds sum over pairs and C of w |I| to score, the sum
    over pairs of the first cotangent's I to effect, and each pair's share of one of them to its row of per_pair."""
    found = wide(grad).sum(-1)
    if clean is not None and corrupted is not None:
        found = ((wide(corrupted) - wide(clean)) * wide(grad)).sum(-1)
    if live is not None:
        found = torch.where(live[..., None], found, 0)
    if first is not None:  # gathered: scattering has no fixed order on CUDA
        source = torch.arange(score.shape[0], device=score.device) - first[:, None]
        here = ((source >= 0) & (source < found.shape[2]))[..., None]
        index = source.clamp(0, found.shape[2] - 1)[None, :, :, None]
        found = torch.where(here, found.take_along_dim(index, 2), 0)
    magnitude = torch.tensordot(weights, found.abs(), dims=1)
    score += magnitude.sum(0)
    if effect is not None:
        effect += found[:1].sum((0, 1))
    if per_pair is not None and rows is not None:
        per_pair[rows] += found[:1].sum(0) if pair_signed else magnitude


class Norm(NamedTuple):
    """How a row is normalised: centred, rounded to x's dtype before the weight, with which number added to the weight."""

    eps: float
    centred: bool = False
    rounded: bool = False
    offset: float = 0.0


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Norm
) -> tuple[Tensor, Tensor | None, Tensor]:
    """n (weight + offset) + bias with n = (x - mean) rstd; and mean (None unless centred) and rstd, wide."""
    wide_x = wide(x)
    mean = wide_x.mean(-1) if how.centred else None
    centred = wide_x if mean is None else wide_x - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + how.eps)
    n = centred * rstd[..., None]
    if how.rounded:
        n = wide(n.to(x.dtype))
    y = n * (wide(weight) + how.offset)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype), mean, rstd


def norm_vjp(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    grad: Tensor,
    how: Norm,
    before: Tensor | None,
) -> Tensor:
    """rstd (h - mean(h) [centred] - n mean(h n)) + before, h = grad (weight + offset), per cotangent."""
    n = wide(x) if mean is None else wide(x) - mean[..., None]
    n = n * rstd[..., None]
    h = wide(grad) * (wide(weight) + how.offset)
    found = h - n * (h * n).mean(-1, keepdim=True)
    if mean is not None:
        found = found - h.mean(-1, keepdim=True)
    found = found * rstd[..., None]
    return (found if before is None else found + wide(before)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    """x cos + rotate_half(x) sin over the first elements, the rest unchanged; narrow products are rounded one by one, as
    the models' own code does, but not the adjoint's."""
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    part, rest = x[..., :rotated], x[..., rotated:]

    def swapped(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return torch.cat([second, -first] if adjoint else [-second, first], -1)

    if adjoint:
        part = wide(part) * wide(cos) + swapped(wide(part) * wide(sin))
    else:
        part = part * cos + swapped(part) * sin
    return torch.cat([part.to(x.dtype), rest], -1)


def gate_vjp(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """grad up activation'(gate) and grad activation(gate), per cotangent."""
    x = wide(gate)
    if activation == "silu":
        s = torch.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    else:
        factor = math.sqrt(2 / math.pi)
        t = torch.tanh(factor * (x + 0.044715 * x**3))
        value = x * (1 + t) / 2
        slope = (1 + t) / 2 + x * (1 - t * t) / 2 * factor * (1 + 3 * 0.044715 * x * x)
    return (wide(grad) * (slope * wide(up))).to(gate.dtype), (wide(grad) * value).to(gate.dtype)
