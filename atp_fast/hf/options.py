"""A layer's options of attention, and its attention by `atp_fast.ops` under them.

Attention in chunks (a query sees the keys of its own chunk of positions) is one attention for each chunk: chunks are folded
into the batch axis. Padding behind the last key is seen by no query, queries ahead of those that are run have no cotangents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from atp_fast import ops


class AttentionOptions(NamedTuple):
    """With what a layer calls attention; chunk: a query sees no key before the last multiple of it."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    chunk: int | None = None

    def _of_ops(self, backend: str) -> dict[str, Any]:
        of_ops = self._asdict()
        del of_ops["chunk"]
        return of_ops | {"backend": backend}

    def _fold(self, q: Tensor, k: Tensor) -> _Fold | None:
        queries, keys = q.shape[2], k.shape[2]
        if self.chunk is None or keys <= self.chunk:
            return None
        first = keys - queries
        skipped = first - first % self.chunk
        chunks = -(-(keys - skipped) // self.chunk)
        return _Fold(self.chunk, chunks, first - skipped, queries, skipped, keys)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, statistics: bool, backend: str
    ) -> tuple[Tensor, ops.AttentionStats]:
        """ops.attention"""
        options = self._of_ops(backend) | {"statistics": statistics}
        fold = self._fold(q, k)
        if fold is None:
            return ops.attention(q, k, v, **options)
        z, stats = ops.attention(fold.queries(q), fold.keys(k), fold.keys(v), **options)
        whole = (None if x is None else fold.of_queries(x, 0, 2) for x in stats)
        return fold.of_queries(z, 0, 2), ops.AttentionStats(*whole)  # type: ignore[arg-type]

    def attention_vjp(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        stats: ops.AttentionStats,
        grad_z: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ops.attention_vjp"""
        options, fold = self._of_ops(backend), self._fold(q, k)
        if fold is None:
            return ops.attention_vjp(q, k, v, stats=stats, grad_z=grad_z, **options)
        grad_q, grad_k, grad_v = ops.attention_vjp(
            fold.queries(q),
            fold.keys(k),
            fold.keys(v),
            stats=fold.stats(stats),
            grad_z=fold.queries(grad_z, 1),
            **options,
        )
        return (
            fold.of_queries(grad_q, 1, 3),
            fold.of_keys(grad_k, 1, 3),
            fold.of_keys(grad_v, 1, 3),
        )

    def attention_vjp_effects(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_corrupted: Tensor,
        k_corrupted: Tensor,
        stats: ops.AttentionStats,
        grad_z: Tensor,
        backend: str,
    ) -> ops.AttentionEffects:
        """ops.attention_vjp_effects"""
        options, fold = self._of_ops(backend), self._fold(q, k)
        if fold is None:
            options |= {"q_corrupted": q_corrupted, "k_corrupted": k_corrupted}
            return ops.attention_vjp_effects(q, k, v, stats=stats, grad_z=grad_z, **options)
        found = ops.attention_vjp_effects(
            fold.queries(q),
            fold.keys(k),
            fold.keys(v),
            q_corrupted=fold.queries(q_corrupted),
            k_corrupted=fold.keys(k_corrupted),
            stats=fold.stats(stats),
            grad_z=fold.queries(grad_z, 1),
            **options,
        )
        return ops.AttentionEffects(
            fold.of_queries(found.grad_q, 1, 3),
            fold.of_keys(found.grad_k, 1, 3),
            fold.of_keys(found.grad_v, 1, 3),
            fold.of_queries(found.effect_q, 1, 2),
            fold.of_keys(found.effect_k, 1, 2),
        )


class _Fold(NamedTuple):
    """Queries and keys, (batch, heads, positions, dim), as (batch * chunks, heads, width, dim), and what is got of them back.

    ahead: empty rows before the first query, which its chunk begins with; skipped: keys before that chunk.
    """

    width: int
    chunks: int
    ahead: int
    query_count: int
    skipped: int
    key_count: int

    def queries(self, x: Tensor, batch: int = 0) -> Tensor:
        """batch: the axis of the pairs, two before that of the positions."""
        at = batch + 2
        behind = self.chunks * self.width - self.ahead - x.shape[at]
        x = F.pad(x, [0, 0] * (x.ndim - 1 - at) + [self.ahead, behind])
        apart = x.reshape(*x.shape[:at], self.chunks, self.width, *x.shape[at + 1 :])
        return apart.movedim(at, batch + 1).flatten(batch, batch + 1)

    def keys(self, x: Tensor) -> Tensor:
        return self._replace(ahead=0).queries(x[:, :, self.skipped :])

    def stats(self, stats: ops.AttentionStats) -> ops.AttentionStats:
        folded = (None if x is None else self.queries(x) for x in stats)
        return ops.AttentionStats(*folded)  # type: ignore[arg-type]

    def of_queries(self, x: Tensor, batch: int, at: int) -> Tensor:
        """Back, of something with these axes of pairs and positions."""
        apart = x.reshape(*x.shape[:batch], -1, self.chunks, *x.shape[batch + 1 :])
        whole = apart.movedim(batch + 1, at).flatten(at, at + 1)
        return whole.narrow(at, self.ahead, self.query_count)

    def of_keys(self, x: Tensor, batch: int, at: int) -> Tensor:
        own = self._replace(ahead=0, query_count=self.key_count - self.skipped)
        x = own.of_queries(x, batch, at)
        return F.pad(x, [0, 0] * (x.ndim - 1 - at) + [self.skipped, 0])
