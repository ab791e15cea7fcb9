from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from atp_fast.nodes import Node
from atp_fast.patching import NodePatcher, SubsetStatistics, sample_subsets
from atp_fast.study import (
    Blocks,
    Given,
    Hierarchical,
    Iterative,
    Subsampling,
    Verified,
    Visit,
    paper_settings,
    walk,
)
from toy_patchers import ToyPatcher, needle

RANKINGS = [
    Iterative(),
    Subsampling(0.1, 100),
    Blocks(1),
    Blocks(6),
    Hierarchical(3, 2),
    Hierarchical(3, 12),
    Hierarchical(2, 3, lookahead=5),
    Given("given", np.arange(50.0), 4.0),
]


def ident(ranking: object) -> str:
    return f"{ranking.name} {ranking.setting}".strip().replace(" ", "-")


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("ranking", RANKINGS, ids=ident)
def test_every_node_is_verified_once_and_costs_add_up(ranking, pairs):
    patcher = ToyPatcher(np.random.default_rng(0).normal(size=(pairs, 50)))
    steps = list(walk(ranking, patcher, seed=3))
    assert sorted(step.node for step in steps) == list(range(50))
    costs = [step.cost for step in steps]
    assert costs == sorted(costs)
    assert costs == [s.cost for s in walk(ranking, patcher, seed=3)]
    # The patcher's own meter, and the verifications that only the walk counts.
    visits = list(ranking.visits(patcher, np.random.default_rng(3)))
    own = ranking.forwards if isinstance(ranking, Given) else patcher.cost / 3
    assert visits[-1].cost == own
    assert costs[-1] == own + sum(visit.forwards for visit in visits)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize(
    "ranking", [Subsampling(0.03, 2000), Blocks(20), Hierarchical(3, 12)], ids=ident
)
def test_a_planted_node_is_found_first(ranking, pairs):
    for at in (0, 137, 242):
        steps = list(walk(ranking, needle(243, at, pairs), seed=at))
        place = [step.node for step in steps].index(at)
        # The needle's block comes first; within it the order is random.
        assert place < (20 if isinstance(ranking, Blocks) else 1)


def test_iterative_is_a_random_order_on_one_pair():
    patcher = needle(300, 5)
    found = [
        next(step.cost for step in walk(Iterative(), patcher, seed) if step.node == 5)
        for seed in range(200)
    ]
    assert patcher.calls == 0
    assert abs(np.mean(found) - 150.5) < 4 * 300 / math.sqrt(12 * 200)


def test_iterative_on_pairs_alternates_measuring_and_verifying():
    patcher = needle(40, 11, pairs=4)
    steps = list(walk(Iterative(), patcher, seed=0))
    # One pair of each node measured, then the node's three others.
    assert steps[0] == Verified(11, 40 + 3)
    assert steps[-1].cost == 160.0
    # Phases measure 40, 30, 20 and 10 nodes.
    assert patcher.cost == 100.0


def test_blocks_cost_one_forward_per_block_and_pair_then_members():
    patcher = needle(60, 17, pairs=2)
    steps = list(walk(Blocks(6), patcher, seed=1))
    place = [step.node for step in steps].index(17)
    assert patcher.cost == 10 * 2
    assert steps[place].cost == 10 * 2 + 2 * (place + 1)
    assert place < 6


def test_blocks_measure_absolute_effects_per_pair():
    # Opposite signs on the two pairs: the mean effect is 0, the mean |effect| is 1.
    effects = np.zeros((2, 20))
    effects[:, 9] = [1.0, -1.0]
    for ranking in (Blocks(5), Hierarchical()):
        order = [step.node for step in walk(ranking, ToyPatcher(effects), seed=0)]
        assert order.index(9) < 5


def test_blocks_of_one_node_are_verified_by_their_measurement():
    patcher = needle(30, 4)
    steps = list(walk(Blocks(1), patcher))
    assert steps[0] == Verified(4, 30.0)
    assert steps[-1].cost == 30.0


@pytest.mark.parametrize(("branching", "depth"), [(2, 9), (3, 6), (4, 4)])
def test_hierarchical_finds_one_needle_at_about_b_log_n(branching, depth):
    nodes = branching**depth
    for at in (0, nodes // 2, nodes - 1):
        effects = np.zeros(nodes)
        effects[at] = 1.0
        first = next(walk(Hierarchical(branching, 12), ToyPatcher(effects), seed=at))
        assert first == Verified(at, 1 + branching * depth)


@pytest.mark.parametrize("nodes", [1, 2, 3, 10, 100, 244])
def test_hierarchical_on_ragged_sizes(nodes):
    effects = np.zeros(nodes)
    effects[-1] = 1.0
    steps = list(walk(Hierarchical(3, 12), ToyPatcher(effects), seed=2))
    assert steps[0].node == nodes - 1
    assert steps[0].cost <= 1 + 3 * math.ceil(math.log(max(nodes, 3), 3) + 1)
    assert len(steps) == nodes


def test_hierarchical_lookahead_changes_batches_only():
    effects = np.random.default_rng(1).normal(size=(2, 100)) ** 3
    one, many = ToyPatcher(effects), ToyPatcher(effects)
    assert list(walk(Hierarchical(3, 12), one)) == list(walk(Hierarchical(3, 12, 8), many))
    assert many.calls < one.calls / 2


def test_hierarchical_shares_blocks_between_levels():
    """What deeper trees measure is what shallower ones did and more, so a memory of effects serves all levels."""

    class Recorder(ToyPatcher):
        def effects(self, subsets, pair=None):
            seen.update(tuple(subset) for subset in subsets)
            return super().effects(subsets, pair)

    effects = np.random.default_rng(1).normal(size=100)
    sets = []
    for levels in (2, 3, 4, 5):
        seen: set[tuple[int, ...]] = set()
        list(walk(Hierarchical(3, levels), Recorder(effects)))
        sets.append(seen)
    assert sets[0] < sets[1] < sets[2] < sets[3]


def test_subsampling_is_unbiased_on_an_additive_toy():
    truth = np.array([3.0, -2.0, 0.5, 0.0, 0.0, -0.1, 1.0, 0.0])
    patcher = ToyPatcher(truth + 0.0)
    estimates = []
    for seed in range(600):
        statistics = SubsetStatistics(8)
        rng = np.random.default_rng(seed)
        for sample in sample_subsets(rng, np.arange(8), probability=0.3, subsets=40, pairs=1):
            statistics.add(sample.subsets, patcher.effects(sample.subsets, sample.pair))
        estimates.append(statistics.difference())
    error = np.std(estimates, axis=0) / math.sqrt(len(estimates))
    assert (np.abs(np.mean(estimates, axis=0) - truth) < 4 * error + 1e-12).all()
    assert (error < 0.05).all()


def test_subsampling_samples_pairs():
    # Truth is the mean over pairs of the signed effect.
    table = np.array([[2.0, 0.0, -1.0, 0.0], [0.0, 0.0, -1.0, 1.0]])
    statistics = SubsetStatistics(4)
    rng = np.random.default_rng(0)
    for sample in sample_subsets(rng, np.arange(4), probability=0.5, subsets=40_000, pairs=2):
        statistics.add(sample.subsets, ToyPatcher(table).effects(sample.subsets, sample.pair))
    assert np.allclose(statistics.difference(), table.mean(0), atol=0.05)


def test_nodes_that_were_never_sampled_come_last():
    truth = np.arange(1.0, 201.0)
    ranking = Subsampling(0.01, 30)
    order = [step.node for step in walk(ranking, ToyPatcher(truth), seed=0)]
    rng = np.random.default_rng(0)
    rng.integers(2**63)
    sampled = np.zeros(200, dtype=bool)
    for sample in sample_subsets(rng, np.arange(200), probability=0.01, subsets=30, pairs=1):
        sampled[np.concatenate(sample.subsets)] = True
    assert 0 < sampled.sum() < 200
    assert sampled[order[: sampled.sum()]].all()


def test_samples_are_a_stream():
    def drawn(subsets, chunk):
        chunks = sample_subsets(
            np.random.default_rng(5),
            np.arange(100, 200),
            probability=0.2,
            subsets=subsets,
            pairs=7,
            chunk=chunk,
        )
        return [(tuple(s), p) for c in chunks for s, p in zip(c.subsets, c.pair, strict=True)]

    whole = drawn(30, 256)
    assert drawn(30, 4) == whole
    assert drawn(11, 4) == whole[:11]
    assert all(100 <= i < 200 for subset, _ in whole for i in subset)
    assert {p for _, p in whole} <= set(range(7))


def test_membership_is_bernoulli():
    chunks = sample_subsets(
        np.random.default_rng(0), np.arange(20), probability=0.3, subsets=20_000, pairs=1
    )
    inside = np.zeros((20_000, 20))
    for row, subset in enumerate(s for c in chunks for s in c.subsets):
        inside[row, subset] = 1.0
    assert np.allclose(inside.mean(0), 0.3, atol=5 * math.sqrt(0.21 / 20_000))
    covariance = np.cov(inside.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 5 * 0.21 / math.sqrt(20_000)


def test_subset_statistics_equal_the_plain_formulas():
    rng = np.random.default_rng(0)
    members = rng.random((90, 12)) < 0.4
    # A large offset would destroy sums of plain squares.
    effects = rng.normal(size=90) + 1e6
    statistics = SubsetStatistics(12)
    for start in range(0, 90, 13):
        rows = slice(start, start + 13)
        statistics.add([np.flatnonzero(m) for m in members[rows]], effects[rows])
    inside, outside = statistics.means()
    spread_in, spread_out = statistics.variances()
    for node in range(12):
        yes, no = effects[members[:, node]], effects[~members[:, node]]
        assert (statistics.included[node], statistics.excluded[node]) == (len(yes), len(no))
        assert inside[node] == pytest.approx(yes.mean(), rel=1e-14)
        assert outside[node] == pytest.approx(no.mean(), rel=1e-14)
        assert spread_in[node] == pytest.approx(yes.var(ddof=1), rel=1e-9)
        assert spread_out[node] == pytest.approx(no.var(ddof=1), rel=1e-9)
        assert statistics.difference()[node] == pytest.approx(yes.mean() - no.mean(), abs=1e-9)


def test_given_scores_rank_by_magnitude_and_ties_are_random():
    patcher = ToyPatcher(np.zeros((2, 6)))
    scores = np.array([0.1, -5.0, 0.0, 2.0, 0.0, 0.0])
    steps = list(walk(Given("g", scores, 7.0), patcher))
    assert [s.node for s in steps[:3]] == [1, 3, 0]
    assert [s.cost for s in steps] == [9, 11, 13, 15, 17, 19]
    tails = {
        tuple(s.node for s in walk(Given("g", scores), patcher, seed))[3:] for seed in range(60)
    }
    assert tails == set(itertools.permutations((2, 4, 5)))


def test_paper_settings_fit_the_number_of_nodes():
    settings = paper_settings(10_000)
    assert [b.size for b in settings["blocks"]] == [2, 6, 20, 60, 250]
    assert {s.probability for s in settings["subsampling"]} == {0.01, 0.03}
    assert [h.levels for h in settings["hierarchical"]] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert all(h.branching == 3 for h in settings["hierarchical"])
    assert [h.levels for h in paper_settings(10**6)["hierarchical"]] == list(range(2, 13))
    assert [b.size for b in paper_settings(10)["blocks"]] == [2, 6]


def test_a_limit_is_in_forwards_on_all_pairs():
    """1000 nodes on 4 pairs and 100 forwards: at most 25 blocks, or 100 subsets of one pair each."""
    settings = paper_settings(1000, pairs=4, limit=100, lookahead=7)
    assert [b.size for b in settings["blocks"]] == [60, 250]
    assert [h.levels for h in settings["hierarchical"]] == [4, 5, 6, 7]
    assert {h.lookahead for h in settings["hierarchical"]} == {7}
    assert [s.subsets for s in settings["subsampling"]] == [20, 50, 100] * 2
    assert settings["iterative"] == [Iterative()]


class FakePatching:
    """What NodePatcher asks of the pairs' runs."""

    pairs = (0, 0)

    def __init__(self):
        self.asked = []

    def effects(self, nodes, subsets, pair_index):
        self.asked.append(nodes)
        sums = torch.tensor([float(sum(nodes[i].index for i in subset)) for subset in subsets])
        effect = 10.0 * torch.arange(len(self.pairs))[:, None] * (sums != 0) + sums
        return effect, None


def test_node_patcher_maps_ids_and_keeps_shapes():
    nodes = [Node("q", 0, 0, 3), Node("q", 0, 0, 1), Node("k", 0, 0, 4)]
    patching = FakePatching()
    patcher = NodePatcher(patching, nodes)
    assert patcher.effects([[2, 0], [], np.array([2])]).tolist() == [[7, 17], [0, 0], [4, 14]]
    assert patcher.cost == 6
    assert patcher.effects([[1], [], [0]], [1, 0, 0]).tolist() == [11, 0, 3]
    assert patcher.cost == 9
    # A call names only the nodes that it patches.
    assert patching.asked == [[nodes[0], nodes[2]], nodes[:2]]


class Broken:
    name = "broken"
    setting = ""

    def __init__(self, nodes):
        self.nodes = nodes

    def visits(self, patcher, rng):
        yield from (Visit(node, 0.0, 1.0) for node in self.nodes)


def test_bad_input():
    toy = ToyPatcher([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="broken must name every node once, got 1 again"):
        list(walk(Broken([0, 1, 1]), toy))
    with pytest.raises(ValueError, match=r"broken must name nodes in \[0, 3\), got 3"):
        list(walk(Broken([3]), toy))
    with pytest.raises(ValueError, match="must hold at least one node, got none"):
        list(walk(Iterative(), ToyPatcher(np.zeros((1, 0)))))
    with pytest.raises(ValueError, match=r"effects must be finite, got nan .* on pair 1"):
        list(walk(Blocks(2), ToyPatcher([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]])))
    with pytest.raises(ValueError, match="effects must be finite, got inf"):
        list(walk(Subsampling(0.9, 5), ToyPatcher([[1.0, math.inf, 3.0]])))
    with pytest.raises(ValueError, match=r"scores must have shape \(3,\), got \(2,\)"):
        list(walk(Given("g", np.ones(2)), toy))
    with pytest.raises(ValueError, match=r"scores must be finite, got nan for Node\(kind='neuron'"):
        list(walk(Given("g", np.array([1.0, math.nan, 0.0])), toy))
    with pytest.raises(ValueError, match="probability must lie strictly between 0 and 1, got 1"):
        Subsampling(1.0)
    with pytest.raises(ValueError, match="subsets must be at least 1, got 0"):
        Subsampling(0.1, 0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Blocks(0)
    with pytest.raises(ValueError, match="branching must be at least 2, got 1"):
        Hierarchical(1)
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        Hierarchical(3, 0)

    class Misshapen(ToyPatcher):
        def effects(self, subsets, pair=None):
            return super().effects(subsets, pair).T

    with pytest.raises(ValueError, match=r"effects must have shape \(2, 1\), got \(1, 2\)"):
        list(walk(Blocks(2), Misshapen([[1.0, 2.0, 3.0]])))
