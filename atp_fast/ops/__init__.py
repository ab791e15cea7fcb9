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
from atp_fast.ops.reference import DTYPES, AttentionEffects, AttentionStats, Norm, Scoring
from atp_fast.ops.rows import add_effects, gate_vjp, node_effects, norm, norm_vjp, rotate

__all__ = [
    "AttentionEffects",
    "AttentionStats",
    "Norm",
    "add_effects",
    "attention",
    "attention_vjp",
    "attention_vjp_effects",
    "availability",
    "backend_for",
    "gate_vjp",
    "key_patch_effects",
    "node_effects",
    "norm",
    "norm_vjp",
    "query_patch_effects",
    "rotate",
]


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
    if q.dtype not in DTYPES:
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
        default if scale is None else float(scale),
        causal,
        window,
        None if softcap is None else float(softcap),
        sinks,
        key_mask,
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
