"""In: tensors. Out: tensors. The kernel API: one function per op, each checked here and carried out by one backend.

May import: the compiled kernels, nothing else of atp_fast.

Tensors are (batch, heads, positions, head_dim); gradients carry a leading cotangent axis C. The queries are
the last of the keys' positions (query i stands at i + keys - queries), so a shared prefix needs no queries.
Keyword arguments of every attention op:
  scale     factor on q . k; head_dim ** -0.5 when None
  causal    a query sees no later key
  window    a query sees the last `window` keys only, its own included
  softcap   logits become softcap * tanh(logits / softcap)
  sinks     (heads,): an extra logit per row that no key owns, with value 0
  key_mask  (batch, keys) bool, False on keys that nobody may see
  backend   "auto", "reference", "cpp" or "triton"; an explicit one never falls back
Narrow inputs are accumulated in float32; float64 stays float64. Rows with nothing to attend to give 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atp_fast.ops.backends import availability, backend_for, load
from atp_fast.ops.reference import (
    AttentionEffects,
    AttentionStats,
    Norm,
    Scoring,
    accumulation_dtype,
)

__all__ = [
    "AttentionEffects",
    "AttentionStats",
    "add_effects",
    "attention",
    "attention_vjp",
    "attention_vjp_effects",
    "availability",
    "backend_for",
    "Norm",
    "key_patch_effects",
    "node_effects",
    "norm",
    "norm_vjp",
    "query_patch_effects",
    "rotate",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} as q is, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as q is, got {x.device}")


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_mask: Tensor | None,
) -> Scoring:
    """The scoring of a call whose tensors and options fit together; an error that names what does not."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, positions, head_dim), got shape {tuple(x.shape)}"
            )
    if q.dtype not in _DTYPES:
        raise ValueError(f"q must be float64, float32, bfloat16 or float16, got {q.dtype}")
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of k's, got {heads} and {kv_heads}")
    _check("k", k, (batch, kv_heads, keys, head_dim), q)
    _check("v", v, (batch, kv_heads, keys, v.shape[-1]), q)
    if queries > keys:
        raise ValueError(f"q must not have more positions than k, got {queries} and {keys}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask must be bool, True on real keys, got {key_mask.dtype}")
        if tuple(key_mask.shape) != (batch, keys):
            raise ValueError(
                f"key_mask must have shape {(batch, keys)}, got {tuple(key_mask.shape)}"
            )
    default = max(head_dim, 1) ** -0.5
    return Scoring(
        default if scale is None else float(scale), causal, window, softcap, sinks, key_mask
    )


def _check_cotangents(name: str, grad: Tensor, q: Tensor, v: Tensor) -> None:
    if isinstance(grad, Tensor) and grad.ndim != 5:
        raise ValueError(
            f"{name} must be (cotangents, batch, heads, positions, head_dim), got shape {tuple(grad.shape)}"
        )
    _check(name, grad, (grad.shape[0], *q.shape[:3], v.shape[-1]), q)


def _check_stats(stats: AttentionStats, q: Tensor, v: Tensor, complete: bool = True) -> None:
    """complete: those of the key fix are needed as well."""
    rows, wide = tuple(q.shape[:3]), (*q.shape[:3], v.shape[-1])
    for name, x in zip(AttentionStats._fields, stats, strict=True):
        if x is None:
            if complete:
                raise ValueError(
                    f"stats.{name} must be there, got None: call attention with statistics=True"
                )
            continue
        shape = wide if name in ("z", "loo_z") else rows
        if tuple(x.shape) != shape:
            raise ValueError(f"stats.{name} must have shape {shape}, got {tuple(x.shape)}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    statistics: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, AttentionStats]:
    """Attention output z_i = sum_j softmax(s_i)_j v_j and the row statistics the other ops reuse.

    q: (batch, heads, queries, head_dim); k: (batch, kv_heads, keys, head_dim);
    v: (batch, kv_heads, keys, v_dim). Returns z, (batch, heads, queries, v_dim) in q's dtype, and AttentionStats.
    statistics: False leaves out those that only the key fix needs (they are None): on a GPU one pass over the keys less, with
    weights in q's dtype in the product with v.
    Raises ValueError or TypeError naming the argument that does not fit.
    """
    scoring = _check_attention(q, k, v, scale, causal, window, softcap, sinks, key_mask)
    z, stats = load(backend_for(q, backend)).attention(q, k, v, scoring, statistics)
    return z, stats


def attention_vjp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stats: AttentionStats,
    grad_z: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector-Jacobian products of attention for C cotangents that share the recomputed weights.

    grad_z: (C, batch, heads, queries, v_dim). Returns grad_q, grad_k, grad_v, each (C, *shape of q, k, v).
    """
    scoring = _check_attention(q, k, v, scale, causal, window, softcap, sinks, key_mask)
    _check_cotangents("grad_z", grad_z, q, v)
    _check_stats(stats, q, v, complete=False)
    module = load(backend_for(q, backend))
    grads: tuple[Tensor, Tensor, Tensor] = module.attention_vjp(q, k, v, stats, grad_z, scoring)
    return grads


def query_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_corrupted: Tensor,
    grad_z: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Effect of patching each query alone, its softmax recomputed exactly (AtP* QK fix).

    I_Q(i) = g_i . (z'_i - z_i), z' = attention(q_corrupted, k, v). Signed, (C, batch, queries, heads).
    """
    scoring = _check_attention(q, k, v, scale, causal, window, softcap, sinks, key_mask)
    _check("q_corrupted", q_corrupted, tuple(q.shape), q)
    _check_cotangents("grad_z", grad_z, q, v)
    module = load(backend_for(q, backend))
    effects: Tensor = module.query_patch_effects(q, k, v, q_corrupted, grad_z, scoring)
    return effects


def key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_corrupted: Tensor,
    grad_z: Tensor,
    stats: AttentionStats | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Effect of patching each key alone, every later row's softmax recomputed exactly (AtP* QK fix).

    I_K(j) = sum_i (a' - a)/(1 - a) (r_ij - D_i), in the leave-one-out form where a > 1/2 (see reference.py).
    stats: from `attention` of the same q, k, v; computed when None. Signed, (C, batch, keys, kv_heads); under
    grouped-query attention a key's effect sums over the query heads of its group.
    """
    scoring = _check_attention(q, k, v, scale, causal, window, softcap, sinks, key_mask)
    _check("k_corrupted", k_corrupted, tuple(k.shape), q)
    _check_cotangents("grad_z", grad_z, q, v)
    module = load(backend_for(q, backend))
    if stats is None:
        stats = module.attention(q, k, v, scoring)[1]
    _check_stats(stats, q, v)
    effects: Tensor = module.key_patch_effects(q, k, v, k_corrupted, grad_z, stats, scoring)
    return effects


def attention_vjp_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_corrupted: Tensor,
    k_corrupted: Tensor,
    stats: AttentionStats,
    grad_z: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> AttentionEffects:
    """`attention_vjp`, `query_patch_effects` and `key_patch_effects` in one pass over the tiles.

    This is what the sweep calls once per layer: given dP = g v^T, the exact QK fix costs two more score tiles per
    tile, whatever the number of cotangents.
    """
    scoring = _check_attention(q, k, v, scale, causal, window, softcap, sinks, key_mask)
    _check("q_corrupted", q_corrupted, tuple(q.shape), q)
    _check("k_corrupted", k_corrupted, tuple(k.shape), q)
    _check_cotangents("grad_z", grad_z, q, v)
    _check_stats(stats, q, v)
    module = load(backend_for(q, backend))
    effects: AttentionEffects = module.attention_vjp_effects(
        q, k, v, q_corrupted, k_corrupted, stats, grad_z, scoring
    )
    return effects


def node_effects(
    delta: Tensor, grad: Tensor, *, weights: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """First-order effects I = sum over the last axis of delta * grad, reduced over cotangents.

    delta: corrupted minus clean value, (..., head_dim); grad: (C, ..., head_dim), same dtype;
    weights: (C,) gives sum over C of weight * |I|, shape (...); None gives the signed I, (C, ...).
    Accumulated and returned in float32 (float64 for float64).
    """
    if not isinstance(delta, Tensor) or not isinstance(grad, Tensor):
        raise TypeError("delta and grad must be tensors")
    if delta.dtype not in _DTYPES:
        raise ValueError(f"delta must be float64, float32, bfloat16 or float16, got {delta.dtype}")
    if delta.ndim < 1 or grad.ndim != delta.ndim + 1 or grad.shape[1:] != delta.shape:
        raise ValueError(
            f"grad must be (cotangents, *delta.shape), got {tuple(grad.shape)} for {tuple(delta.shape)}"
        )
    if grad.dtype != delta.dtype or grad.device != delta.device:
        raise ValueError(
            f"grad must be {delta.dtype} on {delta.device} as delta is, got {grad.dtype} on {grad.device}"
        )
    if weights is not None and tuple(weights.shape) != (grad.shape[0],):
        raise ValueError(f"weights must have shape ({grad.shape[0]},), got {tuple(weights.shape)}")
    effects: Tensor = load(backend_for(delta, backend)).node_effects(delta, grad, weights)
    return effects


def add_effects(
    grad: Tensor,
    *,
    weights: Tensor,
    score: Tensor,
    effect: Tensor | None = None,
    clean: Tensor | None = None,
    corrupted: Tensor | None = None,
    live: Tensor | None = None,
    first: Tensor | None = None,
    per_pair: Tensor | None = None,
    rows: Tensor | None = None,
    pair_signed: bool = False,
    backend: str = "auto",
) -> None:
    """Add the effects of a batch of pairs to the scores of all pairs, in place.

    I = sum over dim of (corrupted - clean) * grad. score (columns, width) gets the sum over pairs and cotangents of
    weight * |I|, effect, of the same shape and strides, the sum over pairs of the first cotangent's I, and pair b's row
    rows[b] of per_pair (pairs, columns, width) what b adds to score, or to effect where pair_signed.
    grad: (C, batch, positions, width, dim); clean, corrupted: (batch, positions, width, dim), same dtype, or None where
    grad (dim 1) holds the effects; weights: (C,); live: (batch, positions) bool, where effects count, None for everywhere;
    first: (batch,) int64, the column of each pair's first position (columns outside the scores are left out), None for
    0. weights, score, effect and per_pair are float32 (float64 for float64), their last axis contiguous.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    if not isinstance(grad, Tensor) or not isinstance(score, Tensor):
        raise TypeError("grad and score must be tensors")
    if grad.dtype not in _DTYPES:
        raise ValueError(f"grad must be float64, float32, bfloat16 or float16, got {grad.dtype}")
    if grad.ndim != 5:
        raise ValueError(
            f"grad must be (cotangents, batch, positions, width, dim), got shape {tuple(grad.shape)}"
        )
    cotangents, batch, positions, width, dim = grad.shape
    if (clean is None) != (corrupted is None):
        raise ValueError("clean and corrupted must be given together")
    if clean is None and dim != 1:
        raise ValueError(f"grad must have dim 1 where it holds the effects, got {dim}")
    columns = score.shape[0] if score.ndim else 0
    if first is None and columns != positions:
        raise ValueError(
            f"score must have a column for each of {positions} positions, got {columns}"
        )
    if pair_signed and per_pair is not None and effect is None:
        raise ValueError("effect must be given where per_pair is signed")
    if (per_pair is None) != (rows is None):
        raise ValueError("per_pair and rows must be given together")
    sums = accumulation_dtype(grad)
    pairs, device = 0 if per_pair is None else per_pair.shape[0], grad.device
    for name, x, shape, dtype in (
        ("clean", clean, grad.shape[1:], grad.dtype),
        ("corrupted", corrupted, grad.shape[1:], grad.dtype),
        ("weights", weights, (cotangents,), sums),
        ("score", score, (columns, width), sums),
        ("effect", effect, (columns, width), sums),
        ("per_pair", per_pair, (pairs, columns, width), sums),
        ("live", live, (batch, positions), torch.bool),
        ("first", first, (batch,), torch.int64),
        ("rows", rows, (batch,), torch.int64),
    ):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{name} must be {dtype} on {device}, got {x.dtype} on {x.device}")
    for name, x in (("score", score), ("effect", effect), ("per_pair", per_pair)):
        if x is not None and x.numel() and x.stride(-1) != 1:
            raise ValueError(f"{name} must have a contiguous last axis")
    if effect is not None and effect.stride() != score.stride():
        raise ValueError(
            f"effect must have score's strides {score.stride()}, got {effect.stride()}"
        )
    load(backend_for(grad, backend)).add_effects(
        grad,
        weights.contiguous(),
        score,
        effect,
        clean,
        corrupted,
        live,
        None if first is None else first.contiguous(),
        per_pair,
        None if rows is None else rows.contiguous(),
        pair_signed,
    )


def _check_like(name: str, x: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> None:
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as x is, got {x.dtype} on {x.device}"
        )


def _check_rows(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"x must have two to four axes, got shape {tuple(x.shape)}")


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    how: Norm,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467): y = (x - mean) rstd (weight + offset) + bias.

    x: (..., width), two to four axes; weight, bias: (width,), the same dtype; how: eps, whether rows are centred (mean is
    0 where not), whether (x - mean) rstd is rounded to x's dtype, and the offset. rstd = 1 / sqrt(mean((x - mean)^2) + eps).
    Returns y, mean (None unless centred) and rstd, (...) in the accumulation dtype.
    """
    _check_rows(x)
    _check_like("weight", weight, x, x.shape[-1:])
    _check_like("bias", bias, x, x.shape[-1:])
    module = load(backend_for(x, backend))
    found: tuple[Tensor, Tensor | None, Tensor] = module.norm(x, weight, bias, how)
    return found


def norm_vjp(
    x: Tensor,
    weight: Tensor,
    *,
    mean: Tensor | None,
    rstd: Tensor,
    grad: Tensor,
    how: Norm,
    before: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Vector-Jacobian products of `norm` by x for C cotangents, added to `before`.

    mean, rstd: from `norm`; grad, before: (C, *x.shape). Returns the same shape, in x's dtype.
    """
    _check_rows(x)
    _check_like("weight", weight, x, x.shape[-1:])
    _check_like("grad", grad, x, (*grad.shape[:1], *x.shape))
    _check_like("before", before, x, tuple(grad.shape))
    if (mean is None) == how.centred:
        raise ValueError(
            f"mean must be given where rows are centred only, got centred {how.centred}"
        )
    module = load(backend_for(x, backend))
    found: Tensor = module.norm_vjp(x, weight, mean, rstd, grad, how, before)
    return found


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, adjoint: bool = False, backend: str = "auto"
) -> Tensor:
    """Queries or keys rotated by position (RoPE, arXiv 2104.09864), halves paired as the models do; or the adjoint.

    y = x cos + rotate_half(x) sin over the first `rotated` elements, the rest unchanged. x: (batch, heads, positions,
    head_dim), or with an axis of cotangents ahead; cos, sin: (batch, positions, rotated), rotated even, the same dtype.
    Returns x's shape; heads lie side by side in memory.
    """
    if x.ndim not in (4, 5):
        raise ValueError(f"x must have four or five axes, got shape {tuple(x.shape)}")
    whole = x if x.ndim == 5 else x[None]
    _, batch, _, positions, head_dim = whole.shape
    if cos.shape[-1] % 2 or cos.shape[-1] > head_dim:
        raise ValueError(f"cos must have an even width up to {head_dim}, got {cos.shape[-1]}")
    _check_like("cos", cos, x, (batch, positions, cos.shape[-1]))
    _check_like("sin", sin, x, tuple(cos.shape))
    found: Tensor = load(backend_for(x, backend)).rotate(whole, cos, sin, adjoint)
    return found if x.ndim == 5 else found[0]
