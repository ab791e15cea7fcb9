"""Exact effects of sets of nodes: who measures them, which random sets are drawn, and their statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from atp_fast.nodes import Node, NodeSpace
from atp_fast.patching.sessions import Patching
from atp_fast.prompts.pairs import PromptPairs

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Subset = Sequence[int] | Ids

CHUNK = 256  # subsets per patcher call where their number is not given by the method


class Patcher(Protocol):
    """Exact effects of patching sets of candidate nodes; a node's id is its index into `nodes`."""

    @property
    def nodes(self) -> Sequence[Node]: ...

    @property
    def pairs(self) -> int: ...

    @property
    def cost(self) -> float:
        """Forward-pass equivalents charged so far: 1 per subset and pair measured."""
        ...

    def effects(self, subsets: Sequence[Subset], pair: Sequence[int] | None = None) -> Floats:
        """Signed effect of patching each whole subset at once: (subsets, pairs), or with pair, which gives the one
        pair that each subset is measured on, (subsets,)."""
        ...


def moving_ids(space: NodeSpace, pairs: PromptPairs) -> Ids:
    """Flat numbers, ascending, of the nodes whose patching can change anything.

    That is at positions from the first differing token of some pair to its last, or in spans with such a position: all
    others have effect 0 exactly.
    """
    live = pairs.moving.any(0).cpu().numpy()
    counts = [n for kind in space.kinds for n in space.in_layers(kind)]
    found: Ids = np.flatnonzero(np.concatenate([np.repeat(live, n) for n in counts]))
    return found


class NodePatcher:
    """The patcher of a real model: candidate nodes on pairs whose two runs are made and kept.

    patching: the pairs' runs, with the candidates' kinds. A pair without a token at a node's position has effect 0 there.
    """

    def __init__(self, patching: Patching, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self.pairs = len(patching.pairs)
        self.cost = 0.0
        self._patching = patching

    def effects(self, subsets: Sequence[Subset], pair: Sequence[int] | None = None) -> Floats:
        """As Patcher.effects; an empty subset changes nothing and has effect 0, though it is charged like any other."""
        lists = [[int(i) for i in subset] for subset in subsets]
        used = sorted({i for subset in lists for i in subset})
        number = {i: row for row, i in enumerate(used)}
        index = None if pair is None else torch.tensor([int(p) for p in pair], dtype=torch.int64)
        effect, _ = self._patching.effects(
            [self.nodes[i] for i in used],
            [[number[i] for i in subset] for subset in lists],
            index,
        )
        if index is not None:
            effect = effect[index, torch.arange(len(lists))]
        self.cost += float(effect.numel())
        found: Floats = effect.cpu().double().numpy()
        return found if index is not None else found.T


def measure(
    patcher: Patcher, subsets: Sequence[Subset], pair: Sequence[int] | None = None
) -> Floats:
    """`patcher.effects`, checked: float64 of the promised shape; ValueError names what is not finite."""
    effects = np.asarray(patcher.effects(subsets, pair), dtype=np.float64)
    shape = (len(subsets),) if pair is not None else (len(subsets), patcher.pairs)
    if effects.shape != shape:
        raise ValueError(f"effects must have shape {shape}, got {effects.shape}")
    if not np.isfinite(effects).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(effects))[0])
        on = where[1] if pair is None else int(pair[where[0]])
        subset = [patcher.nodes[i] for i in list(subsets[where[0]])[:3]]
        raise ValueError(
            f"effects must be finite, got {effects[where]} for the subset of {len(subsets[where[0]])} nodes "
            f"starting with {subset} on pair {on}"
        )
    return effects


class SubsetStatistics:
    """Per node: count, mean and variance of subset effects, with the node in the subset and with it out.

    Sums are taken about the mean of the first chunk, so that a large common offset costs no precision.
    """

    def __init__(self, nodes: int) -> None:
        self.samples = 0
        self.included = np.zeros(nodes, dtype=np.int64)
        self._sum = np.zeros(nodes)
        self._squares = np.zeros(nodes)
        self._total = 0.0
        self._total_squares = 0.0
        self._shift = 0.0

    def add(self, subsets: Sequence[Ids], effects: Floats) -> None:
        """subsets: ids without repetition; effects: (subsets,)."""
        if not subsets:
            return
        if self.samples == 0:
            self._shift = float(effects.mean())
        e = effects - self._shift
        members = np.concatenate(subsets).astype(np.int64, copy=False)
        repeated = np.repeat(e, [len(subset) for subset in subsets])
        nodes = len(self.included)
        self.included += np.bincount(members, minlength=nodes)
        self._sum += np.bincount(members, weights=repeated, minlength=nodes)
        self._squares += np.bincount(members, weights=repeated**2, minlength=nodes)
        self.samples += len(subsets)
        self._total += float(e.sum())
        self._total_squares += float((e**2).sum())

    @property
    def excluded(self) -> Ids:
        return self.samples - self.included

    def means(self) -> tuple[Floats, Floats]:
        """Mean effect with each node in and with it out, (nodes,) each; NaN without samples."""
        with np.errstate(invalid="ignore", divide="ignore"):
            inside = self._sum / self.included
            outside = (self._total - self._sum) / self.excluded
        return inside + self._shift, outside + self._shift

    def variances(self) -> tuple[Floats, Floats]:
        """Unbiased variances with each node in and with it out, (nodes,) each; NaN below two samples."""

        def variance(count: Ids, total: Floats, squares: Floats) -> Floats:
            with np.errstate(invalid="ignore", divide="ignore"):
                # Rounding can leave a constant group a little below zero.
                found = np.maximum(squares - total**2 / count, 0.0) / (count - 1)
            return np.where(count < 2, np.nan, found)

        rest, rest_squares = self._total - self._sum, self._total_squares - self._squares
        return (
            variance(self.included, self._sum, self._squares),
            variance(self.excluded, rest, rest_squares),
        )

    def difference(self) -> Floats:
        """Algorithm 1's estimate mean(e | in) - mean(e | out), (nodes,); 0 where a group is empty."""
        inside, outside = self.means()
        found = inside - outside
        return np.where((self.included == 0) | (self.excluded == 0), 0.0, found)


class Sample(NamedTuple):
    subsets: list[Ids]
    pair: list[int]


def check_probability(probability: float) -> None:
    if not 0.0 < probability < 1.0:
        raise ValueError(f"probability must lie strictly between 0 and 1, got {probability}")


def sample_subsets(
    rng: np.random.Generator,
    ids: Ids,
    *,
    probability: float,
    subsets: int,
    pairs: int,
    chunk: int = CHUNK,
) -> Iterator[Sample]:
    """Independent subsets of ids, each id in with the given probability, and for each a uniform pair.

    A stream in chunks: neither the chunk size nor the number of subsets changes the first ones.
    """
    for start in range(0, subsets, chunk):
        sample = Sample([], [])
        for _ in range(min(chunk, subsets - start)):
            size = rng.binomial(len(ids), probability)
            chosen = rng.choice(len(ids), size=size, replace=False, shuffle=False)
            sample.subsets.append(ids[np.sort(chosen)])
            sample.pair.append(int(rng.integers(pairs)))
        yield sample
