"""Estimates beside the exact effects of the same nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from atp_fast.extras import require
from atp_fast.nodes import label
from atp_fast.patching.subsets import Floats
from atp_fast.results.figures import LIGHT, plain
from atp_fast.results.patch_effects import PatchEffects
from atp_fast.results.scores import ScoredNode

PRECISION_AT = (1, 5, 10, 20, 50, 100, 200, 500, 1000)


class Verified(NamedTuple):
    """One node: its estimates and exact values, contribution (>= 0) and effect (signed)."""

    node: ScoredNode
    contribution: float
    effect: float

    @property
    def error(self) -> float:
        """Estimated minus exact contribution."""
        return self.node.contribution - self.contribution


@dataclass(frozen=True, repr=False)
class Agreement:
    """How well estimates agree with exact effects, on the nodes that were verified.

    rows: the nodes, best estimate first; method and metric: what was estimated.
    Nodes that were not verified are not judged: see diagnostics for those.
    """

    rows: Sequence[Verified]
    method: str
    metric: str

    @property
    def estimated(self) -> Floats:
        return np.array([row.node.contribution for row in self.rows])

    @property
    def exact(self) -> Floats:
        return np.array([row.contribution for row in self.rows])

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of the contributions; NaN below two nodes or where one side is constant."""
        rankdata = require("scipy.stats", "rank correlation").rankdata
        a, b = rankdata(self.estimated), rankdata(self.exact)
        if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
            return float("nan")
        return float(np.corrcoef(a, b)[0, 1])

    @property
    def same_sign(self) -> float:
        """Share of nodes whose estimated and exact effects have the same sign, each weighted by its contribution."""
        agree = np.array([np.sign(row.node.effect) == np.sign(row.effect) for row in self.rows])
        total = self.exact.sum()
        return float((agree * self.exact).sum() / total) if total else float("nan")

    def precision(self, k: int) -> float:
        """Share of the k best by estimate that are among the k best of the verified nodes by exact contribution."""
        if not 1 <= k <= len(self.rows):
            raise ValueError(f"k must be in [1, {len(self.rows)}], got {k}")
        best = np.argsort(-self.exact, kind="stable")[:k]
        chosen = np.argsort(-self.estimated, kind="stable")[:k]
        return len(np.intersect1d(best, chosen)) / k

    def precisions(self) -> dict[int, float]:
        """Precision at the usual K below the number of verified nodes, at which it is 1 by definition."""
        return {k: self.precision(k) for k in PRECISION_AT if k < len(self.rows)}

    def worst(self, k: int = 10) -> list[Verified]:
        """The k largest differences between estimated and exact contribution."""
        return sorted(self.rows, key=lambda row: -abs(row.error))[:k]

    def to_dict(self) -> dict[str, Any]:
        """The numbers without the rows, ready for JSON (None for NaN)."""
        numbers = {"rank_correlation": self.rank_correlation, "same_sign": self.same_sign}
        return {
            "nodes": len(self.rows),
            "method": self.method,
            "metric": self.metric,
            **{name: None if np.isnan(x) else x for name, x in numbers.items()},
            "precision": {str(k): p for k, p in self.precisions().items()},
        }

    def scatter(self) -> Any:
        """plotly figure: estimated against exact contribution, logarithmic, one colour per kind."""
        go = require("plotly.graph_objects", "the scatter plot")
        figure = go.Figure()
        for kind in dict.fromkeys(row.node.kind for row in self.rows):
            rows = [row for row in self.rows if row.node.kind == kind]
            figure.add_trace(
                go.Scatter(
                    x=np.array([row.contribution for row in rows]),
                    y=np.array([row.node.contribution for row in rows]),
                    text=[plain(_name(row.node)) for row in rows],
                    mode="markers",
                    name=kind,
                    marker={"size": 6, "opacity": 0.7},
                )
            )
        both = np.concatenate([self.estimated, self.exact])
        positive = both[both > 0]
        if len(positive):
            ends = [float(positive.min()), float(positive.max())]
            line = {"color": "#888888", "width": 1}
            figure.add_trace(
                go.Scatter(x=ends, y=ends, mode="lines", name="exact = estimated", line=line)
            )
        figure.update_xaxes(type="log", title=plain(f"exact contribution ({self.metric})"))
        figure.update_yaxes(type="log", title=plain(f"estimated by {self.method}"))
        title = "Estimates beside exact effects"
        figure.update_layout(template=LIGHT, title=title, height=480)
        return figure


def _name(node: ScoredNode) -> str:
    return label(node) + ("" if node.token is None else f" {node.token!r}")


def agreement(
    estimated: Sequence[ScoredNode], exact: PatchEffects, method: str = "estimate"
) -> Agreement:
    """Put estimates, as `Attribution.top` gives them, beside `engine.patch` of the same nodes.

    Raises ValueError when the two are about different nodes.
    """
    if not estimated:
        raise ValueError("estimated must hold at least one node, got none")
    if exact.nodes is None or list(exact.nodes) != list(estimated):
        raise ValueError("exact must be the patch effects of the estimated nodes, in their order")
    values = zip(estimated, exact.mean_abs.tolist(), exact.mean.tolist(), strict=True)
    return Agreement([Verified(*row) for row in values], method, exact.metric)
