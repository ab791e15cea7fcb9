"""How large the effect of an unverified node could still be (ALGORITHMS section 7).

Random subsets of the unverified nodes are patched. With mean+, s+^2, c+ the mean, variance and count of their effects
where node n is in, and mean-, s-^2, c- where it is out, a one-sided Welch test bounds |I(n)|:

    s_W^2 = s+^2/c+ + s-^2/c-,   nu = s_W^4 / ((s+^2/c+)^2/(c+ - 1) + (s-^2/c-)^2/(c- - 1)),
    theta = max_n ( |mean+ - mean-| + s_W t_{nu, confidence} ).

"Some node has |I| >= theta" is a union of nulls: its p-value is the largest of the nodes', with no correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from atp_fast.extras import require
from atp_fast.nodes import Node
from atp_fast.patching.subsets import (
    Floats,
    Ids,
    Patcher,
    Sample,
    SubsetStatistics,
    check_probability,
    measure,
    sample_subsets,
)

ASSUMPTIONS = (
    "Assumes that the effects of patching several nodes at once nearly add up, and that subset effects are near "
    "normal within each group. Where nodes hide one another's effects (saturation, self-repair), the bound can be too "
    "low."
)
SEVERAL_PAIRS = (
    " With several pairs each subset is measured on one random pair, and the bound is on |mean over pairs of I|, "
    "not on the mean of |I|: effects of opposite signs on different pairs cancel."
)


def _welch(statistics: SubsetStatistics) -> tuple[Floats, Floats]:
    """Standard error s_W and degrees of freedom nu of every node's difference, (nodes,) each.

    Groups without any variance leave s_W = 0 and nu = the smaller group's, which then does not matter.
    """
    inside, outside = statistics.variances()
    c_in, c_out = statistics.included, statistics.excluded
    a, b = inside / c_in, outside / c_out
    with np.errstate(invalid="ignore", divide="ignore"):
        # Divided by a + b first: the squares of tiny variances would underflow.
        share = a / (a + b)
        freedom = 1.0 / (share**2 / (c_in - 1) + (1.0 - share) ** 2 / (c_out - 1))
    return np.sqrt(a + b), np.where(a + b > 0, freedom, np.minimum(c_in, c_out) - 1.0)


@dataclass(frozen=True, repr=False)
class MissedBound:
    """Upper bounds on the largest effect among unverified nodes.

    bounds: one per confidence, in the metric's units; nodes: the unverified nodes; difference (signed estimate of I),
    standard_error (s_W), freedom (nu), included and excluded (samples with the node in and out): (nodes,) arrays.
    forwards: subsets measured, one forward-pass equivalent each; probability of a node to be in a subset; pairs:
    how many the subsets were spread over.
    """

    confidence: tuple[float, ...]
    nodes: Sequence[Node]
    difference: Floats
    standard_error: Floats
    freedom: Floats
    included: Ids
    excluded: Ids
    forwards: int
    probability: float
    seed: int
    pairs: int
    assumptions: str

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        return tuple(float(self.upper(level).max()) for level in self.confidence)

    def upper(self, confidence: float) -> Floats:
        """Every node's own upper bound |difference| + s_W t, (nodes,); their maximum is the bound."""
        _check_confidence((confidence,))
        quantile = np.asarray(_special().stdtrit(self.freedom, confidence), dtype=np.float64)
        return np.abs(self.difference) + self.standard_error * quantile

    def p_value(self, threshold: float) -> float:
        """p-value of "some unverified node has |I| >= threshold": small means that none has."""
        if not threshold >= 0.0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        gap = threshold - np.abs(self.difference)
        with np.errstate(invalid="ignore", divide="ignore"):
            t = gap / self.standard_error
        # No spread at all: the difference is the effect.
        t = np.where(self.standard_error > 0, t, np.where(gap > 0, np.inf, -np.inf))
        return float(np.max(_special().stdtr(self.freedom, -t)))

    def worst(self, k: int = 1, confidence: float | None = None) -> list[Node]:
        """The k nodes with the largest upper bounds, at the highest confidence unless one is given."""
        if not 1 <= k <= len(self.nodes):
            raise ValueError(f"k must be in [1, {len(self.nodes)}], got {k}")
        upper = self.upper(max(self.confidence) if confidence is None else confidence)
        return [self.nodes[int(i)] for i in np.argsort(-upper, kind="stable")[:k]]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-node arrays, ready for JSON, and the worst node at each confidence."""
        return {
            "bounds": {f"{c:g}": b for c, b in zip(self.confidence, self.bounds, strict=True)},
            "worst_node": {f"{c:g}": self.worst(1, c)[0]._asdict() for c in self.confidence},
            "nodes": len(self.nodes),
            "forwards": self.forwards,
            "probability": self.probability,
            "seed": self.seed,
            "pairs": self.pairs,
            "fewest_included": int(self.included.min()),
            "fewest_excluded": int(self.excluded.min()),
            "assumptions": self.assumptions,
        }

    def __repr__(self) -> str:
        numbers = ", ".join(
            f"{100 * c:g} %: |effect| < {b:.4g}"
            for c, b in zip(self.confidence, self.bounds, strict=True)
        )
        return (
            f"MissedBound({numbers}; {len(self.nodes)} unverified nodes, {self.forwards} forwards, "
            f"p = {self.probability:g}, {self.pairs} pair{'s' if self.pairs > 1 else ''})\n{self.assumptions}"
        )


def _special() -> Any:
    """scipy.special, which holds Student's t distribution (stdtr) and its quantiles (stdtrit)."""
    return require("scipy.special", "the bound on missed effects")


def _check_confidence(confidence: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(float(c) for c in confidence)
    if not levels:
        raise ValueError("confidence must hold at least one level such as 0.99, got none")
    for level in levels:
        if not 0.0 < level < 1.0:
            raise ValueError(f"confidence must lie strictly between 0 and 1, got {level:g}")
    return levels


def _check_counts(statistics: SubsetStatistics, nodes: Sequence[Node], probability: float) -> None:
    """ValueError when a node has fewer than two samples with it in, or with it out."""
    groups = (
        ("in", statistics.included, f"raise forwards or probability (now {probability:g})"),
        (
            "out of",
            statistics.excluded,
            f"raise forwards or lower probability (now {probability:g})",
        ),
    )
    for word, counts, remedy in groups:
        few = np.flatnonzero(counts < 2)
        if len(few):
            raise ValueError(
                f"every node needs at least 2 samples {word} the subset; {nodes[int(few[0])]} has "
                f"{counts[few[0]]} of {statistics.samples}, {len(few)} of {len(nodes)} nodes have too few: {remedy}"
            )


def _rest(patcher: Patcher, exclude: Iterable[Node]) -> Ids:
    """Ids of the candidates that are not excluded."""
    number = {node: i for i, node in enumerate(patcher.nodes)}
    keep = np.ones(len(number), dtype=bool)
    for node in exclude:
        if node not in number:
            raise ValueError(
                f"exclude must name candidate nodes, got {node}, which is not one of them"
            )
        keep[number[node]] = False
    rest = np.flatnonzero(keep)
    if not len(rest):
        raise ValueError(
            f"exclude must leave at least one of the {len(keep)} candidate nodes, got all of them: nothing can "
            "have been missed"
        )
    return rest


def bound_missed(
    patcher: Patcher,
    *,
    exclude: Iterable[Node] = (),
    confidence: Sequence[float] = (0.9, 0.99, 0.999),
    forwards: int = 1000,
    probability: float = 0.03,
    seed: int = 0,
    progress: bool | None = False,
) -> MissedBound:
    """Upper bounds on the largest |effect| among the candidates that were not verified.

    exclude: the verified nodes; forwards: how many subsets of the rest are measured, each on one random pair;
    probability: of each node to be in a subset; progress: a bar, None for one on terminals only.
    Raises ValueError for a confidence or probability outside (0, 1), for an empty rest, for effects that are not
    finite and, before anything is patched, when the plan leaves a node fewer than two samples in or out.
    """
    levels = _check_confidence(confidence)
    check_probability(probability)
    if forwards < 1:
        raise ValueError(f"forwards must be at least 1, got {forwards}")
    _special()
    ids = _rest(patcher, exclude)
    nodes = [patcher.nodes[int(i)] for i in ids]

    def samples() -> Iterator[Sample]:
        rng, positions = np.random.default_rng(seed), np.arange(len(ids))
        return sample_subsets(
            rng, positions, probability=probability, subsets=forwards, pairs=patcher.pairs
        )

    counts = SubsetStatistics(len(ids))
    for sample in samples():
        counts.add(sample.subsets, np.zeros(len(sample.subsets)))
    _check_counts(counts, nodes, probability)

    statistics = SubsetStatistics(len(ids))
    disable = None if progress is None else not progress
    with tqdm(total=forwards, unit="forward", desc="diagnostics", disable=disable) as bar:
        for sample in samples():
            effects = measure(patcher, [ids[subset] for subset in sample.subsets], sample.pair)
            statistics.add(sample.subsets, effects)
            bar.update(len(sample.subsets))

    error, freedom = _welch(statistics)
    return MissedBound(
        confidence=levels,
        nodes=nodes,
        difference=statistics.difference(),
        standard_error=error,
        freedom=freedom,
        included=statistics.included,
        excluded=statistics.excluded,
        forwards=forwards,
        probability=probability,
        seed=seed,
        pairs=patcher.pairs,
        assumptions=ASSUMPTIONS + (SEVERAL_PAIRS if patcher.pairs > 1 else ""),
    )
