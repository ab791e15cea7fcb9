"""Sums of effects over pairs, and the weights by which effects under many cotangents become one score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atp_fast.attribution.question import Method
from atp_fast.nodes import NodeSpace


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


Found = dict[str, tuple[Tensor, Tensor]]
"""One layer's effects: kind -> score and signed effect, (pairs, positions, width)."""


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

    def add(self, layer: int, found: Found, place: Place) -> None:
        """Add one layer's effects of a batch of pairs."""
        for kind, (score, effect) in found.items():
            if place.live is not None:
                live = place.live[..., None]
                score, effect = torch.where(live, score, 0), torch.where(live, effect, 0)
            columns = place.columns
            if isinstance(columns, Tensor):
                score, effect = self._moved(score, columns), self._moved(effect, columns)
                columns = slice(None)
            self.score[kind][layer, columns] += score.sum(0)
            self.effect[kind][layer, columns] += effect.sum(0)
            if self.per_pair is not None:
                kept = score if self.method.graddrop else effect
                self.per_pair[kind][place.rows, layer, columns] = kept

    def _moved(self, x: Tensor, first: Tensor) -> Tensor:
        """x (pairs, positions, width) in the user's columns: gathered, since scattering has no fixed order on CUDA."""
        source = torch.arange(self.space.positions, device=x.device) - first[:, None]
        here = (source >= 0) & (source < x.shape[1])
        index = source.clamp(0, x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
        return x.gather(1, index).masked_fill(~here[..., None], 0)
