"""MIB's evaluation of node scores: how faithful circuits of the best nodes are, over circuit sizes.

A circuit's faithfulness is (m(C) - m(none)) / (m(all) - m(none)), where m(C) is the metric, averaged over pairs, with all
nodes outside C patched to their corrupted values, at all positions (arXiv 2504.13151, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from atp_fast.attribution.question import Question
from atp_fast.engine import Engine
from atp_fast.integrations.eap import Importances
from atp_fast.integrations.graph_shape import NODES, GraphShape
from atp_fast.metrics import MetricLike
from atp_fast.nodes import Node
from atp_fast.prompts.pairs import PromptPairs

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's circuit sizes, as parts of the scored nodes."""


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness of the circuits of the best scores, one entry per fraction of FRACTIONS.

    absolute: best by |score|, else by score; sizes: scored nodes in each circuit; values: faithfulness, 1 for all nodes.
    """

    absolute: bool
    sizes: tuple[int, ...]
    values: tuple[float, ...]

    def area(self, log: bool = False) -> float:
        """Area under the curve, by trapezes from the first fraction to 1: MIB's CPR where nodes are ranked by score.

        log: over the fractions' natural logarithms, not divided by their range, as MIB's own.
        """
        return _area(self.values, log)

    def distance(self, log: bool = False) -> float:
        """Area between the curve and 1: MIB's CMD where nodes are ranked by |score|; log as for area."""
        return _area([abs(1 - value) for value in self.values], log)

    @property
    def average(self) -> float:
        """Mean over the fractions."""
        return sum(self.values) / len(self.values)


@dataclass(frozen=True)
class Evaluation:
    """MIB's scores of a set of importances: by_score gives CPR, by_size (of |score|) gives CMD.

    full, empty: the metric, averaged over pairs, of the clean run and with every node patched.
    """

    by_score: FaithfulnessCurve
    by_size: FaithfulnessCurve
    full: float
    empty: float

    def to_dict(self) -> dict[str, Any]:
        """What goes into a JSON file: everything, with the four areas."""
        return {
            "CPR": self.by_score.area(),
            "CPR_log": self.by_score.area(log=True),
            "CMD": self.by_size.distance(),
            "CMD_log": self.by_size.distance(log=True),
            "fractions": FRACTIONS,
            "full": self.full,
            "empty": self.empty,
        } | {
            name: {"sizes": curve.sizes, "faithfulness": curve.values, "average": curve.average}
            for name, curve in (("by_score", self.by_score), ("by_size", self.by_size))
        }


def evaluate(
    engine: Engine,
    pairs: PromptPairs,
    importances: Importances,
    metric: MetricLike = Question.metric,
    progress: bool | None = None,
) -> Evaluation:
    """Faithfulness of the circuits of the best nodes, by exact patching; MIB's metric is logit_diff.

    Each circuit that differs from the others costs one patched forward per pair; progress: a bar, by default on a
    terminal only. Raises ValueError for importances without node scores or of another model, and where the full and the
    empty circuit have the same metric; what Engine.patch_subsets raises.
    """
    if importances.nodes is None:
        raise ValueError(
            "importances must have node scores, these have none: circuits of edges and neurons are not evaluated"
        )
    shape = GraphShape.of(engine)
    if shape != importances.shape:
        raise ValueError(
            f"importances must be of the model's shape {shape}, got {importances.shape}"
        )
    both = {absolute: list(_circuits(importances.nodes, absolute)) for absolute in (False, True)}
    none = frozenset[int]()
    distinct = list(dict.fromkeys([none, *both[False], *both[True]]))
    full, values = _metric_of(engine, pairs, shape, distinct, metric, progress)
    found = dict(zip(distinct, values, strict=True))
    if found[none] == full:
        raise ValueError(
            f"metric must differ between the clean run and the one with all nodes patched, got {full} for both"
        )

    def curve(absolute: bool) -> FaithfulnessCurve:
        return FaithfulnessCurve(
            absolute,
            tuple(_sizes(importances.nodes)),
            tuple((found[c] - found[none]) / (full - found[none]) for c in both[absolute]),
        )

    return Evaluation(curve(False), curve(True), full, found[none])


def _sizes(nodes: Tensor | None) -> list[int]:
    assert nodes is not None
    scored = int((~nodes.isnan()).sum())
    return [int(fraction * scored) for fraction in FRACTIONS]


def _circuits(nodes: Tensor, absolute: bool) -> Iterator[frozenset[int]]:
    """For each fraction the sources in the circuit: the best scored ones, and all that have no score."""
    scores = (nodes.abs() if absolute else nodes).nan_to_num(nan=-torch.inf)
    order = scores.sort(descending=True, stable=True).indices.tolist()
    unscored = nodes.isnan().nonzero().flatten().tolist()
    for size in _sizes(nodes):
        circuit = frozenset(order[:size]) | frozenset(unscored)
        # with a corrupted input everything is corrupted
        yield circuit if 0 in circuit else frozenset()


def _metric_of(
    engine: Engine,
    pairs: PromptPairs,
    shape: GraphShape,
    circuits: Sequence[frozenset[int]],
    metric: MetricLike,
    progress: bool | None,
) -> tuple[float, list[float]]:
    """The metric, averaged over pairs, of the clean run and of each circuit."""
    positions = pairs.moving.any(0).nonzero().flatten().tolist()
    columns = len(positions)
    nodes = [
        Node(kind, layer, position, index)
        for kind, layer, index in _components(shape)
        for position in positions
    ]
    sources = len(shape.sources)
    subsets = [
        [
            source * columns + i
            for source in range(sources)
            if source not in circuit
            for i in range(columns)
        ]
        for circuit in circuits
    ]
    patching = engine.patching(pairs, NODES, metric)
    hidden = None if progress is None else not progress
    total = len(pairs) * len(subsets)
    with tqdm(total=total, desc="patched circuits", disable=hidden, leave=False) as bar:
        effect, _ = patching.effects(nodes, subsets, None, bar.update)
    clean = patching.clean_value
    return float(clean.mean()), (clean[:, None] + effect).mean(0).tolist()


def _components(shape: GraphShape) -> Iterator[tuple[str, int, int]]:
    """Kind, layer and index of every source, in order."""
    yield "resid_pre", 0, 0
    for layer in range(shape.n_layers):
        yield from (("z", layer, head) for head in range(shape.n_heads))
        yield "mlp_out", layer, 0


def _area(values: Sequence[float], log: bool) -> float:
    places = [math.log(x) for x in FRACTIONS] if log else list(FRACTIONS)
    steps = zip(places, places[1:], values, values[1:], strict=False)
    return sum((right - left) * (a + b) / 2 for left, right, a, b in steps)
