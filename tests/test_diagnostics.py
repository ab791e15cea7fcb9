from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from atp_fast.nodes import Node
from atp_fast.patching.diagnostics import ASSUMPTIONS, bound_missed
from toy_patchers import ToyPatcher


def recorded(effects):
    """A patcher that keeps what it was asked and what it answered."""

    class Recorder(ToyPatcher):
        def __init__(self, effects):
            super().__init__(effects)
            self.seen = []

        def effects(self, subsets, pair=None):
            answer = super().effects(subsets, pair)
            self.seen += [(tuple(s), e) for s, e in zip(subsets, answer, strict=True)]
            return answer

    return Recorder(effects)


def test_bounds_equal_the_literal_welch_formulas():
    effects = np.random.default_rng(0).normal(size=30)
    patcher = recorded(effects)
    exclude = [patcher.nodes[i] for i in (3, 17, 29)]
    found = bound_missed(
        patcher, exclude=exclude, confidence=(0.9, 0.999), forwards=80, probability=0.2
    )
    assert patcher.cost == found.forwards == len(patcher.seen) == 80
    assert not {i for subset, _ in patcher.seen for i in subset} & {3, 17, 29}
    assert found.nodes == [n for n in patcher.nodes if n not in exclude]

    upper = {0.9: [], 0.999: []}
    p_values = []
    for row, node in enumerate(found.nodes):
        inside = np.array([e for subset, e in patcher.seen if node.index in subset])
        outside = np.array([e for subset, e in patcher.seen if node.index not in subset])
        a, b = inside.var(ddof=1) / len(inside), outside.var(ddof=1) / len(outside)
        error = math.sqrt(a + b)
        freedom = (a + b) ** 2 / (a**2 / (len(inside) - 1) + b**2 / (len(outside) - 1))
        difference = inside.mean() - outside.mean()
        assert found.difference[row] == pytest.approx(difference)
        assert found.standard_error[row] == pytest.approx(error)
        assert found.freedom[row] == pytest.approx(freedom)
        welch = stats.ttest_ind(inside, outside, equal_var=False)
        assert freedom == pytest.approx(welch.df)
        assert difference / error == pytest.approx(welch.statistic)
        for level, bounds in upper.items():
            bounds.append(abs(difference) + error * stats.t.ppf(level, freedom))
        p_values.append(stats.t.sf((1.5 - abs(difference)) / error, freedom))
    assert found.bounds == pytest.approx([max(upper[0.9]), max(upper[0.999])])
    assert found.upper(0.9) == pytest.approx(upper[0.9])
    assert found.p_value(1.5) == pytest.approx(max(p_values))
    assert found.worst(2, 0.9) == [found.nodes[i] for i in np.argsort(upper[0.9])[::-1][:2]]


def test_p_value_and_bound_are_inverse():
    found = bound_missed(ToyPatcher(np.random.default_rng(0).normal(size=40)), forwards=400)
    for level, bound in zip(found.confidence, found.bounds, strict=True):
        assert found.p_value(bound) == pytest.approx(1 - level)
    assert found.p_value(0.0) >= 0.5
    assert found.p_value(math.inf) == 0.0


def simulate(effects, combine=None, *, runs, forwards=120, probability=0.3):
    """Share of runs, per confidence, whose bound is at least the true largest single effect."""
    toy = ToyPatcher(effects, combine)
    alone = toy.effects([[i] for i in range(len(toy.nodes))], [0] * len(toy.nodes))
    largest = np.abs(alone).max()
    levels = (0.9, 0.99)
    bounds = np.array(
        [
            bound_missed(
                toy, confidence=levels, forwards=forwards, probability=probability, seed=seed
            ).bounds
            for seed in range(runs)
        ]
    )
    return dict(zip(levels, (bounds >= largest).mean(0), strict=True))


ADDITIVE = {
    "equal": np.ones(25),
    "mixed": np.random.default_rng(0).normal(size=25),
    # The hardest case: the bound can only be right through this one node.
    "one-large": np.concatenate([[5.0], np.random.default_rng(1).normal(size=24)]),
    "heavy-tailed": np.random.default_rng(2).standard_cauchy(25),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_coverage_is_at_least_nominal_where_effects_add_up(name):
    runs = 300
    for level, covered in simulate(ADDITIVE[name], runs=runs).items():
        spread = math.sqrt(level * (1 - level) / runs)
        assert covered >= level - 2.5 * spread


@pytest.mark.parametrize("probability", [0.4, 0.04, 0.005])
def test_interactions_break_coverage(probability):
    """Why the assumption is printed: nodes that stand in for one another hide their effects from subsets.

    25 nodes carry the same signal and one is enough: every node alone has effect 1, and so has every subset. A node
    adds something only where none of the others is in, so the difference is near (1 - p)^24, 0.000005, 0.38 and
    0.89 here, and the bound misses the true 1 always. More forwards sharpen the wrong number; only smaller subsets
    bring it closer.
    """
    toy = ToyPatcher(np.ones(25), lambda e: np.minimum(e, 1.0))
    found = bound_missed(toy, forwards=6000, probability=probability)
    assert np.median(found.difference) == pytest.approx((1 - probability) ** 24, abs=0.03)
    assert max(found.bounds) < 0.99
    if probability == 0.4:
        covered = simulate(np.ones(25), lambda e: np.minimum(e, 1.0), runs=60, probability=0.4)
        assert covered[0.9] == 0.0


def test_interactions_that_amplify_make_the_bound_loose():
    covered = simulate(np.ones(25), lambda e: e**2, runs=60)
    assert covered[0.9] == 1.0


def test_several_pairs_bound_the_mean_effect():
    # Node 0 has effects of opposite sign: mean 0, and the bound says that it may be missed.
    table = np.zeros((2, 10))
    table[:, 0] = [1.0, -1.0]
    found = bound_missed(ToyPatcher(table), forwards=4000, probability=0.2)
    assert max(found.bounds) < 0.2
    assert found.pairs == 2
    assert "not on the mean of |I|" in found.assumptions
    assert "several pairs" not in bound_missed(ToyPatcher(table[:1]), forwards=500).assumptions


def test_constant_effects_have_no_spread():
    found = bound_missed(ToyPatcher(np.zeros(12)), forwards=300)
    assert found.bounds == (0.0, 0.0, 0.0)
    assert found.p_value(1e-9) == 0.0
    assert found.p_value(0.0) == 1.0  # an effect of 0 reaches 0


def test_ten_thousand_nodes_are_quick_and_the_seed_decides():
    toy = ToyPatcher(np.random.default_rng(0).normal(size=20_000) / 100)
    first = bound_missed(toy, forwards=600)
    assert first.bounds == bound_missed(toy, forwards=600).bounds
    assert first.bounds != bound_missed(toy, forwards=600, seed=1).bounds


def test_text_carries_the_assumptions():
    found = bound_missed(ToyPatcher(np.random.default_rng(0).normal(size=40)), forwards=400)
    text = repr(found)
    assert ASSUMPTIONS in text
    assert "99.9 %: |effect| < " in text
    assert "40 unverified nodes, 400 forwards" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["assumptions"] == ASSUMPTIONS
    assert list(data["bounds"].values()) == list(found.bounds)
    assert data["worst_node"]["0.9"]["kind"] == "neuron"
    assert data["fewest_included"] == found.included.min() >= 2
    assert data["fewest_excluded"] == found.excluded.min() > found.included.max()


def test_bad_input():
    toy = ToyPatcher(np.arange(1.0, 11.0))
    for level in (0.0, 1.0, -0.1, 99.0, math.nan):
        with pytest.raises(ValueError, match="confidence must lie strictly between 0 and 1, got"):
            bound_missed(toy, confidence=(0.9, level))
    with pytest.raises(ValueError, match="confidence must hold at least one level"):
        bound_missed(toy, confidence=())
    with pytest.raises(
        ValueError, match="exclude must leave at least one of the 10 candidate nodes"
    ):
        bound_missed(toy, exclude=toy.nodes)
    with pytest.raises(ValueError, match=r"exclude must name candidate nodes, got .*layer=9"):
        bound_missed(toy, exclude=[Node("k", 9, 0, 0)])
    with pytest.raises(ValueError, match="probability must lie strictly between 0 and 1, got 0"):
        bound_missed(toy, probability=0.0)
    with pytest.raises(ValueError, match="forwards must be at least 1, got 0"):
        bound_missed(toy, forwards=0)
    with pytest.raises(ValueError, match="effects must be finite, got nan"):
        bound_missed(ToyPatcher(np.full(10, math.nan)))
    found = bound_missed(toy)
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        found.p_value(-1.0)
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\], got 11"):
        found.worst(11)


def test_too_few_samples_are_refused_before_anything_is_patched():
    toy = ToyPatcher(np.arange(1.0, 101.0))
    with pytest.raises(
        ValueError,
        match=r"at least 2 samples in the subset; Node\(.*\) has [01] of 40.*raise forwards or probability \(now 0.01\)",
    ):
        bound_missed(toy, forwards=40, probability=0.01)
    with pytest.raises(
        ValueError, match=r"2 samples out of the subset.*lower probability \(now 0.99\)"
    ):
        bound_missed(toy, forwards=40, probability=0.99)
    with pytest.raises(ValueError, match=r"has [01] of 1, 100 of 100 nodes"):
        bound_missed(toy, forwards=1, probability=0.5)
    assert toy.cost == 0
