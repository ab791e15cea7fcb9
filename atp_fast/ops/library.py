"""The ops as torch operators, for code under torch.compile; importing this module registers them.

The same functions and arguments as atp_fast.ops, which is what everything else calls: the operators add checks of
torch's own and a copy of outputs that a backend returns as views. They have no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.ops.reference import AttentionEffects, AttentionStats, accumulation_dtype

_SCORING = (
    "float? scale=None, bool causal=True, int? window=None, float? softcap=None, "
    'Tensor? sinks=None, Tensor? key_mask=None, str backend="auto"'
)
_STATS = "Tensor z, Tensor logsumexp, Tensor top_key, Tensor loo_logsumexp, Tensor loo_z"
_QKV = "Tensor q, Tensor k, Tensor v"
_SCHEMAS = {
    "attention": f"({_QKV}, *, {_SCORING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_vjp": f"({_QKV}, {_STATS}, Tensor grad_z, *, {_SCORING}) -> (Tensor, Tensor, Tensor)",
    "query_patch_effects": f"({_QKV}, Tensor q_corrupted, Tensor grad_z, *, {_SCORING}) -> Tensor",
    "key_patch_effects": f"({_QKV}, Tensor k_corrupted, Tensor grad_z, {_STATS}, *, {_SCORING}) -> Tensor",
    "attention_vjp_effects": (
        f"({_QKV}, Tensor q_corrupted, Tensor k_corrupted, {_STATS}, Tensor grad_z, *, {_SCORING})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "node_effects": '(Tensor delta, Tensor grad, *, Tensor? weights=None, str backend="auto") -> Tensor',
}


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    stats = ops.attention(q, k, v, **options)[1]
    return stats.z, stats.logsumexp, *stats.leave_one_out()


def _attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    *stats, grad_z = rest
    return ops.attention_vjp(q, k, v, stats=AttentionStats(*stats), grad_z=grad_z, **options)


def _query_patch_effects(
    q: Tensor, k: Tensor, v: Tensor, q_corrupted: Tensor, grad_z: Tensor, **options: Any
) -> Tensor:
    return ops.query_patch_effects(
        q, k, v, q_corrupted=q_corrupted, grad_z=grad_z, **options
    ).contiguous()


def _key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    grad_z: Tensor,
    *stats: Tensor,
    **options: Any,
) -> Tensor:
    return ops.key_patch_effects(
        q, k, v, k_corrupted=k_corrupted, grad_z=grad_z, stats=AttentionStats(*stats), **options
    ).contiguous()


def _attention_vjp_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_corrupted: Tensor,
    k_corrupted: Tensor,
    *rest: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:
    *stats, grad_z = rest
    effects = ops.attention_vjp_effects(
        q,
        k,
        v,
        q_corrupted=q_corrupted,
        k_corrupted=k_corrupted,
        stats=AttentionStats(*stats),
        grad_z=grad_z,
        **options,
    )
    return tuple(x.contiguous() for x in effects)


def _node_effects(delta: Tensor, grad: Tensor, **options: Any) -> Tensor:
    return ops.node_effects(delta, grad, **options)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, ...]:
    rows, dtype = q.shape[:3], accumulation_dtype(q)
    z = q.new_empty((*rows, v.shape[3]), dtype=dtype)
    row, top_key = q.new_empty(rows, dtype=dtype), q.new_empty(rows, dtype=torch.int64)
    return z, row, top_key, torch.empty_like(row), torch.empty_like(z)


def _fake_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (x.new_empty((grad_z.shape[0], *x.shape)) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def _fake_effects(x: Tensor, grad_z: Tensor) -> Tensor:
    """(C, batch, positions, heads) for x, (batch, heads, positions, head_dim)."""
    batch, heads, positions, _ = x.shape
    return x.new_empty((grad_z.shape[0], batch, positions, heads), dtype=accumulation_dtype(x))


def _fake_attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: object
) -> tuple[Tensor, ...]:
    return _fake_gradients(q, k, v, rest[-1])


def _fake_query_patch_effects(
    q: Tensor, k: Tensor, v: Tensor, q_corrupted: Tensor, grad_z: Tensor, **options: object
) -> Tensor:
    return _fake_effects(q, grad_z)


def _fake_key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_corrupted: Tensor,
    grad_z: Tensor,
    *stats: Tensor,
    **options: object,
) -> Tensor:
    return _fake_effects(k, grad_z)


def _fake_attention_vjp_effects(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: object
) -> tuple[Tensor, ...]:
    grad_z = rest[-1]
    return (*_fake_gradients(q, k, v, grad_z), _fake_effects(q, grad_z), _fake_effects(k, grad_z))


def _fake_node_effects(
    delta: Tensor, grad: Tensor, *, weights: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    shape = grad.shape[:-1] if weights is None else delta.shape[:-1]
    return delta.new_empty(shape, dtype=accumulation_dtype(delta))


_OPERATORS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "attention": (_attention, _fake_attention),
    "attention_vjp": (_attention_vjp, _fake_attention_vjp),
    "query_patch_effects": (_query_patch_effects, _fake_query_patch_effects),
    "key_patch_effects": (_key_patch_effects, _fake_key_patch_effects),
    "attention_vjp_effects": (_attention_vjp_effects, _fake_attention_vjp_effects),
    "node_effects": (_node_effects, _fake_node_effects),
}
for _name, (_run, _fake) in _OPERATORS.items():
    torch.library.define(f"atp_fast::{_name}", _SCHEMAS[_name])
    torch.library.impl(f"atp_fast::{_name}", "CompositeExplicitAutograd", _run)
    torch.library.register_fake(f"atp_fast::{_name}", _fake)


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
    backend: str = "auto",
) -> tuple[Tensor, AttentionStats]:
    """`ops.attention` as a torch operator."""
    stats = AttentionStats(
        *torch.ops.atp_fast.attention(
            q,
            k,
            v,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
            key_mask=key_mask,
            backend=backend,
        )
    )
    return stats.z.to(q.dtype), stats


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
    """`ops.attention_vjp` as a torch operator."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.atp_fast.attention_vjp(
        q,
        k,
        v,
        *stats,
        grad_z,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_mask=key_mask,
        backend=backend,
    )
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
    """`ops.query_patch_effects` as a torch operator."""
    effects: Tensor = torch.ops.atp_fast.query_patch_effects(
        q,
        k,
        v,
        q_corrupted,
        grad_z,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_mask=key_mask,
        backend=backend,
    )
    return effects


def key_patch_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_corrupted: Tensor,
    grad_z: Tensor,
    stats: AttentionStats,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`ops.key_patch_effects` as a torch operator; the statistics are not optional."""
    effects: Tensor = torch.ops.atp_fast.key_patch_effects(
        q,
        k,
        v,
        k_corrupted,
        grad_z,
        *stats,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_mask=key_mask,
        backend=backend,
    )
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
    """`ops.attention_vjp_effects` as a torch operator."""
    return AttentionEffects(
        *torch.ops.atp_fast.attention_vjp_effects(
            q,
            k,
            v,
            q_corrupted,
            k_corrupted,
            *stats,
            grad_z,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
            key_mask=key_mask,
            backend=backend,
        )
    )


def node_effects(
    delta: Tensor, grad: Tensor, *, weights: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`ops.node_effects` as a torch operator."""
    effects: Tensor = torch.ops.atp_fast.node_effects(delta, grad, weights=weights, backend=backend)
    return effects
