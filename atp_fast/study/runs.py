"""The method study: ground truth, all rankings, and the bound on what is missed, for many cases, resumable.

A case is one task and one family of nodes. Its ground truth is the exact effect of every candidate node. Verifying a node
then costs nothing to simulate; the subsets that baselines and diagnostics measure are really patched, each once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from atp_fast.patching.diagnostics import bound_missed
from atp_fast.patching.subsets import Floats, Ids, Patcher, measure
from atp_fast.study.curves import Found, find_top, irwrgm, oracle_cost, recall_cost, true_order
from atp_fast.study.memo import Memo
from atp_fast.study.rankings import Given, Ranking, paper_settings
from atp_fast.study.store import Piece, Store

RECALLS = (1.0, 0.9)
MARKS = (1, 10, 100, 1000)


class Estimate(NamedTuple):
    """Scores of every node of a family, (nodes,), and what they cost: forward-pass equivalents and seconds."""

    scores: Floats
    forwards: float
    seconds: float


class Case(Protocol):
    """One task and one family of nodes: where estimates and exact effects come from."""

    @property
    def task(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything the numbers depend on, JSON-able: model, prompts, metric, direction, ..."""
        ...

    @property
    def estimators(self) -> Sequence[str]: ...

    def estimate(self, method: str) -> Estimate: ...

    def candidates(self, scores: Mapping[str, Floats]) -> Ids:
        """Ids, among the family's nodes, of those the study is about, given every estimator's scores."""
        ...

    def patcher(self, ids: Ids) -> Patcher: ...


@dataclass(frozen=True)
class Plan:
    """What a study does with each case.

    seeds: runs of each baseline; top: the largest K; limit: forward-pass equivalents that one run of one setting may
    really measure, None for no limit: a run that reaches it is stopped, a setting that would reach it before its
    first node is left out;
    diagnose: estimators after which the bound is computed; verified: how many of the estimator's top nodes are
    taken as verified; forwards, probability: the bound's sampling plan; confidence: its levels;
    settings: candidates and pairs -> baselines with their settings, the paper's by default.
    """

    seeds: int = 5
    top: int = 1000
    limit: float | None = None
    diagnose: tuple[str, ...] = ("atp", "atp*")
    verified: int = 100
    forwards: int = 2000
    probability: float = 0.01
    confidence: tuple[float, ...] = (0.9, 0.99, 0.999)
    lookahead: int = 16
    settings: Callable[[int, int], dict[str, list[Ranking]]] | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "top", "verified", "forwards", "lookahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def baselines(self, nodes: int, pairs: int) -> dict[str, list[Ranking]]:
        if self.settings is not None:
            return self.settings(nodes, pairs)
        return paper_settings(nodes, pairs=pairs, limit=self.limit, lookahead=self.lookahead)


@dataclass
class Study:
    """Tables of a study, one dict per row.

    results: each method's best setting; settings: all of them; curves: cost(K) of the best settings;
    bounds: the bound on missed effects beside the true largest one.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    bounds: list[dict[str, Any]] = field(default_factory=list)

    def extend(self, other: Study) -> None:
        """Add another study's rows, such as those of cases with another plan."""
        self.results += other.results
        self.settings += other.settings
        self.curves += other.curves
        self.bounds += other.bounds


def run_study(
    cases: Iterable[Case],
    folder: str | Path,
    plan: Plan | None = None,
    progress: bool | None = None,
) -> Study:
    """Run every case, keeping each finished piece under folder/pieces; started again, it goes on from there.

    progress: a bar of pieces, None for one on terminals only.
    """
    plan = plan or Plan()
    store = Store(Path(folder) / "pieces")
    study = Study()
    disable = None if progress is None else not progress
    for case in cases:
        with tqdm(desc=f"{case.task} {case.family}", unit="piece", disable=disable) as bar:
            _Run(case, store, plan, bar).into(study)
    return study


class _Run:
    """One case of a study."""

    def __init__(self, case: Case, store: Store, plan: Plan, bar: tqdm[Any]) -> None:
        self.case = case
        self.store = store
        self.plan = plan
        self.bar = bar
        self.estimates = {name: self._estimate(name) for name in case.estimators}
        self.ids = case.candidates({name: e.scores for name, e in self.estimates.items()})
        self.patcher = case.patcher(self.ids)
        self.pairs = self.patcher.pairs
        self.about = {"candidates": hashlib.sha256(self.ids.astype(np.int64).tobytes()).hexdigest()}
        self.truth, self.seconds = self._truth()
        self.contribution = np.abs(self.truth).mean(0)
        self.top = min(plan.top, len(self.ids), int((self.contribution > 0).sum()))
        if not self.top:
            raise ValueError(
                f"{case.task} {case.family}: no candidate has any effect, so there is nothing to find"
            )

    def piece(self, name: str, about: Mapping[str, Any], compute: Callable[[], Piece]) -> Piece:
        identity = {
            "task": self.case.task,
            "family": self.case.family,
            **self.case.identity,
            **about,
        }
        found = self.store.get(f"{self.case.task}-{self.case.family}-{name}", identity, compute)
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update()
        return found

    def _estimate(self, method: str) -> Estimate:
        def compute() -> Piece:
            found = self.case.estimate(method)
            return {
                "scores": found.scores,
                "forwards": np.array(found.forwards),
                "seconds": np.array(found.seconds),
            }

        piece = self.piece(f"estimate-{method}", {"method": method}, compute)
        return Estimate(piece["scores"], float(piece["forwards"]), float(piece["seconds"]))

    def _truth(self, chunk: int = 2048) -> tuple[Floats, float]:
        """Effect of every candidate, (pairs, candidates), and the seconds it took; in pieces of `chunk` nodes."""
        effects, seconds = [], 0.0
        for start in range(0, len(self.ids), chunk):
            rows = range(start, min(start + chunk, len(self.ids)))

            def compute(rows: range = rows) -> Piece:
                began = time.perf_counter()
                found = measure(self.patcher, [[row] for row in rows]).T
                return {"effects": found, "seconds": np.array(time.perf_counter() - began)}

            about = {**self.about, "start": start, "chunk": chunk}
            piece = self.piece(f"truth-{start // chunk:04d}", about, compute)
            effects.append(piece["effects"])
            seconds += float(piece["seconds"])
        return np.concatenate(effects, 1), seconds

    def into(self, study: Study) -> None:
        """Add this case's rows."""
        runs = [*self._given(), *self._baselines()]
        rows = [self._row(*run) for run in runs]
        best: dict[str, tuple[dict[str, Any], list[Found]]] = {}
        for row, (_, founds, _) in zip(rows, runs, strict=True):
            known = best.get(row["method"])
            if known is None or _merit(row) < _merit(known[0]):
                best[row["method"]] = (row, founds)
        study.settings += rows
        for row, founds in best.values():
            study.results.append(row)
            study.curves += self._curve(row, founds)
        study.bounds += self._bounds()

    def _given(self) -> Iterator[tuple[Ranking, list[Found], tuple[float, float]]]:
        """The oracle, then every estimator: its ranking, what it found, its own forwards and seconds."""
        # Ranks, not contributions: a ranking breaks ties at random, the true order by id.
        place = np.empty(len(self.ids))
        place[true_order(self.contribution)] = np.arange(len(self.ids), 0, -1)
        oracle = Given("oracle", place)
        known = Memo(self.patcher, self.truth)
        for ranking, seconds in [
            (oracle, 0.0),
            *(
                (Given(name, e.scores[self.ids], e.forwards), e.seconds)
                for name, e in self.estimates.items()
            ),
        ]:
            founds = [
                find_top(ranking, known, self.contribution, top=self.top, seed=seed)
                for seed in range(self.plan.seeds)
            ]
            yield ranking, founds, (ranking.forwards, seconds)

    def _baselines(self) -> Iterator[tuple[Ranking, list[Found], tuple[float, float]]]:
        """Every setting of every baseline; one piece per method and seed, whose settings share what they measure."""
        for method, rankings in self.plan.baselines(len(self.ids), self.pairs).items():
            if not rankings:
                continue
            pieces = []
            for seed in range(self.plan.seeds):

                def compute(rankings: list[Ranking] = rankings, seed: int = seed) -> Piece:
                    memo = Memo(self.patcher, self.truth)
                    began = time.perf_counter()
                    founds = [self._find(ranking, memo, seed) for ranking in rankings]
                    return {
                        "cost": np.stack([found.cost for found in founds]),
                        "missed": np.stack([found.missed for found in founds]),
                        "measured": np.array(memo.measured),
                        "seconds": np.array(time.perf_counter() - began),
                    }

                about = {
                    **self.about,
                    "settings": [ranking.setting for ranking in rankings],
                    "top": self.top,
                    "limit": self.plan.limit,
                    "lookahead": self.plan.lookahead,
                    "seed": seed,
                }
                pieces.append(self.piece(f"{method}-{seed}", about, compute))
            measured = sum(float(piece["measured"]) for piece in pieces)
            seconds = sum(float(piece["seconds"]) for piece in pieces)
            for number, ranking in enumerate(rankings):
                founds = [Found(piece["cost"][number], piece["missed"][number]) for piece in pieces]
                yield ranking, founds, (measured, seconds)

    def _find(self, ranking: Ranking, memo: Memo, seed: int) -> Found:
        most = float("inf") if self.plan.limit is None else memo.measured + self.plan.limit
        return find_top(
            ranking,
            memo,
            self.contribution,
            top=self.top,
            seed=seed,
            stop=lambda: memo.measured >= most,
        )

    def _row(
        self, ranking: Ranking, founds: Sequence[Found], spent: tuple[float, float]
    ) -> dict[str, Any]:
        given = isinstance(ranking, Given)
        row: dict[str, Any] = {
            "task": self.case.task,
            "family": self.case.family,
            "pairs": self.pairs,
            "nodes": len(self.ids),
            "method": ranking.name,
            "setting": ranking.setting,
            "seeds": len(founds),
        }
        for recall in RECALLS:
            suffix = "" if recall == 1.0 else f"_{100 * recall:g}"
            oracle = oracle_cost(self.top, self.pairs, recall)
            costs = [recall_cost(found.cost, recall) for found in founds]
            scores = [irwrgm(cost, oracle) for cost in costs]
            row[f"irwrgm{suffix}"] = geometric_mean(np.array(scores))
            row[f"irwrgm{suffix}_lowest"], row[f"irwrgm{suffix}_highest"] = min(scores), max(scores)
            mean = geometric_mean(np.stack(costs))
            for k in MARKS:
                row[f"cost{suffix}_{k}"] = float(mean[k - 1]) if k <= self.top else ""
        row["top"] = self.top
        # From this K on costs are lower bounds, as some run was stopped; empty if none was.
        missed = np.flatnonzero(np.any([found.missed for found in founds], axis=0))
        row["censored_from"] = int(missed[0]) + 1 if len(missed) else ""
        # A baseline's forwards and seconds cover all its settings and seeds: they share what they measure.
        row["ranking_forwards"], row["ranking_seconds"] = spent if given else ("", "")
        row["study_forwards"], row["study_seconds"] = ("", "") if given else spent
        row["verify_seconds_per_forward"] = self.seconds / self.truth.size
        return row

    def _curve(self, row: Mapping[str, Any], founds: Sequence[Found]) -> Iterator[dict[str, Any]]:
        """cost(K) at about 60 values of K, evenly spread over log K; geometric mean over seeds."""
        marks = np.unique(np.geomspace(1, self.top, 60).round().astype(int))
        for recall in RECALLS:
            cost = geometric_mean(np.stack([recall_cost(found.cost, recall) for found in founds]))
            oracle = oracle_cost(self.top, self.pairs, recall)
            for k in marks:
                yield {
                    **{name: row[name] for name in ("task", "family", "method", "setting")},
                    "recall": recall,
                    "k": int(k),
                    "cost": float(cost[k - 1]),
                    "oracle": float(oracle[k - 1]),
                    "lower_bound": row["censored_from"] != "" and k >= row["censored_from"],
                }

    def _bounds(self) -> Iterator[dict[str, Any]]:
        """The bound after verifying an estimator's top nodes, beside the truth about the rest."""
        plan = self.plan
        for name in plan.diagnose:
            if name not in self.estimates or len(self.ids) <= plan.verified:
                continue
            order = true_order(np.abs(self.estimates[name].scores[self.ids]))
            done, rest = order[: plan.verified], order[plan.verified :]

            def compute(done: Ids = done) -> Piece:
                began = time.perf_counter()
                found = bound_missed(
                    Memo(self.patcher, self.truth),
                    exclude=[self.patcher.nodes[int(i)] for i in done],
                    confidence=plan.confidence,
                    forwards=plan.forwards,
                    probability=plan.probability,
                )
                return {
                    "bounds": np.array(found.bounds),
                    "seconds": np.array(time.perf_counter() - began),
                }

            about = {
                **self.about,
                "exclude": hashlib.sha256(done.astype(np.int64).tobytes()).hexdigest(),
                "confidence": list(plan.confidence),
                "forwards": plan.forwards,
                "probability": plan.probability,
            }
            piece = self.piece(f"bound-{name}", about, compute)
            signed = np.abs(self.truth.mean(0))
            for level, bound in zip(plan.confidence, piece["bounds"], strict=True):
                yield {
                    "task": self.case.task,
                    "family": self.case.family,
                    "pairs": self.pairs,
                    "nodes": len(self.ids),
                    "method": name,
                    "verified": len(done),
                    "confidence": level,
                    "bound": float(bound),
                    "true_largest_missed": float(signed[rest].max()),
                    "true_largest_missed_contribution": float(self.contribution[rest].max()),
                    "largest_of_all": float(self.contribution.max()),
                    "forwards": plan.forwards,
                    "probability": plan.probability,
                    "seconds": float(piece["seconds"]),
                }


def _merit(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Sorts settings: runs that were stopped come last, for their IRWRGM is only a lower bound."""
    return row["censored_from"] != "", row["irwrgm"]


def geometric_mean(x: Floats) -> Any:
    """Over the first axis."""
    return np.exp(np.log(x).mean(0))
