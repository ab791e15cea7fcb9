"""Batches of patched rows in lockstep, where weights have to be fetched: each layer's once for as many rows as the budget holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from atp_fast.attribution.memory import Budget
from atp_fast.attribution.runs import Steps, finish
from atp_fast.attribution.streaming import in_lockstep, weights_held
from atp_fast.hf import ENDS, Plug

T = TypeVar("T")


class Job(NamedTuple):
    """A batch of rows to run.

    steps: entering, every layer from a given one on, and the logits; first: the lowest layer that it needs; waits: bytes that it
    holds between two layers.
    """

    steps: Callable[[int], Steps[None]]
    first: int
    waits: int


class Alone:
    """One work after another, of a model whose weights stay where they are.

    share: of the bytes that there are for patched rows, rows at work may take one in so many.
    """

    share = 1

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def open(self, works: Sequence[Steps[T]]) -> list[T]:
        """Run pairs."""
        return [finish(steps) for steps in works]

    def run(self, jobs: Sequence[Job], room: int) -> None:
        """Run patched rows; room: bytes for those that wait."""
        for job in jobs:
            finish(job.steps(job.first))


class Lockstep(Alone):
    """Works in lockstep. budget: what is left of one beside the weights that are held.

    Raises ValueError where it does not hold one layer's.
    """

    share = 2

    def __init__(self, plug: Plug, budget: Budget) -> None:
        held = weights_held(plug, budget)
        super().__init__(Budget(max(1, budget.bytes - held.bytes), budget.auto))
        self._plug, self._ahead, self._layers = plug, held.ahead, len(plug.layers)

    def open(self, works: Sequence[Steps[T]]) -> list[T]:
        return in_lockstep(self._plug, works, (ENDS, *range(self._layers), ENDS), self._ahead)

    def run(self, jobs: Sequence[Job], room: int) -> None:
        for group in _packed(jobs, room):
            first = min(job.first for job in group)
            stages = (ENDS, *range(first, self._layers), ENDS)
            in_lockstep(self._plug, [job.steps(first) for job in group], stages, self._ahead)


def _packed(jobs: Sequence[Job], room: int) -> Iterator[list[Job]]:
    """Jobs in order, as many at a time as wait in `room` bytes, at least one."""
    group: list[Job] = []
    for job in jobs:
        if group and sum(other.waits for other in group) + job.waits > room:
            yield group
            group = []
        group.append(job)
    if group:
        yield group
