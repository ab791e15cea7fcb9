"""Scores of every node of a model: numbers, ranking and sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from atp_fast.nodes import KINDS, Node, NodeSpace, check_kinds, label
from atp_fast.prompts.directions import sign_text
from atp_fast.results.prompts import Prompt

Array = np.ndarray[Any, Any]
By = Literal["contribution", "effect"]
Over = Literal["head", "position"]
Scores = TypeVar("Scores", bound="NodeScores")


class ScoredNode(Node):
    """A Node with its scores; equal to, and hashed like, the Node itself.

    contribution: mean over pairs of |I|, >= 0; effect: mean of I, signed; token: text at its position, or None.
    """

    contribution: float
    effect: float
    token: str | None

    def __new__(
        cls,
        kind: str,
        layer: int,
        position: int,
        index: int = 0,
        contribution: float = float("nan"),
        effect: float = float("nan"),
        token: str | None = None,
    ) -> ScoredNode:
        node = super().__new__(cls, kind, layer, position, index)
        node.contribution, node.effect, node.token = contribution, effect, token
        return node

    def __repr__(self) -> str:
        at = "" if self.token is None else f" {self.token!r}"
        return (
            f"<{label(self)}{at}: contribution {self.contribution:.4g}, effect {self.effect:+.4g}>"
        )


@dataclass(eq=False, repr=False, kw_only=True)
class NodeScores:
    """Scores of every node of a model on some prompt pairs.

    contribution: kind -> c(n) >= 0, (layers, positions, nodes per position); effect: the same shape, signed, the mean
    of I(n) under the ordinary gradient; per_pair: the same with a leading pairs axis, or None; means are over the
    pairs that have a real token at the position;
    space: the nodes, tables are 0 beyond those that a layer has; counts: pairs with a real token at each position,
    (positions,); where it is 0 there is no node;
    tokens: the text of each position, "·" where pairs differ, or None; prompts: the first pairs in words, or None;
    clean_value, corrupted_value: the metric on the prompts that are run and on those whose values are patched in,
    (pairs,); for denoising the first are the corrupted prompts;
    metadata: whatever else a reader should know (versions, date, seconds), strings only.
    The tables lie on the device of the model that was run, everything else on the CPU.
    Raises ValueError if shapes or kinds do not fit the space.
    """

    contribution: dict[str, Tensor]
    effect: dict[str, Tensor]
    space: NodeSpace
    counts: Tensor
    clean_value: Tensor
    corrupted_value: Tensor
    method: str
    metric: str
    direction: str
    backend: str
    model: str
    per_pair: dict[str, Tensor] | None = None
    tokens: list[str] | None = None
    prompts: list[Prompt] | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sign_text(self.direction)
        check_strings(self.metadata)
        pairs = check_values(self.clean_value, self.corrupted_value)
        tables: list[tuple[str, dict[str, Tensor], tuple[int, ...]]] = [
            ("contribution", self.contribution, ()),
            ("effect", self.effect, ()),
        ]
        if self.per_pair is not None:
            tables.append(("per_pair", self.per_pair, (pairs,)))
        for name, table, lead in tables:
            if tuple(table) != self.space.kinds:
                raise ValueError(
                    f"{name} must have the kinds {self.space.kinds}, got {tuple(table)}"
                )
            for kind, x in table.items():
                check_shape(f"{name}[{kind!r}]", x, (*lead, *self.space.shape(kind)))
        check_shape("counts", self.counts, (self.space.positions,))
        if self.tokens is not None and len(self.tokens) != self.space.positions:
            raise ValueError(
                f"tokens must have {self.space.positions} entries, got {len(self.tokens)}"
            )
        columns = {c for p in self.prompts or () for c in (*p.columns, *p.other_columns)}
        if not columns <= set(range(-1, self.space.positions)):
            raise ValueError(
                f"columns of prompts must be in [-1, {self.space.positions}), got {max(columns)}"
            )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.method} of {self.metric}, {self.direction}, {len(self.clean_value)} pairs, "
            f"{self.model}, {len(self):,} nodes: {', '.join(self.space.kinds)}; {sign_text(self.direction)})"
        )

    def __len__(self) -> int:
        return self.count()

    def count(self, kinds: Iterable[str] | None = None) -> int:
        """Nodes, of these kinds, that some pair has: positions that are padding everywhere hold none."""
        live = int((self.counts > 0).sum())
        return sum(live * sum(self.space.in_layers(kind)) for kind in self._kinds(kinds))

    @property
    def metric_means(self) -> tuple[float, float]:
        """Means over pairs of the metric on the clean and on the corrupted prompts, whichever are run."""
        run, other = (float(x.double().mean()) for x in (self.clean_value, self.corrupted_value))
        return (run, other) if self.direction == "noising" else (other, run)

    @property
    def axis(self) -> str:
        """What the position axis counts: "position", or "span" where the pairs had spans."""
        return self.metadata.get("axis", "position")

    def cpu(self: Scores) -> Scores:
        """The same with all tables on the CPU: what to keep of many runs on a GPU, whose memory they would fill."""

        def moved(table: dict[str, Tensor]) -> dict[str, Tensor]:
            return {kind: x.cpu() for kind, x in table.items()}

        return replace(
            self,
            contribution=moved(self.contribution),
            effect=moved(self.effect),
            per_pair=None if self.per_pair is None else moved(self.per_pair),
        )

    def top(
        self, k: int, kinds: Iterable[str] | None = None, by: By = "contribution"
    ) -> list[ScoredNode]:
        """The k nodes with the largest contribution, or the largest |effect|, best first.

        Ties go to the earlier node (kind, layer, position, index); NaN scores rank last.
        Raises ValueError if k exceeds the number of nodes, for an unknown kind, or one that was not computed.
        """
        chosen = self._kinds(kinds)
        scores = self._flat(by, chosen)
        scores = scores.abs() if by == "effect" else scores
        if not 1 <= k <= scores.numel():
            raise ValueError(f"k must be in [1, {scores.numel()}], the number of nodes, got {k}")
        best = _top(scores, k)
        columns = self._columns(chosen, best.cpu().numpy())
        values = (self._flat(name, chosen)[best].tolist() for name in ("contribution", "effect"))
        rows = zip(*(column.tolist() for column in columns.values()), *values, strict=True)
        return [
            ScoredNode(kind, layer, position, index, contribution, effect, self._token(position))
            for kind, layer, position, index, contribution, effect in rows
        ]

    def scored(self, nodes: Iterable[Node]) -> list[ScoredNode]:
        """These nodes with their scores. Raises ValueError for a node that lies outside the space."""
        rows = []
        for node in nodes:
            self.space.check(node)
            kind, layer, *place = node
            at = (self.space.row(kind, layer), *place)
            contribution, effect = (
                float(table[kind][at]) for table in (self.contribution, self.effect)
            )
            token = self._token(node.position)
            rows.append(ScoredNode(*node, contribution, effect, token))
        return rows

    def totals(self, kind: str, *, by: By = "effect", over: Over) -> Tensor:
        """Scores of one kind summed over positions, (layers, nodes per position), or over a position's nodes,
        (layers, positions). A sum over positions weighs each by the share of pairs that have it, so it is the mean
        over pairs of each pair's own sum.
        """
        self.space.shape(kind)
        if over not in ("head", "position"):
            raise ValueError(f"over must be 'head' or 'position', got {over!r}")
        scores = self._scores(by)[kind]
        if over == "position":
            return scores.sum(2)
        share = self.counts.to(scores) / len(self.clean_value)
        return (scores * share[:, None]).sum(1)

    def _kinds(self, kinds: Iterable[str] | None) -> tuple[str, ...]:
        known = (*KINDS, *self.space.only)
        chosen = self.space.kinds if kinds is None else check_kinds(kinds, known)
        for kind in chosen:
            self.space.shape(kind)
        return chosen

    def _scores(self, by: By) -> dict[str, Tensor]:
        if by not in ("contribution", "effect"):
            raise ValueError(f"by must be 'contribution' or 'effect', got {by!r}")
        return self.contribution if by == "contribution" else self.effect

    def _flat(self, by: By, kinds: Sequence[str]) -> Tensor:
        """One score per existing node, kind by kind."""
        scores, live = self._scores(by), self.counts > 0
        found = []
        for kind in kinds:
            real = scores[kind][:, live.to(scores[kind].device)]
            if kind in self.space.counts:
                real = torch.cat(
                    [x[:, :n].flatten() for x, n in zip(real, self.space.counts[kind], strict=True)]
                )
            found.append(real.flatten())
        return torch.cat(found)

    def _token(self, position: int) -> str | None:
        return None if self.tokens is None else self.tokens[position]

    def _columns(self, kinds: Sequence[str], flat: Array) -> dict[str, Array]:
        """Kind, layer, position and index of the numbers that `_flat` counts nodes by."""
        live = (self.counts > 0).nonzero().flatten().cpu().numpy()
        counts = np.concatenate([self.space.in_layers(kind) for kind in kinds])
        starts = np.concatenate(([0], np.cumsum(len(live) * counts)))
        row = np.searchsorted(starts, flat, side="right") - 1
        column, index = np.divmod(flat - starts[row], counts[row])
        layers = [self.space.layers_of(kind) for kind in kinds]
        which = np.repeat(np.arange(len(kinds)), [len(of_kind) for of_kind in layers])[row]
        layer = np.concatenate(layers)[row]
        kind = np.array(kinds, dtype=object)[which]
        return {"kind": kind, "layer": layer, "position": live[column], "index": index}

    def table(self, kinds: Iterable[str] | None) -> dict[str, Array]:
        chosen = self._kinds(kinds)
        contribution, effect = self._flat("contribution", chosen), self._flat("effect", chosen)
        columns = self._columns(chosen, np.arange(len(effect)))
        tokens = np.array([self._token(t) for t in range(self.space.positions)], dtype=object)
        return {
            "kind": columns["kind"],
            "layer": columns["layer"],
            "position": columns["position"],
            "token": tokens[columns["position"]],
            "index": columns["index"],
            "contribution": contribution.cpu().numpy(),
            "effect": effect.cpu().numpy(),
        }


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ties by index: topk alone leaves the order of ties open."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = scores.topk(k).values[-1]
    above = (scores > least).nonzero().flatten()
    ties = (scores == least).nonzero().flatten()[: k - len(above)]
    order = scores[above].sort(descending=True, stable=True).indices
    return torch.cat((above[order], ties))


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def check_values(clean_value: Tensor, corrupted_value: Tensor) -> int:
    if clean_value.ndim != 1 or clean_value.shape != corrupted_value.shape:
        raise ValueError(
            "clean_value and corrupted_value must both have shape (pairs,), "
            f"got {tuple(clean_value.shape)} and {tuple(corrupted_value.shape)}"
        )
    return len(clean_value)


def check_strings(metadata: Mapping[str, str]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
