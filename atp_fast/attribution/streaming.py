"""Many batches in lockstep, so that weights which have to be fetched are fetched once per layer for all of them.

A model whose weights lie on disk or in host memory is swept layer by layer for a group of batches: each layer's weights are
fetched for the group's forwards and again for its sweep, the next layer's while this one works. What a batch carries from one
layer to the next waits: in memory within the budget, beyond it on disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from atp_fast.attribution.batch import enter_pairs, sweep_extent
from atp_fast.attribution.memory import (
    Budget,
    SweepPlan,
    SweepSize,
    costs,
    estimate_sweep,
    free_memory,
    plan_sweep,
)
from atp_fast.attribution.runs import Steps, check_layers, run_in_steps
from atp_fast.attribution.scores import Scores
from atp_fast.attribution.sweep import SweepState, add_behind, key_fixed, top_cotangent, try_layer
from atp_fast.attribution.waiting import Shelf
from atp_fast.hf import ENDS, Plug
from atp_fast.metrics import Metric
from atp_fast.prompts.pairs import PromptPairs

T = TypeVar("T")
_TOKENS = 64  # bytes per pair and position that a batch holds between its steps: ids, masks, where effects count


class Held(NamedTuple):
    """Weights that are fetched: bytes that are held at a time, and whether the next layer's are among them."""

    bytes: int
    ahead: bool


class StreamPlan(NamedTuple):
    """How sweeps of many batches are done.

    sweep: of each batch; pairs: run in lockstep; held: of the weights, None where they stay in memory and every batch is swept
    by itself; here, host: bytes on the model's device and in host memory for what waits; bytes: of all, at the worst
    moment.
    """

    sweep: SweepPlan
    pairs: int = 1
    held: Held | None = None
    here: int = 0
    host: int = 0
    bytes: int = 0


def stream_sweeps(
    plug: Plug,
    pairs: PromptPairs,
    metric: Metric,
    plan: StreamPlan,
    scores: Scores,
    batches: Sequence[Tensor],
    advance: Callable[[], object],
) -> Iterator[tuple[Tensor, Tensor]]:
    """sweep of every batch (its pairs' numbers), group by group in lockstep: each one's metric values."""
    assert plan.held is not None
    layers = range(len(plug.layers))
    stages = (ENDS, *layers, ENDS, *reversed(layers))
    many = -(-plan.pairs // plan.sweep.pairs)
    for i in range(0, len(batches), many):
        with Shelf(plan.here, plan.host) as shelf:
            sweeps = [
                _sweep(plug, pairs[rows], metric, plan.sweep, scores, rows, advance, shelf)
                for rows in batches[i : i + many]
            ]
            found = in_lockstep(plug, sweeps, stages, plan.held.ahead)
        yield from found


def _sweep(
    plug: Plug,
    pairs: PromptPairs,
    metric: Metric,
    plan: SweepPlan,
    scores: Scores,
    rows: Tensor,
    advance: Callable[[], object],
    shelf: Shelf,
) -> Steps[tuple[Tensor, Tensor]]:
    """sweep in steps: entering, every layer, the metric, every layer from the top. Between them tensors wait on the shelf."""
    kinds = scores.space.kinds
    batch = enter_pairs(plug, pairs, *sweep_extent(plug, pairs))
    fixed = key_fixed(scores.method, kinds)
    forwards = run_in_steps(plug, batch, kinds, plan=plan, statistics=fixed, waiting=shelf)
    place = batch.place(rows.to(plug.device), scores.space.positions)
    spans, any_live = batch.spans, batch.any_live
    del batch  # the layers' inputs wait on the shelf
    runs = yield from forwards
    check_layers(runs)
    yield
    clean_value, corrupted_value, cotangent = top_cotangent(plug, runs, metric)
    state = SweepState(plug, runs, plan, scores, place, spans)
    if any_live:
        add_behind(state, cotangent[None])
    carried, chunk = shelf.put(cotangent[None]), plan.chunk
    del cotangent
    runs.forget(len(plug.layers))
    for number in reversed(range(len(plug.layers))):
        yield
        if any_live:
            runs.bring(number)
            cotangents = plug.moved(carried.take(), number)
            found, chunk = try_layer(state, number, cotangents, chunk)
            carried.drop()
            if number:
                carried = shelf.put(found)
            del cotangents, found
        runs.forget(number)
        advance()
    return clean_value, corrupted_value


def in_lockstep(
    plug: Plug, works: Sequence[Steps[T]], stages: Sequence[int], ahead: bool
) -> list[T]:
    """Take every step of all works before the next one; what they return.

    stages: what each of their steps needs the weights of, which are fetched once; ahead: while the step before is taken.
    """
    if not works:
        return []
    steps = abreast(works)
    found: list[T] | None = None
    try:
        with plug.weights(stages, ahead) as weights:
            for stage in range(len(stages)):
                with weights.held(stage):
                    try:
                        next(steps)
                    except StopIteration as end:
                        found = end.value
    finally:
        for work in works:
            work.close()
    assert found is not None  # their steps are the stages
    return found


def abreast(works: Sequence[Steps[T]]) -> Steps[list[T]]:
    """Works of as many steps, each step of all of them before the next; what they return."""
    found: list[T] = []
    while not found:
        for steps in works:
            try:
                next(steps)
            except StopIteration as end:
                found.append(end.value)
        if not found:
            yield
    return found


def weights_held(plug: Plug, budget: Budget) -> Held:
    """How weights are held within a budget: two layers' where they take no more than half of it.

    Raises ValueError where it does not hold one layer's.
    """
    plug.check_fits(budget.bytes)
    sizes = plug.fetched_bytes().values()
    layer, tensor = max(map(sum, sizes)), max(map(max, sizes))  # a tensor is read beside its file
    ahead = 2 * layer + tensor <= budget.bytes // 2
    return Held((2 if ahead else 1) * layer + tensor, ahead)


def plan_stream(
    plug: Plug, budget: Budget, size: SweepSize, *, pairs: int, together: bool
) -> StreamPlan:
    """Fit the sweep of a model with weights that are fetched into a budget: weights, then a batch at work in half of what is
    left, then what waits; beyond the budget it waits on disk, as long as it takes half of what is free there.

    Raises ValueError where the budget does not hold one layer's weights.
    """
    held = weights_held(plug, budget)
    left = max(1, budget.bytes - held.bytes)
    cost, item, found = costs(plug, size.kinds), plug.itemsize, plug.inspection
    keys_values = item * found.kv_heads * (found.head_dim + found.v_dim)
    # of a batch at work: the input and the output of one layer, its keys and values
    at_work = cost._replace(stored=item * 4 * found.hidden, prefix=4 * keys_values)
    half = Budget(left // 2, budget.auto)
    plan = plan_sweep(plug, half, size, pairs=pairs, together=together, cost=at_work)
    room = max(0, left - estimate_sweep(plug, plan, size, at_work))
    rotations = 6 * item * found.head_dim  # of both prompts together, and of the clean ones
    beside = (size.positions + size.prefix) * (_TOKENS + rotations)
    # going down, a cotangent comes for every two inputs that are dropped
    waits = size.positions * (cost.stored + cost.carried // 2) + size.prefix * cost.prefix
    host = 0 if plug.device.type == "cpu" else free_memory(torch.device("cpu")) // 2
    disk = shutil.disk_usage(tempfile.gettempdir()).free // 2
    most = min(room // 4 // beside, (room + host + disk) // waits)
    group = pairs if together or most >= pairs else max(1, most // plan.pairs) * plan.pairs
    work = held.bytes + left - room + min(room, group * (beside + waits))
    return StreamPlan(plan, group, held, max(0, room - group * beside), host, work)
