from __future__ import annotations

import csv
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from atp_fast.study import (
    Blocks,
    Estimate,
    Given,
    Hierarchical,
    Iterative,
    Plan,
    Store,
    Subsampling,
    Visit,
    find_top,
    irwrgm,
    oracle_cost,
    recall_cost,
    run_study,
    true_order,
    walk,
    write_study,
)
from atp_fast.study.memo import Memo
from atp_fast.study.report import recall_curves, summary
from toy_patchers import ToyPatcher

TRUTH = np.array([[0.0, -4.0, 1.0, 2.0, 0.5, -0.25], [0.0, 4.0, 1.0, -2.0, 0.5, 0.25]])


def test_oracle_costs_k_and_scores_one():
    contribution = np.abs(TRUTH).mean(0)
    found = find_top(Given("oracle", contribution), ToyPatcher(TRUTH), contribution, top=5)
    assert found.cost.tolist() == [2, 4, 6, 8, 10]
    for recall in (1.0, 0.9, 0.5):
        cost = recall_cost(found.cost, recall)
        assert (cost == oracle_cost(5, 2, recall)).all()
        assert irwrgm(cost, oracle_cost(5, 2, recall)) == 1.0


def test_verified_recall_by_hand():
    # The four largest were verified at these costs.
    found = np.array([3.0, 9.0, 5.0, 2.0])
    assert recall_cost(found).tolist() == [3, 9, 9, 9]
    # ceil(0.5 K) of the top K: 1, 1, 2, 2.
    assert recall_cost(found, 0.5).tolist() == [3, 3, 5, 3]
    assert oracle_cost(4, 3, 0.5).tolist() == [3, 3, 6, 6]
    weights = [1, 1 / 2, 1 / 3, 1 / 4]
    logs = [math.log(c / k) for c, k in zip([3, 9, 9, 9], [1, 2, 3, 4], strict=True)]
    expected = math.exp(sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights))
    assert irwrgm(recall_cost(found), oracle_cost(4)) == pytest.approx(expected, rel=1e-14)


def test_ninety_percent_of_ten_is_nine():
    # 0.9 * 10 in floating point must not become 10.
    assert oracle_cost(20, 1, 0.9)[[8, 9, 18, 19]].tolist() == [9, 9, 18, 18]
    assert oracle_cost(1000, 1, 0.9)[99::100].tolist() == [90.0 * n for n in range(1, 11)]


def test_estimates_cost_is_paid_before_the_first_node():
    contribution = np.abs(TRUTH).mean(0)
    found = find_top(Given("atp", contribution, 8.0), ToyPatcher(TRUTH), contribution, top=2)
    assert found.cost.tolist() == [10, 12]


def test_equal_contributions_are_ordered_by_number():
    assert true_order(np.array([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_a_stopped_walk_gives_lower_bounds():
    contribution = np.arange(10.0)
    calls = iter([False, False, True])
    found = find_top(
        Given("oracle", contribution),
        ToyPatcher(contribution),
        contribution,
        top=5,
        stop=lambda: next(calls),
    )
    assert found.censored
    assert found.cost.tolist() == [1, 2, 3, 3, 3]
    assert found.missed.tolist() == [False, False, False, True, True]


def test_memo_measures_each_subset_once_and_charges_always():
    toy = ToyPatcher(TRUTH)
    memo = Memo(toy, TRUTH)
    subsets = [[0, 1], [2], [1, 0], [3, 4], [0, 1]]
    expected = ToyPatcher(TRUTH).effects(subsets)
    assert (memo.effects(subsets) == expected).all()
    assert (memo.cost, memo.measured, toy.cost) == (10, 4, 4)
    assert (memo.effects(subsets) == expected).all()
    assert (memo.cost, toy.cost) == (20, 4)
    # Measured on one pair is another thing than measured on all.
    on = [1, 0, 1, 0, 0]
    assert (memo.effects(subsets, on) == ToyPatcher(TRUTH).effects(subsets, on)).all()
    assert (memo.cost, toy.cost) == (25, 7)
    for ranking in (Iterative(), Blocks(2), Hierarchical(), Subsampling(0.3, 20)):
        plain = list(walk(ranking, ToyPatcher(TRUTH), seed=1))
        assert list(walk(ranking, memo, seed=1)) == plain


class Killed(Exception):
    pass


class FakeCase:
    """A case on known effects whose estimates are the truth with noise; `life` calls, then it dies."""

    estimators = ("atp", "atp*")

    def __init__(self, task="toy", pairs=1, nodes=120, life=None, version=0):
        self.task, self.family, self.identity = task, "attention", {"version": version}
        rng = np.random.default_rng(pairs)
        self.effects = rng.standard_cauchy((pairs, nodes)) ** 3
        self.life = life
        self.calls = 0

    def spend(self):
        self.calls += 1
        if self.life is not None and self.calls > self.life:
            raise Killed

    def estimate(self, method):
        self.spend()
        noise = {"atp": 12.0, "atp*": 0.3}[method]
        contribution = np.abs(self.effects).mean(0)
        scores = contribution * np.exp(
            noise * np.random.default_rng(9).normal(size=len(contribution))
        )
        return Estimate(scores, {"atp": 4.0, "atp*": 20.0}[method], 0.5)

    def candidates(self, scores):
        assert set(scores) == set(self.estimators)
        return np.arange(1, self.effects.shape[1])

    def patcher(self, ids):
        case = self

        class Counted(ToyPatcher):
            def effects(self, subsets, pair=None):
                case.spend()
                return super().effects(subsets, pair)

        return Counted(self.effects[:, ids])


PLAN = Plan(
    seeds=2, top=40, verified=20, forwards=300, probability=0.1, diagnose=("atp*",), lookahead=4
)


def timeless(study):
    """Everything but what was measured in seconds."""

    def kept(rows):
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]

    return [kept(rows) for rows in (study.results, study.settings, study.curves, study.bounds)]


def test_study_ranks_methods_and_keeps_the_best_settings(tmp_path):
    study = run_study([FakeCase()], tmp_path, PLAN)
    rows = {row["method"]: row for row in study.results}
    assert list(rows) == [
        "oracle", "atp", "atp*", "iterative", "subsampling", "blocks", "hierarchical",
    ]  # fmt: skip
    assert rows["oracle"]["irwrgm"] == rows["oracle"]["irwrgm_90"] == 1.0
    assert [rows["oracle"][f"cost_{k}"] for k in (1, 10)] == pytest.approx([1, 10])
    assert rows["oracle"]["cost_100"] == ""
    assert rows["atp*"]["irwrgm"] < rows["atp"]["irwrgm"]
    assert rows["atp*"]["cost_1"] >= 21.0
    assert (rows["atp*"]["ranking_forwards"], rows["atp*"]["ranking_seconds"]) == (20.0, 0.5)
    assert rows["atp"]["nodes"] == 119
    for method, row in rows.items():
        tried = [r["irwrgm"] for r in study.settings if r["method"] == method]
        assert row["irwrgm"] == min(tried)
        assert row["irwrgm_lowest"] <= row["irwrgm"] <= row["irwrgm_highest"]
    assert len({row["setting"] for row in study.settings if row["method"] == "subsampling"}) > 3
    # The table's number is the one that the walk gives.
    case = FakeCase()
    patcher = case.patcher(case.candidates({"atp": 0, "atp*": 0}))
    contribution = np.abs(case.effects[0, 1:])
    scores = [
        irwrgm(
            recall_cost(find_top(Blocks(6), patcher, contribution, top=40, seed=seed).cost),
            oracle_cost(40),
        )
        for seed in range(2)
    ]
    (blocks,) = (row for row in study.settings if row["setting"] == "B=6")
    assert blocks["irwrgm"] == pytest.approx(math.sqrt(scores[0] * scores[1]))
    rest = np.argsort(-case.estimate("atp*").scores[1:])[20:]
    assert [row["confidence"] for row in study.bounds] == [0.9, 0.99, 0.999]
    assert study.bounds[0]["true_largest_missed"] == contribution[rest].max()


SMALL = Plan(
    seeds=2, top=20, verified=10, forwards=60, probability=0.2, diagnose=("atp*",), lookahead=2
)


def test_a_study_stopped_at_any_call_goes_on_where_it_was(tmp_path):
    """The tables are those of one run, and of what was measured only the piece that was stopped is measured again."""
    done = []  # finished pieces at each call

    def study(folder, life=None):
        class Watched(FakeCase):
            def spend(self):
                done.append(len(list(folder.glob("pieces/*.npz"))))
                if len(done) - 1 == life:
                    raise Killed

        done.clear()
        return run_study([Watched("one", nodes=50), Watched("two", 3, nodes=50)], folder, plan)

    few = [Blocks(9), Blocks(20)], [Hierarchical(3, 3, 2)]
    plan = replace(
        SMALL, settings=lambda *_: dict(zip(("blocks", "hierarchical"), few, strict=True))
    )

    whole = timeless(study(tmp_path / "whole"))
    calls = len(done)
    assert calls > 20 and done[-1] > 12
    for life in range(calls):
        folder = tmp_path / str(life)
        with pytest.raises(Killed):
            study(folder, life)
        again = done[:life].count(done[life])
        assert not list(folder.glob("pieces/*.tmp"))
        assert timeless(study(folder)) == whole
        assert len(done) == calls - life + again
    assert timeless(study(folder)) == whole
    assert done == []


def test_truth_in_many_pieces(tmp_path):
    """More candidates than one piece holds: 2048, 2048 and 403 of them."""
    case = FakeCase(pairs=2, nodes=4500)
    plan = Plan(seeds=1, top=60, verified=20, forwards=200, probability=0.2, settings=lambda *_: {})
    study = run_study([case], tmp_path, plan)
    assert len(list((tmp_path / "pieces").glob("toy-attention-truth-*"))) == 3
    effects = case.effects[:, 1:]
    contribution = np.abs(effects).mean(0)
    scores = case.estimate("atp*").scores[1:]
    found = find_top(Given("atp*", scores, 20.0), ToyPatcher(effects), contribution, top=60)
    (row,) = (row for row in study.results if row["method"] == "atp*")
    assert row["irwrgm"] == pytest.approx(irwrgm(recall_cost(found.cost), oracle_cost(60, 2)))
    for bound in study.bounds:
        left = np.argsort(-case.estimate(bound["method"]).scores[1:], kind="stable")[20:]
        assert bound["largest_of_all"] == contribution.max()
        assert bound["true_largest_missed"] == np.abs(effects.mean(0))[left].max()
        assert bound["true_largest_missed_contribution"] == contribution[left].max()


def blocks_of(size):
    return lambda nodes, pairs: {"blocks": [Blocks(size)]}


PLANS = {
    "seeds": {"seeds": 3},
    "top": {"top": 5},
    "verified": {"verified": 5},
    "forwards": {"forwards": 90},
    "probability": {"probability": 0.3},
    "confidence": {"confidence": (0.5,)},
    "diagnose": {"diagnose": ("atp",)},
    "limit": {"limit": 30},
    "lookahead": {"limit": 30, "lookahead": 9},
    "settings": {"settings": blocks_of(3)},
}


@pytest.mark.parametrize("name", PLANS)
def test_pieces_of_another_plan_are_not_taken(tmp_path, name):
    """What a plan changes is computed again, in the folder of the plan before it."""
    before = {"lookahead": {"limit": 30}, "settings": {"settings": blocks_of(9)}}.get(name, {})
    first, second = replace(SMALL, **before), replace(SMALL, **PLANS[name])
    old = run_study([FakeCase(pairs=2)], tmp_path / "one", first)
    new = run_study([FakeCase(pairs=2)], tmp_path / "one", second)
    fresh = run_study([FakeCase(pairs=2)], tmp_path / "two", second)
    assert timeless(new) == timeless(fresh)
    assert timeless(new) != timeless(old)


def test_pieces_of_another_task_are_not_taken(tmp_path):
    """Whose file name is the same, for what a file name cannot hold is replaced."""
    for name, other in (("a*b", "astarb"), ("a b", "a/b")):
        run_study([FakeCase(name)], tmp_path / "one", SMALL)
        case = FakeCase(other, pairs=2)
        new = run_study([case], tmp_path / "one", SMALL)
        assert timeless(new) == timeless(run_study([FakeCase(other, 2)], tmp_path / "two", SMALL))


def test_equal_effects_cost_the_oracle_nothing(tmp_path):
    case = FakeCase()
    case.effects = np.ceil(np.abs(case.effects))
    assert len(np.unique(case.effects)) < 0.7 * case.effects.size
    study = run_study([case], tmp_path, PLAN)
    rows = {row["method"]: row for row in study.results}
    assert rows["oracle"]["irwrgm_lowest"] == rows["oracle"]["irwrgm_highest"] == 1.0


def test_pieces_of_something_else_are_not_taken(tmp_path):
    run_study([FakeCase(version=0)], tmp_path, PLAN)
    other = FakeCase(version=1)
    run_study([other], tmp_path, PLAN)
    assert other.calls > 0


def test_a_limit_leaves_settings_out_and_marks_what_was_stopped(tmp_path):
    plan = Plan(seeds=1, top=40, verified=20, forwards=300, probability=0.1, limit=10, lookahead=1)
    study = run_study([FakeCase()], tmp_path, plan)
    assert not [r for r in study.settings if r["setting"] in ("B=2", "B=6", "B=3 levels=2")]
    stopped = {row["method"] for row in study.settings if row["censored_from"] != ""}
    assert stopped == {"hierarchical"}
    # Costs from there on are lower bounds, and no curve shows them.
    (row,) = (row for row in study.results if row["method"] == "hierarchical")
    curve = [c for c in study.curves if c["method"] == "hierarchical" and c["recall"] == 1.0]
    assert [c["lower_bound"] for c in curve] == [c["k"] >= row["censored_from"] for c in curve]
    path = write_study(study, tmp_path)[4]
    assert "| hierarchical | B=3 levels" in path.read_text()
    assert "≥ " in path.read_text()


def test_study_writes_tables_curves_and_summary(tmp_path, monkeypatch):
    """The picture of the curves is left out where no browser can draw it."""
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    study = run_study([FakeCase("one"), FakeCase("two", pairs=3)], tmp_path, PLAN)
    paths = write_study(study, tmp_path / "out", "A study")
    assert [path.name for path in paths] == [
        "results.csv", "settings.csv", "curves.csv", "bounds.csv", "summary.md", "curves.html",
    ]  # fmt: skip
    with paths[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row["method"] for row in study.results]
    assert float(rows[3]["irwrgm"]) == pytest.approx(study.results[3]["irwrgm"], rel=1e-5)
    text = paths[4].read_text()
    assert text.startswith("# A study\n")
    assert "## two, attention nodes" in text
    assert "a backward 2" in text
    assert "| top 20 of atp* |" in text
    for path, table in zip(paths, timeless(study), strict=False):
        with path.open(newline="") as file:
            written = list(csv.DictReader(file))
        for row, wanted in zip(written, table, strict=True):
            for name, value in wanted.items():
                number = isinstance(value, float)
                assert (float(row[name]) if number else row[name]) == (
                    pytest.approx(value, rel=1e-5) if number else str(value)
                )
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_the_summary_says_the_numbers_of_the_tables(tmp_path):
    study = run_study([FakeCase("two", pairs=3)], tmp_path, PLAN)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in summary(study, "A study", "a machine").splitlines()
        if line.startswith("|")
    ]
    header, _, *methods = lines[: 2 + len(study.results)]
    assert header[:5] == ["method", "setting", "IRWRGM", "lowest to highest", "IRWRGM 90 %"]
    assert header[5:7] == ["cost(1)", "cost(10)"]
    rows = {row["method"]: row for row in study.results}
    assert {line[0] for line in methods} == set(rows)
    assert methods[0][0] == "oracle"
    for line in methods:
        row = rows[line[0]]
        assert line[1:5] == [
            row["setting"],
            f"{row['irwrgm']:.3g}",
            f"{row['irwrgm_lowest']:.3g} to {row['irwrgm_highest']:.3g}",
            f"{row['irwrgm_90']:.3g}",
        ]
        for cell, k in zip(line[5:7], (1, 10), strict=True):
            assert float(cell.replace(",", "")) == pytest.approx(row[f"cost_{k}"], rel=6e-3)
    ranked = [rows[line[0]]["irwrgm"] for line in methods[1:]]
    assert ranked == sorted(ranked)
    header, _, bounds = lines[2 + len(study.results) :]
    assert header[1:4] == ["90 %", "99 %", "99.9 %"]
    assert bounds[0] == "top 20 of atp*"
    first = study.bounds[0]
    missed = [first["true_largest_missed"], first["true_largest_missed_contribution"]]
    assert bounds[1:] == [f"{x:.3g}" for x in [*(b["bound"] for b in study.bounds), *missed]]


def test_curves_and_rows_are_means_over_seeds(tmp_path):
    """Both recalls of one setting, walked again without a study; what its seeds measured is added up."""
    plan = replace(SMALL, seeds=3, settings=lambda *_: {"blocks": [Blocks(9)]})
    case = FakeCase(pairs=2)
    study = run_study([case], tmp_path, plan)
    effects = case.effects[:, 1:]
    contribution, measured, found = np.abs(effects).mean(0), 0.0, []
    for seed in range(3):
        memo = Memo(ToyPatcher(effects), effects)
        found.append(find_top(Blocks(9), memo, contribution, top=20, seed=seed).cost)
        measured += memo.measured
    (row,) = (row for row in study.results if row["method"] == "blocks")
    assert (row["seeds"], row["study_forwards"]) == (3, measured)
    assert {row["seeds"] for row in study.results} == {3}
    for recall in (1.0, 0.9):
        costs = np.exp(np.mean([np.log(recall_cost(cost, recall)) for cost in found], axis=0))
        curve = [c for c in study.curves if c["method"] == "blocks" and c["recall"] == recall]
        ks = [c["k"] for c in curve]
        assert (ks[0], ks[-1]) == (1, 20)
        assert [c["cost"] for c in curve] == pytest.approx([costs[k - 1] for k in ks])
        oracle = oracle_cost(20, 2, recall)
        assert [c["oracle"] for c in curve] == [oracle[k - 1] for k in ks]
        assert not any(c["lower_bound"] for c in curve)


def test_curves_are_the_table_s_as_far_as_costs_are_known(tmp_path):
    """A title is text, in which plotly reads tags."""
    title = "A <b>study</b> of a$b_{$"
    plan = replace(PLAN, limit=10, lookahead=1, seeds=1)
    study = run_study([FakeCase("one"), FakeCase("two", pairs=3)], tmp_path, plan)
    figure = recall_curves(study, title)
    assert figure.layout.title.text == "A &lt;b&gt;study&lt;/b&gt; of a$b_{$"
    assert [note.text for note in figure.layout.annotations] == ["one, attention", "two, attention"]
    assert any(row["lower_bound"] for row in study.curves)
    wanted = {}
    for row in study.curves:
        if not row["lower_bound"]:
            name = row["method"] + ("" if row["recall"] == 1.0 else ", 90 %")
            wanted.setdefault((row["task"], name), []).append((row["k"], row["cost"]))
    axes = {"x": "one", "x2": "two"}
    shown = {(axes[t.xaxis], t.name): list(zip(t.x, t.y, strict=True)) for t in figure.data}
    assert shown == wanted
    whole = {(axes[t.xaxis], t.name) for t in recall_curves(study, title, recalls=[1.0]).data}
    assert whole == {place for place in wanted if "%" not in place[1]}


def test_bad_input(tmp_path):
    contribution = np.arange(1.0, 5.0)
    toy = ToyPatcher(contribution)
    for top in (0, 5):
        with pytest.raises(ValueError, match=rf"top must be in \[1, 4\].*got {top}"):
            find_top(Iterative(), toy, contribution, top=top)
    with pytest.raises(ValueError, match="contribution must be finite and not negative, got nan"):
        find_top(Iterative(), toy, np.array([1.0, math.nan, 0.0, 0.0]), top=1)
    with pytest.raises(ValueError, match="not negative, got -1.0 for node 0"):
        find_top(Iterative(), toy, np.array([-1.0, 0.0, 0.0, 0.0]), top=1)
    with pytest.raises(ValueError, match=r"contribution must have shape \(4,\), got \(3,\)"):
        find_top(Iterative(), toy, contribution[:3], top=1)

    class Short:
        name, setting = "short", ""

        def visits(self, patcher, rng):
            yield Visit(0, 0.0, 1.0)

    with pytest.raises(ValueError, match="short must name every node, it left out 2 of the top 2"):
        find_top(Short(), toy, contribution, top=2)
    for recall in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"recall must be in \(0, 1\], got"):
            recall_cost(contribution, recall)
    with pytest.raises(ValueError, match="cost and oracle must be"):
        irwrgm(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="cost must be finite and positive"):
        irwrgm(np.array([1.0, math.nan]), np.ones(2))
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        Plan(seeds=0)
    empty = FakeCase()
    empty.effects[:] = 0.0
    with pytest.raises(ValueError, match="toy attention: no candidate has any effect"):
        run_study([empty], tmp_path, PLAN)


def test_unreadable_piece_is_named(tmp_path):
    store = Store(tmp_path)
    store.get("a/b*", {"x": 1}, lambda: {"y": np.arange(3)})
    path = store.path("a/b*", {"x": 1})
    assert path.parent == tmp_path
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"cannot read the stored piece .*{path.name}.*delete it"):
        store.get("a/b*", {"x": 1}, dict)
    shutil.rmtree(tmp_path)
