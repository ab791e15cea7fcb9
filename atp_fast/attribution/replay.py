"""Batches of shapes that were met before, swept without waiting for the host: two CUDA graphs around an eager metric.

A sweep has three parts: both prompts' forwards (run_forwards), the metric and its gradient (any code of the user's), and the
layers from the top (sweep_layer). The first and the last are recorded by calling the very functions that the eager sweep
calls, on buffers at fixed addresses: a batch's tensors are copied into them, and its part of the scores in and out again.
All else that the recorded functions read of a batch is in the key by which recordings are kept.

The first batch of a kind is watched for what no recording could hold. A shape's first batch is swept eagerly; the second is
swept on the buffers, and what was called is recorded; the third is replayed and swept eagerly, and the bits are compared:
had the recording held on to the second's numbers, they would differ. Those after it are replayed.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atp_fast.attribution.batch import Batch, Entered, enter_pairs, sweep_extent
from atp_fast.attribution.graphs import CudaGraphs, Graphs, HostReads
from atp_fast.attribution.memory import Budget, SweepPlan, estimate_sweep
from atp_fast.attribution.runs import PairRuns, are_finite
from atp_fast.attribution.scores import Place, Scores
from atp_fast.attribution.sweep import (
    SweepState,
    run_forwards,
    sweep_batch,
    sweep_layer,
    sweep_size,
    top_cotangent,
)
from atp_fast.hf import LayerArguments, Plug, alone_with, modules_of
from atp_fast.metrics import Metric
from atp_fast.prompts.pairs import PromptPairs

Eager = Callable[..., tuple[Tensor, Tensor]]
_AT_MOST = 4  # recordings; another one's place is the one's that was not used for longest
_KNOWN_AT_MOST = 1000  # keys


@dataclass
class _Known:
    """A key's batches so far, after how many it is recorded, and whether it cannot be; `step` doubles with every recording
    that had to go, so that shapes that take turns are not recorded again and again."""

    met: int = 0
    recorded_at: int = 2
    step: int = 2
    refused: bool = False


class Replays:
    """An engine's recordings. Their memory counts within the budget of its calls: half of it at most, and they go where an
    eager sweep needs the room."""

    def __init__(self, graphs: Callable[[torch.device], Graphs] = CudaGraphs) -> None:
        self._graphs = graphs
        self._recorded: dict[Hashable, Recording] = {}  # the last one used is the last
        self._known: dict[Hashable, _Known] = {}
        self._holds: dict[Hashable, bool] = {}  # by kind of key, whether a recording can hold it
        self._state: Hashable = None
        self._room = 0
        self._said: set[str] = set()

    @property
    def bytes(self) -> int:
        """What the recordings hold of the device's memory."""
        return sum(recording.bytes for recording in self._recorded.values())

    def opened(self, plug: Plug, budget: Budget) -> None:
        """A call begins, outside `plug.plugged()`: recordings of a model that is not what it was are dropped."""
        with alone_with(plug.model):
            state = model_state(plug)
            if state != self._state:
                self._recorded.clear()
                self._known.clear()
                self._holds.clear()
            self._state, self._room = state, budget.bytes

    def release(self) -> bool:
        """Drop all recordings; whether there were any."""
        return self._leave(0) > 0

    def sweep(
        self,
        plug: Plug,
        pairs: PromptPairs,
        metric: Metric,
        plan: SweepPlan,
        scores: Scores,
        *,
        rows: Tensor,
        advance: Callable[[], object] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """As sweep.sweep."""
        batch = enter_pairs(plug, pairs, *sweep_extent(plug, pairs))
        asked = Asked(plug, batch, metric, plan, scores, rows, advance)
        eager = functools.partial(
            sweep_batch, *asked[:5], rows=rows, advance=advance, release=self.release
        )
        key = batch_key(asked) if self._state and batch.any_live else None
        if key is None:
            return eager()
        known = self._met(key)
        if key in self._recorded:
            return self._replayed(key, asked, eager)
        size = sweep_size(plug, pairs, metric, scores.method, scores.space.kinds, plan.precision)
        need = estimate_sweep(plug, plan._replace(pairs=len(pairs)), size)
        self._leave(self._room - need)
        if (kind := key[0]) not in self._holds:
            reads = HostReads(plug.device, constants(batch))
            found = eager(watched=reads)
            self._holds[kind] = reads.found is None
            return found
        need += 2 * sum(x.nbytes for x in scores.tables())
        refused = known.refused or not self._holds[kind]
        if refused or known.met < known.recorded_at or need > self._room // 2:
            return eager()
        self._leave(self._room // 2 - need, _AT_MOST - 1)
        return self._record(key, asked, eager)

    def _met(self, key: Hashable) -> _Known:
        if len(self._known) >= _KNOWN_AT_MOST:
            self._known.clear()
        known = self._known.setdefault(key, _Known())
        known.met += 1
        return known

    def _leave(self, most: int, count: int = _AT_MOST) -> int:
        """Drop recordings, those used longest ago first, until they hold `most` bytes and are `count` at most; how many went."""
        dropped = 0
        while self._recorded and (self.bytes > most or len(self._recorded) > count):
            key = next(iter(self._recorded))
            del self._recorded[key]
            known = self._known.setdefault(key, _Known())
            known.step *= 2
            known.recorded_at = known.met + known.step
            dropped += 1
        return dropped

    def _record(self, key: Hashable, asked: Asked, eager: Eager) -> tuple[Tensor, Tensor]:
        """Sweep a batch on the buffers of a new recording, calling what is recorded then."""
        called = self._called(asked)
        if called is None:  # buffers and the like: the eager sweep may do less at once
            self._known[key].refused = True
            return eager()
        recording, found = called
        if found is None:
            return eager()
        recording.store(asked)
        try:
            recording.record(asked.plug)
        except Exception as error:  # whatever a recording does not bear: the sweep is done
            short = isinstance(error, torch.OutOfMemoryError)
            why = "out of memory" if short else f"{type(error).__name__}: {error}"
            self._refuse(key, f"a sweep could not be recorded ({why})")
            return found
        self._recorded[key] = recording
        self._leave(self._room // 2)
        return found

    def _replayed(self, key: Hashable, asked: Asked, eager: Eager) -> tuple[Tensor, Tensor]:
        """Replay a batch; a recording's first one is swept eagerly too, and has to give the same bits."""
        replayed = self._loaded(key, asked)
        if replayed is None:
            self._refuse(key, "out of memory in a replayed sweep")
            self.release()
            return eager()
        recording, found = replayed
        if found is None:
            return eager()
        if recording.compared:
            recording.store(asked)
            return found
        wanted = eager()
        if all(map(torch.equal, found, wanted)) and recording.sums.equals(
            asked.scores, asked.place
        ):
            recording.compared = True
        else:
            self._refuse(key, "a replayed sweep gave other numbers than the eager one")
        return wanted

    # Functions of their own, so that nothing holds what ran out of memory when the eager sweep begins: no name, no traceback.

    def _called(self, asked: Asked) -> tuple[Recording, tuple[Tensor, Tensor] | None] | None:
        """A new recording and what calling it gave, None where memory ran out."""
        try:
            recording = Recording(self._graphs(asked.plug.device), asked)
            recording.load(asked)
            return recording, recording.call(asked)
        except torch.OutOfMemoryError:
            return None

    def _loaded(
        self, key: Hashable, asked: Asked
    ) -> tuple[Recording, tuple[Tensor, Tensor] | None] | None:
        """A key's recording, now the last one used, and what replaying it gave, None where memory ran out."""
        recording = self._recorded[key] = self._recorded.pop(key)
        try:
            recording.load(asked)
            return recording, recording.replay(asked)
        except torch.OutOfMemoryError:
            return None

    def _refuse(self, key: Hashable, why: str) -> None:
        self._recorded.pop(key, None)
        self._known[key].refused = True
        self._say(why)

    def _say(self, what: str) -> None:
        """Warn, once per engine."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(
                f"{what}: sweeping eagerly, as Engine(..., replay=False) does", stacklevel=5
            )


class Asked(NamedTuple):
    """A batch's sweep, as sweep.sweep_batch is asked for it."""

    plug: Plug
    batch: Batch
    metric: Metric
    plan: SweepPlan
    scores: Scores
    rows: Tensor
    advance: Callable[[], object]

    @property
    def place(self) -> Place:
        return self.batch.place(self.rows, self.scores.space.positions)


class Recording:
    """A batch's sweep on buffers: called, recorded, and replayed for others of its key.

    sums: the batch's part of the scores, before and after; compared: whether a replayed batch was found to give the eager bits;
    bytes: what it holds of the device's memory, once it is recorded.
    """

    bytes: int

    def __init__(self, graphs: Graphs, asked: Asked) -> None:
        self._graphs, self._plan = graphs, asked.plan
        tensors, order = varying(asked.batch)
        self._buffers = [_buffer(x) for x in tensors]
        numbers = iter(order)
        self._batch = changed(asked.batch, lambda _: self._buffers[next(numbers)])
        pairs, width = len(self._batch.pairs), _columns(asked.batch, asked.scores)
        self.sums = asked.scores.part(pairs, width)
        rows = torch.arange(pairs, device=asked.rows.device)
        self._place = replace(self._batch, all_live=False).place(rows, width)
        self._cotangent: Tensor | None = None
        self._ends: PairRuns | None = None
        self.compared = False

    def load(self, asked: Asked) -> None:
        """Copy a batch and its part of the scores."""
        for buffer, x in zip(self._buffers, varying(asked.batch)[0], strict=True):
            _dense(buffer).copy_(_dense(x))
        self.sums.load(asked.scores, asked.place)

    def store(self, asked: Asked) -> None:
        """Give its part of the scores back; the sweep is done."""
        self.sums.store(asked.scores, asked.place)
        for _ in asked.plug.layers:
            asked.advance()

    def call(self, asked: Asked) -> tuple[Tensor, Tensor] | None:
        """Add the loaded batch's effects to `sums`. The metric's values, as sweep.sweep returns them, or None where an output is
        not finite."""
        runs = self.forwards(asked.plug)
        if not are_finite(runs):
            return None
        clean, corrupted, cotangent = top_cotangent(asked.plug, _of(asked, runs), asked.metric)
        self._cotangent = cotangent.clone()
        self.layers(asked.plug, runs)
        return clean, corrupted

    def record(self, plug: Plug) -> None:
        """What was called, which is on the device all that it can meet for the first time."""
        runs = self._graphs.capture(functools.partial(self.forwards, plug))
        self._graphs.capture(functools.partial(self.layers, plug, runs))
        self._ends = replace(  # what the metric reads; the rest may go
            runs,
            inputs=runs.inputs[-1:],
            arguments=[],
            prefix=None if runs.prefix is None else runs.prefix.end(),
            tapes={},
        )
        own = sum(x.untyped_storage().nbytes() for x in (*self._buffers, *self.sums.tables()))
        self.bytes = own + self._graphs.bytes()

    def replay(self, asked: Asked) -> tuple[Tensor, Tensor] | None:
        """As `call`, by what is recorded."""
        assert self._ends is not None and self._cotangent is not None
        self._graphs.replay(0)
        if not are_finite(self._ends):
            return None
        runs = _of(asked, self._ends)
        clean, corrupted, cotangent = top_cotangent(asked.plug, runs, asked.metric)
        self._cotangent.copy_(cotangent)
        self._graphs.replay(1)
        return clean, corrupted

    def forwards(self, plug: Plug) -> PairRuns:
        """The first recorded part."""
        return run_forwards(plug, self._batch, self._plan, self.sums)

    def layers(self, plug: Plug, runs: PairRuns) -> None:
        """The second, from the cotangent of the last layer's output."""
        assert self._cotangent is not None
        state = SweepState(plug, runs, self._plan, self.sums, self._place, self._batch.spans)
        cotangents = self._cotangent[None]
        for number in reversed(range(len(plug.layers))):
            cotangents = sweep_layer(state, number, cotangents, self._plan.chunk, {})


def _of(asked: Asked, runs: PairRuns) -> PairRuns:
    """The runs with the pairs that are loaded, which the metric is given."""
    return replace(runs, given=asked.batch.given, pairs=asked.batch.pairs)


# ---- what a recording depends on: tensors, which are copied into its buffers, and all else, which is in its key


def changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same with `change` of every tensor that differs from batch to batch."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else change(x)

    def argument(x: Tensor) -> Tensor:
        return x if _is_constant(x) else change(x)

    def entered(prompts: Entered) -> Entered:
        return Entered(change(prompts.x), [a.mapped(argument) for a in prompts.arguments])

    return replace(
        batch,
        both=entered(batch.both),
        prefix=None if batch.prefix is None else entered(batch.prefix),
        source=part(batch.source),
        live=change(batch.live),
        spans=part(batch.spans),
        column=change(batch.column) if isinstance(batch.column, Tensor) else 0,
    )


def varying(batch: Batch) -> tuple[list[Tensor], list[int]]:
    """The tensors that differ from batch to batch, each once, and which of them stands at each place."""
    found: dict[int, int] = {}
    tensors: list[Tensor] = []
    order: list[int] = []

    def note(x: Tensor) -> Tensor:
        if id(x) not in found:
            found[id(x)] = len(tensors)
            tensors.append(x)
        order.append(found[id(x)])
        return x

    changed(batch, note)
    return tensors, order


def _columns(batch: Batch, scores: Scores) -> int:
    """Columns of a batch's own sums: its positions, where they stand in the same columns for all its pairs."""
    alike = batch.spans is None and not isinstance(batch.column, Tensor)
    return batch.positions if alike else scores.space.positions


def _is_constant(x: Tensor) -> bool:
    """Whether a layer's argument is a number for the host, such as the width of a window; its value is in the key."""
    return x.device.type == "cpu" and x.numel() == 1 and not x.is_floating_point()


def constants(batch: Batch) -> list[Tensor]:
    """The layers' arguments that are numbers for the host."""
    return [x for a in _arguments(batch) for x in a.tensors() if _is_constant(x)]


def _arguments(batch: Batch) -> Iterator[LayerArguments]:
    entered = (batch.both, batch.prefix)
    return itertools.chain.from_iterable(e.arguments for e in entered if e is not None)


def _dense(x: Tensor) -> Tensor:
    """One of each entry of an expanded tensor."""
    for axis, step in enumerate(x.stride()):
        if step == 0 and x.shape[axis] > 1:
            x = x.narrow(axis, 0, 1)
    return x


def _buffer(x: Tensor) -> Tensor:
    """A tensor of memory of its own, laid out as x is."""
    return torch.empty_like(_dense(x)).expand(x.shape)


def batch_key(asked: Asked) -> tuple[Hashable, Hashable] | None:
    """All that the recorded parts read but tensors' contents, first what is asked, then shapes and numbers.

    None where a layer is given what is neither tensor nor plain, and for dictionaries, whose code is not known.
    """
    plug, batch, _, plan, scores, *_ = asked
    tensors, order = varying(batch)
    if scores.space.only or any(x.device != plug.device for x in tensors):
        return None
    try:
        arguments = tuple(
            plain((a.args, tuple(a.kwargs.items()), a.by_row)) for a in _arguments(batch)
        )
    except TypeError:
        return None
    device = plug.device.type
    kind = (
        *(batch.prefix is None, batch.source is None, batch.spans is None),
        *(isinstance(batch.column, Tensor), scores.per_pair is None),
        *(plan.precision, plan.together, scores.method, scores.dtype, scores.space.kinds),
        *(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        *(_product_precision(), torch.are_deterministic_algorithms_enabled()),
    )
    shapes = (
        *(len(batch.pairs), batch.start, batch.positions, arguments, plan),
        *(tuple(order), tuple((x.shape, x.stride(), x.dtype) for x in tensors)),
        _columns(batch, scores),
    )
    return kind, shapes


def _product_precision() -> Hashable:
    """How torch is told to multiply on a GPU. Its older questions raise where somebody has answered the newer ones."""
    matmul = torch.backends.cuda.matmul
    new = [getattr(each, "fp32_precision", None) for each in (torch.backends, matmul)]
    old = torch.get_float32_matmul_precision() if new[1] is None else None
    reduced = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    return *new, old, *reduced


def plain(value: object, tensors: bool = True) -> Hashable:
    """A value of Python's own types, hashable. A tensor, in tuples alone, becomes its number where that is the host's.

    TypeError for all else.
    """
    kind = type(value).__name__
    if isinstance(value, Tensor) and tensors:
        return kind, value.item() if _is_constant(value) else None
    if type(value) is tuple:
        return kind, *(plain(inner, tensors) for inner in value)
    if type(value) is list:
        return kind, *(plain(inner, False) for inner in value)
    if type(value) is dict:
        return kind, *((key, plain(inner, False)) for key, inner in value.items())
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return kind, value
    raise TypeError(f"{kind} is no plain value")


_MODULE = frozenset(vars(nn.Module()))  # what every module has


def model_state(plug: Plug) -> Hashable | None:
    """Where a model's tensors lie and how its modules are set, which a recording holds on to.

    None where it is not recorded: it reads its attention's scores, is split over processes, its weights lie elsewhere or are of
    another kind, somebody's hooks or modes look on.
    """
    apart = plug.own_softmax or plug.shares.group is not None
    if apart or plug.offloaded or plug.quantised or _watched(plug.model):
        return None
    modules = modules_of(plug.model)
    tensors = [
        x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None
    ]
    if any(type(x) not in (Tensor, nn.Parameter) or x.device != plug.device for x in tensors):
        return None
    placed = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors)
    return placed, tuple(map(_settings, modules))


def _settings(module: nn.Module) -> Hashable:
    """A module's own attributes, those of Python's own types by value."""
    found: list[Hashable] = [id(type(module)), module.training]
    for name, value in vars(module).items():
        if name not in _MODULE:
            try:
                found.append((name, plain(value, tensors=False)))
            except TypeError:
                found.append((name, id(value)))
    return tuple(found)


def _watched(model: nn.Module) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    hooks = [name for name in _MODULE if name.endswith("_hooks") and "state_dict" not in name]
    each = any(vars(module)[name] for module in modules_of(model) for name in hooks)
    shared = vars(nn.modules.module)
    return each or any(
        value
        for name, value in shared.items()
        if name.startswith("_global_") and name.endswith("_hooks")
    )
