"""Cost of verified recall and its one-number summary (ALGORITHMS section 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atp_fast.patching.subsets import Floats, Ids, Patcher
from atp_fast.study.rankings import Ranking, walk


def true_order(contribution: Floats) -> Ids:
    """Ids by decreasing contribution (nodes,); equal ones by id, so that "the top K" is one set."""
    return np.argsort(-contribution, kind="stable")


class Found(NamedTuple):
    """When a ranking verified each of the truly largest nodes.

    cost: (top,), forward-pass equivalents until the i-th largest node was verified; missed: (top,) bool, True where the
    walk was stopped before that, and the cost is a lower bound.
    """

    cost: Floats
    missed: NDArray[np.bool_]

    @property
    def censored(self) -> bool:
        return bool(self.missed.any())


def find_top(
    ranking: Ranking,
    patcher: Patcher,
    contribution: Floats,
    *,
    top: int,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Found:
    """Walk down a ranking until the `top` nodes of largest contribution (nodes,) are verified.

    stop: asked after every node, ends the walk early. Raises ValueError when top is not in [1, nodes], when contributions
    are negative or not finite, and when the ranking ends before it has named all of them.
    """
    check_contribution(contribution, len(patcher.nodes))
    check_top(top, len(contribution))
    place = np.full(len(contribution), -1)
    place[true_order(contribution)[:top]] = np.arange(top)
    cost = np.full(top, np.nan)
    missing = top
    for node, spent in walk(ranking, patcher, seed):
        if place[node] >= 0:
            cost[place[node]] = spent
            missing -= 1
        if not missing or (stop is not None and stop()):
            missed = np.isnan(cost)
            return Found(np.where(missed, spent, cost), missed)
    raise ValueError(f"{ranking.name} must name every node, it left out {missing} of the top {top}")


def check_contribution(contribution: Floats, nodes: int) -> None:
    if contribution.shape != (nodes,):
        raise ValueError(f"contribution must have shape ({nodes},), got {contribution.shape}")
    bad = np.flatnonzero(~(np.isfinite(contribution) & (contribution >= 0)))
    if len(bad):
        raise ValueError(
            f"contribution must be finite and not negative, got {contribution[bad[0]]} for node {bad[0]}"
        )


def check_top(top: int, nodes: int) -> None:
    if not 1 <= top <= nodes:
        raise ValueError(f"top must be in [1, {nodes}], the number of nodes, got {top}")


def check_recall(recall: float) -> None:
    if not 0.0 < recall <= 1.0:
        raise ValueError(f"recall must be in (0, 1], got {recall}")


def _needed(top: int, recall: float) -> Ids:
    """For K = 1..top, how many of the top K must be verified; rounded up, but not by rounding error."""
    needed: Ids = np.ceil(recall * np.arange(1, top + 1) - 1e-9).astype(np.int64)
    return needed


def recall_cost(found: Floats, recall: float = 1.0) -> Floats:
    """cost(K) for K = 1..top, (top,): until ceil(recall K) of the K largest nodes are verified.

    found: (top,), cost at which the i-th largest node was verified.
    """
    check_recall(recall)
    if recall == 1.0:
        return np.maximum.accumulate(found)
    cost = np.empty_like(found)
    for k, needed in enumerate(_needed(len(found), recall), start=1):
        cost[k - 1] = np.partition(found[:k], needed - 1)[needed - 1]
    return cost


def oracle_cost(top: int, pairs: int = 1, recall: float = 1.0) -> Floats:
    """cost(K) of verifying in the true order, (top,): `pairs` forwards for each node that the recall needs."""
    check_recall(recall)
    return _needed(top, recall).astype(np.float64) * pairs


def irwrgm(cost: Floats, oracle: Floats) -> float:
    """Inverse-rank-weighted relative geometric mean exp( sum_K ln(cost(K)/oracle(K))/K / sum_K 1/K ); 1 = oracle.

    cost, oracle: (top,), positive, of the same recall.
    """
    if cost.shape != oracle.shape or cost.ndim != 1 or not len(cost):
        raise ValueError(
            f"cost and oracle must be (top,) with top at least 1, got {cost.shape} and {oracle.shape}"
        )
    if not (np.isfinite(cost).all() and (cost > 0).all()):
        raise ValueError("cost must be finite and positive")
    weights = 1.0 / np.arange(1, len(cost) + 1)
    return float(np.exp((weights * np.log(cost / oracle)).sum() / weights.sum()))
