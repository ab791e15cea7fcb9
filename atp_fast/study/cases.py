"""Study cases of a real model: attention nodes, all of them, and neurons, a sample and the best of each method."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from atp_fast.attribution.question import PAPER_METRIC, Question, check_method
from atp_fast.engine import Engine
from atp_fast.metrics import MetricLike, resolve
from atp_fast.nodes import ATTENTION_KINDS, NodeSpace
from atp_fast.patching.subsets import Floats, Ids, Patcher, moving_ids
from atp_fast.prompts.directions import Direction
from atp_fast.prompts.pairs import PromptPairs
from atp_fast.study.runs import Estimate

FAMILIES: dict[str, tuple[str, ...]] = {"attention": ATTENTION_KINDS, "neuron": ("neuron",)}
ESTIMATORS = ("atp", "atp+qk", "atp+graddrop", "atp*")


def estimate_forwards(
    method: str, layers: int, pairs: int = 1, *, backward: float = 2.0, qk_fix: float = 1.0
) -> float:
    """Cost of a method's scores in forward-pass equivalents, on all pairs together.

    Two forwards and one backward per pair; the QK fix recomputes attention only, and is counted as `qk_fix`, at most a
    forward; GradDrop's gradients share one sweep that costs (layers + 1)/2 backwards in place of one.
    """
    chosen = check_method(method)
    backwards = (layers + 1) / 2 if chosen.graddrop else 1.0
    return pairs * (2.0 + backward * backwards + (qk_fix if chosen.qk_fix else 0.0))


class EngineCase:
    """One task and one family on a model.

    The family's nodes are those at positions from the first differing token on (moving_ids): earlier ones have effect 0
    exactly, and no method has to look at them. Attention: all q, k, v, z nodes are candidates. Neurons: a fixed random
    sample of `sample` nodes, and the top `best` of each estimator.
    Means over pairs count 0 for a pair without a token at the position.
    """

    estimators: Sequence[str] = ESTIMATORS

    def __init__(
        self,
        engine: Engine,
        task: str,
        family: str,
        pairs: PromptPairs,
        *,
        metric: MetricLike = PAPER_METRIC,
        direction: Direction = Question.direction,
        sample: int = 2000,
        best: int = 2000,
        seed: int = 0,
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"family must be among {', '.join(FAMILIES)}, got {family!r}")
        self.engine, self.pairs = engine, pairs
        self.task, self.family = task, family
        self.metric, self.direction = metric, direction
        self.sample, self.best, self.seed = sample, best, seed
        self.kinds = FAMILIES[family]
        self.space: NodeSpace = engine.plug.space(pairs.width, self.kinds)
        self.moving: Ids = moving_ids(self.space, pairs)

    @property
    def identity(self) -> Mapping[str, Any]:
        model = self.engine.model
        return {
            "model": str(getattr(model.config, "name_or_path", "")),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(next(model.parameters()).dtype),
            "precision": self.engine.precision,
            "pairs": self.pairs.digest(),
            "metric": resolve(self.metric, self.pairs).name,
            "direction": self.direction,
        }

    def estimate(self, method: str) -> Estimate:
        """Scores of the family's nodes. The seconds are those of a run for this family's kinds alone."""
        began = time.perf_counter()
        found = self.engine.attribute(
            self.pairs,
            metric=self.metric,
            method=method,
            nodes=self.kinds,
            direction=self.direction,
            progress=False,
        ).cpu()
        seconds = time.perf_counter() - began
        share = found.counts.double() / len(self.pairs)
        scores = np.concatenate(
            [
                (table[:, :count].double() * share[:, None]).numpy().ravel()
                for kind in self.kinds
                for table, count in zip(
                    found.contribution[kind], self.space.in_layers(kind), strict=True
                )
            ]
        )
        forwards = estimate_forwards(method, self.space.layers, len(self.pairs))
        return Estimate(scores[self.moving], forwards, seconds)

    def candidates(self, scores: Mapping[str, Floats]) -> Ids:
        count = len(self.moving)
        if self.family == "attention" or count <= self.sample:
            return np.arange(count)
        rng = np.random.default_rng(self.seed)
        chosen = np.zeros(count, dtype=bool)
        chosen[rng.choice(count, size=self.sample, replace=False)] = True
        for values in scores.values():
            chosen[np.argsort(-values, kind="stable")[: self.best]] = True
        return np.flatnonzero(chosen)

    def patcher(self, ids: Ids) -> Patcher:
        nodes = [self.space.node(int(flat)) for flat in self.moving[ids]]
        return self.engine.patcher(self.pairs, nodes, self.metric, self.direction)


def engine_cases(
    engine: Engine,
    tasks: Mapping[str, PromptPairs],
    families: Sequence[str] = ("attention",),
    *,
    metric: MetricLike = PAPER_METRIC,
    direction: Direction = Question.direction,
    sample: int = 2000,
    best: int = 2000,
) -> Iterator[EngineCase]:
    """A case for every task and family, made when its turn comes."""
    for task, pairs in tasks.items():
        for family in families:
            yield EngineCase(
                engine,
                task,
                family,
                pairs,
                metric=metric,
                direction=direction,
                sample=sample,
                best=best,
            )
