"""Sums of effects over pairs, and the weights by which effects under many cotangents become one score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.attribution.question import Method
from atp_fast.nodes import ATTENTION_KINDS, NodeSpace


def cotangent_weights(graddrop: bool, kind: str, layer: int, layers: int) -> list[float]:
    """Weights of the |effects| under the cotangents present at a layer: ordinary first, then one per dropped layer.

    In-block nodes: [(m-1) |I| + sum_{l>m} |I_l|] / (L-1) with m = layer + 1 (their own layer's drop gives 0).
    resid_pre lies in no block: [(m-1) |I| + sum_{l>=m} |I_l|] / L. One layer alone has nothing to drop: |I|.
    """
    if not graddrop or (layers == 1 and kind != "resid_pre"):
        return [1.0]
    if kind == "resid_pre":
        return [layer / layers] + [1 / layers] * (layers - layer)
    return [layer / (layers - 1)] + [1 / (layers - 1)] * (layers - 1 - layer)


def weight_tables(
    graddrop: bool, layers: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cotangent_weights of every layer, for nodes in blocks and for resid_pre, (layers, cotangents), zeros behind."""

    def table(kind: str) -> Tensor:
        rows = [cotangent_weights(graddrop, kind, layer, layers) for layer in range(layers)]
        whole = [row + [0.0] * (layers + 1 - len(row)) for row in rows]
        return torch.tensor(whole, device=device, dtype=dtype)

    return table("z"), table("resid_pre")


class Place(NamedTuple):
    """Where a batch's effects belong among the scores of all pairs.

    rows: the pairs' numbers; columns: the user's columns of the batch's positions, if they are the same for all pairs, or
    else the column of each pair's first position, (pairs,); live: where effects count, (pairs, positions), or
    everywhere.
    """

    rows: Tensor
    columns: slice | Tensor
    live: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, starts: Tensor, positions: int, live: Tensor | None) -> Place:
        """starts: the user's column of each pair's first position in the batch, (pairs,)."""
        first = set(starts.tolist())
        if len(first) > 1:
            return cls(rows, starts, live)
        begin = first.pop()
        return cls(rows, slice(begin, begin + positions), live)


class Scores:
    """Sums over pairs of |effects| and signed effects of every node, in the columns of the user's own prompts.

    space: the nodes that are scored; method: with which of AtP*'s repairs; pairs: as many rows of every pair's own numbers
    are kept (the score with GradDrop, else the effect), none when 0.
    """

    def __init__(
        self,
        space: NodeSpace,
        method: Method,
        device: torch.device,
        dtype: torch.dtype,
        pairs: int = 0,
    ) -> None:
        self.space, self.method = space, method

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.score = {kind: zeros(*space.shape(kind)) for kind in space.kinds}
        self.effect = {kind: zeros(*space.shape(kind)) for kind in space.kinds}
        self.per_pair = (
            {kind: zeros(pairs, *space.shape(kind)) for kind in space.kinds} if pairs else None
        )
        self._weights = weight_tables(method.graddrop, space.layers, device, dtype)

    def weights(self, kind: str, layer: int, first: int, count: int) -> Tensor:
        """Weights, (count,), of the cotangents from number `first` on that are present at a layer."""
        return self._weights[kind == "resid_pre"][layer, first : first + count]

    def add(
        self,
        kind: str,
        layer: int,
        place: Place,
        first: int,
        grad: Tensor,
        values: tuple[Tensor, Tensor] | None = None,
        *,
        backend: str,
    ) -> None:
        """Add a layer's effects of a batch of pairs under the cotangents from number `first` on, in place.

        grad: gradients by the clean values, (C, *their shape), values: the clean and the corrupted ones; or grad: the
        effects themselves, (C, pairs, positions, width).
        """
        if values is None:
            grad, clean, corrupted = grad[..., None], None, None
        else:
            clean, corrupted = (_as_vectors(kind, x, 1) for x in values)
            grad = _as_vectors(kind, grad.to(clean.dtype), 2)
        if isinstance(place.columns, Tensor):
            columns, starts = slice(None), place.columns
        else:
            columns, starts = place.columns, None
        own = slice(self.space.in_layers(kind)[layer])
        ops.add_effects(
            grad,
            weights=self.weights(kind, layer, first, len(grad)),
            score=self.score[kind][layer, columns, own],
            effect=self.effect[kind][layer, columns, own] if first == 0 else None,
            clean=clean,
            corrupted=corrupted,
            live=place.live,
            first=starts,
            per_pair=self.per_pair[kind][:, layer, columns, own] if self.per_pair else None,
            rows=place.rows if self.per_pair else None,
            pair_signed=not self.method.graddrop,
            backend=backend,
        )


def _as_vectors(kind: str, x: Tensor, batch: int) -> Tensor:
    """Values of a kind, whose batch axes end at number `batch`, as (..., positions, width, dim)."""
    if kind in ATTENTION_KINDS:
        return x.transpose(batch, batch + 1)
    return x[..., None] if kind == "neuron" else x.unsqueeze(-2)
