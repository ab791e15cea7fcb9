"""Ways to decide in which order nodes are verified, and what each costs (ALGORITHMS sections 6 and 8).

Cost is counted in forward-pass equivalents: patching one subset of nodes on one pair is 1, verifying one node on all
pairs is `pairs`. The clean and the corrupted forward that every exact patch needs are counted for nobody here.
A ranking names nodes lazily, each with what the ranking has cost so far, so a new method is one small class:
a name, a setting, and `visits`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from atp_fast.patching.subsets import (
    Floats,
    Ids,
    Patcher,
    SubsetStatistics,
    check_probability,
    measure,
    sample_subsets,
)


class Visit(NamedTuple):
    """A node to verify next.

    cost: forward-pass equivalents that the ranking itself has spent so far;
    forwards: what verifying this node on all pairs still costs, less than `pairs` where the ranking has measured
    the node alone already.
    """

    node: int
    cost: float
    forwards: float


class Ranking(Protocol):
    """Names every node once, the most promising first."""

    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> str:
        """Its settings as text, such as "B=20"; empty when there are none."""
        ...

    def visits(self, patcher: Patcher, rng: np.random.Generator) -> Iterator[Visit]: ...


class Verified(NamedTuple):
    """A node and the forward-pass equivalents, ranking and verifications together, until it is verified."""

    node: int
    cost: float


def walk(ranking: Ranking, patcher: Patcher, seed: int = 0) -> Iterator[Verified]:
    """Verify nodes in a ranking's order; what verifying finds is left to the caller.

    Raises ValueError when the ranking repeats a node or names one outside the candidates.
    """
    if not len(patcher.nodes):
        raise ValueError("patcher.nodes must hold at least one node, got none")
    seen = np.zeros(len(patcher.nodes), dtype=bool)
    verifications = 0.0
    for node, cost, forwards in ranking.visits(patcher, np.random.default_rng(seed)):
        if not 0 <= node < len(seen):
            raise ValueError(f"{ranking.name} must name nodes in [0, {len(seen)}), got {node}")
        if seen[node]:
            raise ValueError(f"{ranking.name} must name every node once, got {node} again")
        seen[node] = True
        verifications += forwards
        yield Verified(node, cost + verifications)


def descending(scores: Floats, rng: np.random.Generator) -> Ids:
    """Ids by decreasing score; ties in random order, so that no method profits from how nodes are numbered."""
    return np.lexsort((rng.random(len(scores)), -scores))


@dataclass(frozen=True)
class Given:
    """A ranking by known scores, largest |score| first: AtP and its variants, or an oracle.

    scores: (nodes,); forwards: what the scores cost, for all pairs together.
    """

    name: str
    scores: Floats
    forwards: float = 0.0
    setting: str = ""

    def visits(self, patcher: Patcher, rng: np.random.Generator) -> Iterator[Visit]:
        scores = np.abs(np.asarray(self.scores, dtype=np.float64))
        if scores.shape != (len(patcher.nodes),):
            raise ValueError(f"scores must have shape ({len(patcher.nodes)},), got {scores.shape}")
        if not np.isfinite(scores).all():
            first = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(
                f"scores must be finite, got {self.scores[first]} for {patcher.nodes[first]}"
            )
        for node in descending(scores, rng):
            yield Visit(int(node), self.forwards, float(patcher.pairs))


@dataclass(frozen=True)
class Iterative:
    """Nodes in random order.

    On several pairs, the paper's alternation of two phases: every unverified node is measured on one more random
    pair; then the best of them by mean |effect| so far, one share of `pairs`, are verified on their other pairs.
    """

    name: str = "iterative"
    setting: str = ""

    def visits(self, patcher: Patcher, rng: np.random.Generator) -> Iterator[Visit]:
        pairs = patcher.pairs
        left = rng.permutation(len(patcher.nodes))
        if pairs == 1:
            yield from (Visit(int(node), 0.0, 1.0) for node in left)
            return
        order = rng.permuted(np.tile(np.arange(pairs), (len(left), 1)), axis=1)
        total = np.zeros(len(left))
        spent = 0.0
        for phase in range(pairs):
            pair = order[left, phase]
            effects = measure(patcher, [[int(node)] for node in left], [int(p) for p in pair])
            total[left] += np.abs(effects)
            spent += len(left)
            left = left[descending(total[left], rng)]
            # Rounding up spreads the nodes over the phases so that the last phase ends with none left.
            count = -(-len(left) // (pairs - phase))
            for node in left[:count]:
                yield Visit(int(node), spent, float(pairs - phase - 1))
            left = left[count:]


@dataclass(frozen=True)
class Subsampling:
    """Algorithm 1: random subsets; a node's estimate is mean(e | in) - mean(e | out).

    probability: of a node to be in a subset (the paper takes 0.01 and 0.03); subsets: how many are measured, each
    on one random pair; a tenth of the nodes when None (our choice). Unbiased where effects add up. On several pairs the
    estimate is of the mean over pairs of the signed effect. Nodes never sampled come last.
    """

    probability: float = 0.01
    subsets: int | None = None
    name: str = "subsampling"

    def __post_init__(self) -> None:
        check_probability(self.probability)
        if self.subsets is not None and self.subsets < 1:
            raise ValueError(f"subsets must be at least 1, got {self.subsets}")

    @property
    def setting(self) -> str:
        return f"p={self.probability:g} m={'nodes/10' if self.subsets is None else self.subsets}"

    def visits(self, patcher: Patcher, rng: np.random.Generator) -> Iterator[Visit]:
        nodes = len(patcher.nodes)
        subsets = max(1, nodes // 10) if self.subsets is None else self.subsets
        statistics = SubsetStatistics(nodes)
        ids = np.arange(nodes)
        # Ties are broken by their own stream: the samples then are a prefix of a longer run's.
        ties = np.random.default_rng(rng.integers(2**63))
        for sample in sample_subsets(
            rng, ids, probability=self.probability, subsets=subsets, pairs=patcher.pairs
        ):
            statistics.add(sample.subsets, measure(patcher, sample.subsets, sample.pair))
        for node in descending(np.abs(statistics.difference()), ties):
            yield Visit(int(node), float(subsets), float(patcher.pairs))


@dataclass(frozen=True)
class Blocks:
    """Algorithm 2: a random partition into blocks, each patched whole, visited by decreasing effect.

    size: nodes per block (the paper takes 2, 6, 20, 60, 250). On several pairs a block's effect is the mean over
    pairs of |effect|, every pair measured.
    """

    size: int = 20
    name: str = "blocks"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    @property
    def setting(self) -> str:
        return f"B={self.size}"

    def visits(self, patcher: Patcher, rng: np.random.Generator) -> Iterator[Visit]:
        nodes, pairs = len(patcher.nodes), patcher.pairs
        blocks = np.array_split(rng.permutation(nodes), -(-nodes // self.size))
        scores = np.abs(measure(patcher, [sorted(b.tolist()) for b in blocks])).mean(1)
        spent = float(len(blocks) * pairs)
        for block in descending(scores, rng):
            members = blocks[block]
            remaining = 0.0 if len(members) == 1 else float(pairs)
            yield from (Visit(int(node), spent, remaining) for node in members)


class _Block(NamedTuple):
    """Positions [start, stop) of the shuffled nodes."""

    start: int
    stop: int


@dataclass(frozen=True)
class Hierarchical:
    """Algorithm 3: a priority queue of blocks by |effect|; the first is split and its children measured.

    branching: children per block (the paper takes 3); levels: a top block holds branching**levels nodes (the paper
    tries 2 to 12). A block of one node is verified by its own measurement. Effects on several pairs are as in Blocks.
    lookahead: blocks split per patcher call. More than 1 measures ahead to fill a batch; what is measured for a
    block that is not reached is not counted, and order and cost are the same for every value.
    """

    branching: int = 3
    levels: int = 12
    lookahead: int = 1
    name: str = "hierarchical"

    def __post_init__(self) -> None:
        for name, least in (("branching", 2), ("levels", 1), ("lookahead", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def setting(self) -> str:
        return f"B={self.branching} levels={self.levels}"

    def _children(self, block: _Block) -> list[_Block]:
        """Parts of the largest power of branching that splits the block: only the last block is ragged."""
        size = 1
        while size * self.branching < block.stop - block.start:
            size *= self.branching
        return [
            _Block(start, min(start + size, block.stop))
            for start in range(block.start, block.stop, size)
        ]

    def visits(self, patcher: Patcher, rng: np.random.Generator) -> Iterator[Visit]:
        shuffled = rng.permutation(len(patcher.nodes))
        pairs = patcher.pairs

        def score(blocks: Sequence[_Block]) -> list[float]:
            subsets = [sorted(shuffled[b.start : b.stop].tolist()) for b in blocks]
            return [float(s) for s in np.abs(measure(patcher, subsets)).mean(1)]

        size = self.branching**self.levels
        top = [
            _Block(start, min(start + size, len(shuffled)))
            for start in range(0, len(shuffled), size)
        ]
        spent = len(top) * pairs
        queue = [(-effect, block) for effect, block in zip(score(top), top, strict=True)]
        heapq.heapify(queue)
        ahead: dict[_Block, list[tuple[float, _Block]]] = {}
        while queue:
            _, block = heapq.heappop(queue)
            if block.stop - block.start == 1:
                yield Visit(int(shuffled[block.start]), float(spent), 0.0)
                continue
            if block not in ahead:
                waiting = heapq.nsmallest(self.lookahead - 1, queue)
                split = [block, *(b for _, b in waiting if b.stop - b.start > 1 and b not in ahead)]
                families = [self._children(b) for b in split]
                scores = iter(score([child for family in families for child in family]))
                for parent, family in zip(split, families, strict=True):
                    ahead[parent] = [(-next(scores), child) for child in family]
            children = ahead.pop(block)
            spent += len(children) * pairs
            for child in children:
                heapq.heappush(queue, child)


def paper_settings(
    nodes: int, *, pairs: int = 1, limit: float | None = None, lookahead: int = 1
) -> dict[str, list[Ranking]]:
    """The paper's baselines with the settings it chooses from, for a number of candidate nodes.

    The number of Subsampling's subsets, which ALGORITHMS leaves open, is tried at 1/50, 1/20, 1/10 and 1/4 of the
    nodes. Levels above log_3(nodes) all mean one top block, so only the first of them is kept. limit: leave out
    what would spend more forward-pass equivalents than this before it names its first node.
    """
    most = float("inf") if limit is None else limit
    counts = sorted({max(1, nodes // share) for share in (50, 20, 10, 4)})
    sizes = [size for size in (2, 6, 20, 60, 250) if size <= nodes]
    levels = [n for n in range(2, 13) if n == 2 or 3 ** (n - 1) < nodes]
    return {
        "iterative": [Iterative()],
        "subsampling": [Subsampling(p, m) for p in (0.01, 0.03) for m in counts if m <= most],
        "blocks": [Blocks(size) for size in sizes if -(-nodes // size) * pairs <= most],
        "hierarchical": [
            Hierarchical(3, n, lookahead) for n in levels if -(-nodes // 3**n) * pairs <= most
        ],
    }
