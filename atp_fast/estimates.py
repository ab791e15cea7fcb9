"""What a call will take, said before it runs: memory by the plan, seconds by trying one layer of each kind.

A trial layer works on the call's own first batch, so that shapes, devices and kernels are those of the call; its time is
multiplied by the layers, batches and cotangents that there are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from atp_fast.attribution.batch import Batch, Entered, enter_pairs, extent, sweep_extent
from atp_fast.attribution.measured import measured_layers
from atp_fast.attribution.memory import (
    SweepPlan,
    end_row,
    estimate_sweep,
    patched_row,
    patched_rows,
    stored_pair,
)
from atp_fast.attribution.question import Method
from atp_fast.attribution.runs import PairRuns, corrupted_values
from atp_fast.attribution.runs import taped as tape_of
from atp_fast.attribution.scores import Scores, weight_tables
from atp_fast.attribution.streaming import StreamPlan
from atp_fast.attribution.sweep import (
    SweepState,
    run_forwards,
    sweep_layer,
    sweep_size,
    top_cotangent,
)
from atp_fast.hf import ENDS, LayerRun, Plug, Prefix, held_tensor
from atp_fast.metrics import Metric
from atp_fast.nodes import Node, NodeSpace
from atp_fast.patching.sessions import NodeTable, Patching, only_end, row_batches
from atp_fast.prompts.pairs import PromptPairs


class DeviceBytes(NamedTuple):
    """Bytes on one device: of the model's weights that lie there, of the result, and at the worst moment of the work."""

    model: int
    result: int
    work: int

    @property
    def peak(self) -> int:
        return self.model + self.result + self.work


_T = TypeVar("_T")


class SweepCall(NamedTuple):
    """An attribution: its metric and method, the nodes, the results' dtype, and whether each pair's own numbers are kept."""

    metric: Metric
    method: Method
    space: NodeSpace
    dtype: torch.dtype
    per_pair: bool

    def cotangents(self, plug: Plug, layer: int) -> int:
        """So many are taken through a layer."""
        return len(plug.layers) - layer if self.method.graddrop else 1


@dataclass(frozen=True)
class Estimate:
    """What a call will take.

    seconds: wall seconds on this machine, as it is now; devices: bytes by device; batches: in so many is the work done.
    """

    seconds: float
    devices: dict[str, DeviceBytes]
    batches: int


class _OneLayer(Scores):
    """Scores of a trial: of one layer's nodes, where every layer's go, by the weights of a layer of the whole model."""

    def __init__(
        self,
        plug: Plug,
        number: int,
        space: NodeSpace,
        method: Method,
        dtype: torch.dtype,
        pairs: int,
    ) -> None:
        counts = {kind: space.in_layers(kind)[number] for kind in space.kinds}
        own = NodeSpace(1, space.positions, {kind: n for kind, n in counts.items() if n})
        super().__init__(own, method, plug.device, dtype, pairs)
        self._number = number
        tables = weight_tables(method.graddrop, len(plug.layers), plug.device, dtype)
        self._weights = {plug.device: tables}

    def weights(
        self, kind: str, layer: int, first: int, count: int, device: torch.device
    ) -> Tensor:
        return super().weights(kind, self._number, first, count, device)

    def add(self, kind: str, layer: int, *rest: Any, **options: Any) -> None:
        super().add(kind, 0, *rest, **options)


class _Trial:
    """One layer, twice one above the other, on a batch: how long its parts of a sweep take.

    forward: seconds of both prompts' run, with a tape if taped; runs: of both.
    """

    def __init__(
        self, call: SweepCall, plug: Plug, number: int, batch: Batch, plan: SweepPlan, taped: bool
    ) -> None:
        clock, copies = _Clock(plug.device), 2
        view = plug.stacked(number, copies)
        plan = plan._replace(taped_from=0 if taped else copies)
        batch = replace(batch, both=_only(batch.both, number, copies))
        if batch.prefix is not None:
            batch = replace(batch, prefix=_only(batch.prefix, number, copies))
        pairs = len(batch.pairs)
        space, kept = plug.shares.space(call.space), pairs if call.per_pair else 0
        scores = _OneLayer(plug, number, space, call.method, call.dtype, kept)
        kinds = scores.space.kinds
        rows = torch.arange(pairs, device=plug.device)
        place = batch.place(rows, call.space.positions)
        self._chunk = min(plan.chunk, call.cotangents(plug, 0))
        cotangents = torch.ones(
            (self._chunk, pairs, *batch.both.x.shape[1:]),
            device=plug.device,
            dtype=batch.both.x.dtype,
        )

        def swept(count: int) -> float:
            state = SweepState(view, self.runs, plan, scores, place, batch.spans)
            return clock(sweep_layer, state, 1, cotangents[:count], count, {})[1]

        times = []
        for count in (self._chunk, 1):  # the first run warms up
            self.runs, seconds = clock(run_forwards, view, batch, plan, scores)
            self.forward = seconds / copies
            times.append(swept(count) if batch.any_live else 0.0)
        many, one = times
        self._tape = 0.0
        if not taped and batch.any_live:
            self._tape = clock(
                lambda: (
                    tape_of(view, self.runs, 1, kinds, plan.precision),
                    corrupted_values(view, self.runs, 1, kinds),
                )
            )[1]
        one, many = max(0.0, one - self._tape), max(0.0, many - self._tape)
        self._each = max(0.0, many - one) / max(1, self._chunk - 1)
        self._any = max(0.0, one - self._each)

    def sweep(self, cotangents: int) -> float:
        """Seconds of taking so many through the layer, in chunks."""
        chunks = -(-cotangents // self._chunk)
        return self._tape + chunks * self._any + cotangents * self._each


def _only(entered: Entered, number: int, copies: int) -> Entered:
    return Entered(entered.x, [entered.arguments[number]] * copies)


def result_bytes(space: NodeSpace, pairs: int, dtype: torch.dtype) -> int:
    """Of an Attribution's tables; pairs: whose own numbers are kept."""
    numbers = sum(torch.Size(space.shape(kind)).numel() for kind in space.kinds)
    return dtype.itemsize * numbers * (2 + pairs)


def by_device(plug: Plug, result: int, work: int) -> dict[str, DeviceBytes]:
    """Bytes of each device that holds weights; result and work lie on the model's first."""
    held: dict[str, int] = {str(plug.device): 0}
    known = set()
    for parameter in (*plug.model.parameters(), *plug.model.buffers()):
        if id(parameter) not in known and parameter.device.type != "meta":
            known.add(id(parameter))
            place = str(parameter.device)
            held[place] = held.get(place, 0) + held_tensor(parameter).nbytes
    first = str(plug.device)
    return {
        place: DeviceBytes(held[place], *((result, work) if place == first else (0, 0)))
        for place in held
    }


def sweep_estimate(
    plug: Plug,
    pairs: PromptPairs,
    batches: Sequence[Tensor],
    plan: StreamPlan,
    call: SweepCall,
) -> Estimate:
    """Of an attribution of pairs, as they are run, in these batches under this plan."""
    size = sweep_size(plug, pairs, call.metric, call.method, call.space.kinds, plan.sweep.precision)
    work = plan.bytes if plan.held else estimate_sweep(plug, plan.sweep, size)
    result = result_bytes(call.space, len(pairs) if call.per_pair else 0, call.dtype)
    with plug.plugged():
        working, fetching = _sweep_seconds(plug, pairs[batches[0]], plan.sweep, call)
    working *= len(pairs) / len(batches[0])
    fetching *= 2 * -(-len(pairs) // plan.pairs)  # forwards, and the way back, of every group
    ahead = plan.held is not None and plan.held.ahead
    seconds = max(working, fetching) if ahead else working + fetching
    return Estimate(plug.shares.largest(seconds), by_device(plug, result, work), len(batches))


def _sweep_seconds(
    plug: Plug, pairs: PromptPairs, plan: SweepPlan, call: SweepCall
) -> tuple[float, float]:
    """Of one batch's work, and of fetching all weights that are fetched once."""
    clock, extent = _Clock(plug.device), sweep_extent(plug, pairs)
    with contextlib.ExitStack() as stack:
        fetching = clock(stack.enter_context, plug.holding(ENDS))[1]
        enter_pairs(plug, pairs, *extent)
        batch, working = clock(enter_pairs, plug, pairs, *extent)
    runs: list[PairRuns] = []
    for mine, taped in _tried(plug, plan):
        with contextlib.ExitStack() as stack:
            fetching += len(mine) * clock(stack.enter_context, plug.holding(mine[0]))[1]
            trial = _Trial(call, plug, mine[0], batch, plan, taped)
        swept = sum(trial.sweep(call.cotangents(plug, number)) for number in mine)
        working += len(mine) * trial.forward + swept
        runs = [trial.runs]
    with plug.holding(ENDS):
        for _ in range(2):
            top = clock(top_cotangent, plug, runs[0], call.metric)[1]
    return working + top, fetching


def _tried(plug: Plug, plan: SweepPlan) -> Iterator[tuple[list[int], bool]]:
    """Layers that take the same time, and whether they leave tapes; those that are fetched apart from those that are not."""
    fetched = plug.fetched_bytes()
    groups: dict[tuple[int, int | None, bool, bool], list[int]] = {}
    for kind, numbers in enumerate(plug.alike):
        for number in numbers:
            taped = number >= plan.taped_from
            window = plug.inspection.windows[number]
            groups.setdefault((kind, window, number in fetched, taped), []).append(number)
    return ((numbers, taped) for (*_, taped), numbers in groups.items())


def patch_estimate(plug: Plug, patching: Patching, nodes: Sequence[Node]) -> Estimate:
    """Of patching each of these nodes alone on every pair, as `patching` has it."""
    budget = patching.budget
    table, metric = NodeTable.of(plug, nodes), patching.metric
    logits = metric.columns(patching.pairs)
    forward, layers = measured_layers(plug).forward, len(plug.layers)
    work = kept = positions_run = rows_run = 0
    largest: _Rows | None = None
    stored_positions = 0
    for numbers in patching.batches:
        pairs = patching.pairs[numbers]
        start, positions = extent(plug, pairs)
        stored = len(pairs) * stored_pair(plug, start, positions, patching.kinds)
        stored_positions += 2 * len(pairs) * positions
        work = max(work, kept + stored + 2 * len(pairs) * positions * forward)
        stays = kept + stored <= budget.bytes // 2
        held = kept + stored
        kept += stored if stays else 0
        short = plug.moves and only_end(pairs, metric) is not None
        whole = layers - 1 if short else layers
        room = budget.bytes - held
        for rows in _rows_of(plug, pairs, table, start + positions, room, logits, whole):
            row = patched_row(plug, rows.width, rows.begin, logits)
            end = end_row(plug, rows.width, rows.begin, logits) if short else 0
            work = max(work, held + rows.whole * row, held + rows.rows * end)
            positions_run += rows.rows * rows.width * (layers - rows.layer)
            rows_run += rows.rows
            if largest is None or rows.rows * rows.width > largest.rows * largest.width:
                largest = rows
    seconds = 0.0
    if largest is not None:
        with plug.plugged():
            layer, top, fetching = _row_seconds(plug, patching.pairs, largest)
        seconds = layer * (positions_run + layers * stored_positions) + top * rows_run
        seconds += 2 * fetching  # for the runs, and for the patched rows
    work += patching.weights + plug.made_bytes
    result = 8 * len(patching.pairs) * len(nodes)
    seconds, devices = plug.shares.largest(seconds), by_device(plug, result, work)
    return Estimate(seconds, devices, len(patching.batches))


class _Rows(NamedTuple):
    """Patched rows that are run together: how many, how many of them in the last layer that is run whole, from which position
    and, on average, layer on, over how many positions."""

    rows: int
    whole: int
    begin: int
    layer: int
    width: int


def _rows_of(
    plug: Plug, pairs: PromptPairs, table: NodeTable, end: int, room: int, logits: int, whole: int
) -> Iterator[_Rows]:
    """The rows of a batch of pairs, as PatchSession runs them; with spans, from each span's first token on that differs.

    whole: so many layers are run whole.
    """
    columns = table.position[None].expand(len(pairs), -1)
    if pairs.spans is None:
        position = columns - pairs.starts.cpu()[:, None]
    else:
        position = pairs.spans.clean.cpu()[:, :, 0].gather(1, columns)
    position = torch.maximum(position, pairs.split.cpu()[:, None])  # a span may begin before
    moving = pairs.moving.cpu()[:, table.position]
    layer = table.layer[None].expand(len(pairs), -1)[moving]

    def most(begin: int) -> int:
        return patched_rows(plug, room, end - begin, begin, logits)

    every = torch.arange(len(layer))
    for rows, _, begin in row_batches(plug, every, layer, position[moving], most):
        firsts = layer[rows]
        active = int((firsts < whole).sum())
        yield _Rows(len(rows), active, begin, int(firsts.double().mean()), end - begin)


def _row_seconds(plug: Plug, pairs: PromptPairs, rows: _Rows) -> tuple[float, float, float]:
    """Of a layer, per position of these rows, the mean of all layers; of one row's logits at one position; and of fetching every
    layer's weights once."""
    clock = _Clock(plug.device)
    prompt = pairs[:1].right_padded(rows.begin + rows.width).to(plug.device)
    one, arguments = plug.enter(prompt.clean_ids[:, rows.begin :], rows.begin)
    before = Entered(*plug.enter(prompt.clean_ids[:, : rows.begin])) if rows.begin else None
    index = torch.zeros(rows.rows, dtype=torch.int64)
    x = one.expand(rows.rows, -1, -1).contiguous()
    seconds = fetching = 0.0
    with torch.no_grad():
        for first, *others in plug.alike:
            prefix = None
            with contextlib.ExitStack() as stack:
                fetched = clock(stack.enter_context, plug.holding(first))[1]
                if before is not None:
                    kept = plug.keys_values(first, before.x, before.arguments[first], None, None)
                    prefix = Prefix(*(t.expand(rows.rows, -1, -1, -1) for t in kept))
                given = arguments[first].rows(index, 1)
                for _ in range(2):  # the first time warms up
                    run = LayerRun(plug.backend, prefix=prefix)
                    layer = clock(plug.run_layer, first, x, given, run)[1]
            seconds += layer * (1 + len(others)) / len(plug.layers)
            fetching += fetched * (1 + len(others))
        for _ in range(2):
            top = clock(plug.logits, x[:, :1])[1]
    return seconds / (rows.rows * rows.width), top / rows.rows, fetching


class _Clock:
    """Calls a function, and says how many seconds it took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, function: Callable[..., _T], *args: Any) -> tuple[_T, float]:
        self._wait()
        began = time.perf_counter()
        found = function(*args)
        self._wait()
        return found, time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
