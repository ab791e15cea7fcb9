"""Sums of effects over pairs, and the weights by which effects under many cotangents become one score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.attribution.question import Method
from atp_fast.nodes import ATTENTION_KINDS, NodeSpace, is_scalar


def cotangent_weights(graddrop: bool, kind: str, layer: int, layers: int) -> list[float]:
    """Weights of the |effects| under the cotangents present at a layer: ordinary first, then one per dropped layer.

    In-block nodes: [(m-1) |I| + sum_{l>m} |I_l|] / (L-1) with m = layer + 1 (their own layer's drop gives 0).
    resid_pre lies in no block: [(m-1) |I| + sum_{l>=m} |I_l|] / L, also behind the last layer, where layer is L. One layer
    alone has nothing to drop: |I|.
    """
    if not graddrop or (layers == 1 and kind != "resid_pre"):
        return [1.0]
    if kind == "resid_pre":
        return [layer / layers] + [1 / layers] * (layers - layer)
    return [layer / (layers - 1)] + [1 / (layers - 1)] * (layers - 1 - layer)


def weight_tables(
    graddrop: bool, layers: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cotangent_weights of every layer and of behind the last, for nodes in blocks and for resid_pre.

    (layers + 1, cotangents), zeros behind.
    """

    def table(kind: str) -> Tensor:
        rows = [cotangent_weights(graddrop, kind, layer, layers) for layer in range(layers + 1)]
        whole = [row + [0.0] * (layers + 1 - len(row)) for row in rows]
        return torch.tensor(whole, device=device, dtype=dtype)

    return table("z"), table("resid_pre")


class Place(NamedTuple):
    """Where a batch's effects belong among the scores of all pairs.

    rows: the pairs' numbers; columns: the user's columns of the batch's first positions, if they are the same for all pairs,
    or else the column of each pair's first position, (pairs,); live: where effects count, (pairs, those positions), or
    everywhere.
    """

    rows: Tensor
    columns: slice | Tensor
    live: Tensor | None

    def to(self, device: torch.device) -> Place:
        columns = self.columns if isinstance(self.columns, slice) else self.columns.to(device)
        live = None if self.live is None else self.live.to(device)
        return Place(self.rows.to(device), columns, live)

    @classmethod
    def of(
        cls, rows: Tensor, column: int | Tensor, positions: int, live: Tensor | None, width: int
    ) -> Place:
        """column: the user's column, of `width`, of the pairs' first positions, or of each pair's; what a batch has behind the
        last column is padding."""
        if isinstance(column, Tensor):
            return cls(rows, column, live)
        inside = min(positions, width - column)
        if live is not None and inside < positions:
            live = live[:, :inside].contiguous()
        return cls(rows, slice(column, column + inside), live)

    def part(self, begin: int, end: int) -> Place:
        """The same of some of the batch's positions."""
        live = None if self.live is None else self.live[:, begin:end]
        if isinstance(self.columns, Tensor):
            return Place(self.rows, self.columns + begin, live)
        first, stop = self.columns.start, self.columns.stop
        return Place(self.rows, slice(first + begin, min(first + end, stop)), live)


class _Tables(NamedTuple):
    """Sums of one kind in one layer: (positions, width), and every pair's own, (pairs, positions, width)."""

    score: Tensor
    effect: Tensor
    pairs: Tensor | None


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
        self.dtype, self._device = dtype, device
        self._weights = {device: weight_tables(method.graddrop, space.layers, device, dtype)}
        self._away: dict[tuple[str, int], _Tables] = {}

    def tables(self) -> list[Tensor]:
        """All sums."""
        groups = (self.score, self.effect, self.per_pair or {})
        return [table for group in groups for table in group.values()]

    def part(self, pairs: int, positions: int) -> Scores:
        """Scores for a batch alone: of so many columns, and with a row of its own for each of its pairs."""
        space = replace(self.space, positions=positions)
        rows = pairs if self.per_pair else 0
        return Scores(space, self.method, self._device, self.dtype, rows)

    def load(self, whole: Scores, place: Place) -> None:
        """Take a batch's sums over from those of all."""
        for mine, theirs in self._beside(whole, place):
            mine.copy_(theirs)

    def store(self, whole: Scores, place: Place) -> None:
        """Give a batch's sums back to those of all."""
        for mine, theirs in self._beside(whole, place):
            theirs.copy_(mine)
        for kind, own in (self.per_pair or {}).items():
            assert whole.per_pair is not None
            rows = whole.per_pair[kind][:, :, _slice(place)]
            rows.index_copy_(0, place.rows, own[:, :, : rows.shape[2]])

    def equals(self, whole: Scores, place: Place) -> bool:
        """Whether a batch's sums are those of all, bit by bit."""
        return all(torch.equal(mine, theirs) for mine, theirs in self._beside(whole, place))

    def _beside(self, whole: Scores, place: Place) -> Iterator[tuple[Tensor, Tensor]]:
        """Each table of a batch's sums, and the same part of all; rows of pairs are copies."""
        columns = _slice(place)
        for kind in self.space.kinds:
            for own, tables in ((self.score, whole.score), (self.effect, whole.effect)):
                theirs = tables[kind][:, columns]
                yield own[kind][:, : theirs.shape[1]], theirs
            if self.per_pair and whole.per_pair:
                theirs = whole.per_pair[kind][:, :, columns].index_select(0, place.rows)
                yield self.per_pair[kind][:, :, : theirs.shape[2]], theirs

    def weights(
        self, kind: str, layer: int, first: int, count: int, device: torch.device
    ) -> Tensor:
        """Weights, (count,), of the cotangents from number `first` on that are present at a layer."""
        if device not in self._weights:
            blocks, ends = self._weights[self._device]
            self._weights[device] = blocks.to(device), ends.to(device)
        return self._weights[device][kind == "resid_pre"][layer, first : first + count]

    def _tables(self, kind: str, layer: int, device: torch.device) -> _Tables:
        """A layer's part of the tables; those of a layer on another device lie there, until `gather`."""
        if device == self._device:
            pairs = None if self.per_pair is None else self.per_pair[kind][:, layer]
            return _Tables(self.score[kind][layer], self.effect[kind][layer], pairs)
        if (kind, layer) not in self._away:
            here = self._tables(kind, layer, self._device)
            self._away[kind, layer] = _Tables(
                torch.zeros_like(here.score, device=device),
                torch.zeros_like(here.effect, device=device),
                None if here.pairs is None else torch.zeros_like(here.pairs, device=device),
            )
        return self._away[kind, layer]

    def gather(self, whole: Callable[[str, Tensor], Tensor], space: NodeSpace) -> None:
        """Make these the scores of a space, on one device, from those of its nodes that each process holds; whole: see
        Shares.whole."""
        for (kind, layer), away in self._away.items():
            here = self._tables(kind, layer, self._device)
            here.score.copy_(away.score)
            here.effect.copy_(away.effect)
            if here.pairs is not None and away.pairs is not None:
                here.pairs.copy_(away.pairs)
        self._away.clear()
        for kind in space.kinds:
            self.score[kind] = whole(kind, self.score[kind])
            self.effect[kind] = whole(kind, self.effect[kind])
            if self.per_pair is not None:
                self.per_pair[kind] = whole(kind, self.per_pair[kind])
        self.space = space

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
        seat: tuple[int, str] | None = None,
    ) -> None:
        """Add a layer's effects of a batch of pairs under the cotangents from number `first` on, in place.

        grad: gradients by the clean values, (C, *their shape), values: the clean and the corrupted ones; or grad: the
        effects themselves, (C, pairs, positions, width). seat: the layer and kind whose cotangents these are, where it is
        not this kind itself.
        """
        if values is None:
            grad, clean, corrupted = grad[..., None], None, None
        else:
            clean, corrupted = (_as_vectors(kind, x, 1) for x in values)
            grad = _as_vectors(kind, grad.to(clean.dtype), 2)
        columns, starts = _slice(place), None
        if isinstance(place.columns, Tensor):
            starts = place.columns
        else:
            inside = len(range(self.space.positions)[columns])
            if inside < grad.shape[2]:
                grad = grad[:, :, :inside]
                clean, corrupted = (x if x is None else x[:, :inside] for x in (clean, corrupted))
        row = self.space.row(kind, layer)
        own = slice(self.space.in_layers(kind)[row])
        table = self._tables(kind, row, grad.device)
        carried, below = seat or (layer, kind)
        ops.add_effects(
            grad,
            weights=self.weights(below, carried, first, len(grad), grad.device),
            score=table.score[columns, own],
            effect=table.effect[columns, own] if first == 0 else None,
            clean=clean,
            corrupted=corrupted,
            live=place.live,
            first=starts,
            per_pair=None if table.pairs is None else table.pairs[:, columns, own],
            rows=None if table.pairs is None else place.rows,
            pair_signed=not self.method.graddrop,
            backend=backend,
        )


def _slice(place: Place) -> slice:
    return slice(None) if isinstance(place.columns, Tensor) else place.columns


def _as_vectors(kind: str, x: Tensor, batch: int) -> Tensor:
    """Values of a kind, whose batch axes end at number `batch`, as (..., positions, width, dim)."""
    if kind in ATTENTION_KINDS:
        return x.transpose(batch, batch + 1)
    return x[..., None] if is_scalar(kind) else x.unsqueeze(-2)
