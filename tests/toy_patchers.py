"""Patchers over known effects, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from atp_fast.nodes import Node


class ToyPatcher:
    """Effect of a subset: `combine` of the sum of its members' effects (the sum itself when None).

    effects: (pairs, nodes), signed.
    """

    def __init__(
        self,
        effects: np.ndarray | Sequence[Sequence[float]],
        combine: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.table = np.atleast_2d(np.asarray(effects, dtype=np.float64))
        self.nodes = [Node("neuron", 0, 0, i) for i in range(self.table.shape[1])]
        self.pairs = self.table.shape[0]
        self.cost = 0.0
        self.calls = 0
        self.combine = combine or (lambda sums: sums)

    def effects(
        self, subsets: Sequence[Sequence[int]], pair: Sequence[int] | None = None
    ) -> np.ndarray:
        self.calls += 1
        sums = np.array([self.table[:, list(subset)].sum(1) for subset in subsets])
        sums = sums.reshape(len(subsets), self.pairs)
        self.cost += sums.size if pair is None else len(subsets)
        combined = self.combine(sums)
        return combined if pair is None else combined[np.arange(len(subsets)), list(pair)]


def needle(nodes: int, at: int, pairs: int = 1) -> ToyPatcher:
    """One node of effect -3, the others small."""
    effects = np.random.default_rng(7).normal(0.0, 1e-3, (pairs, nodes))
    effects[:, at] = -3.0
    return ToyPatcher(effects)
