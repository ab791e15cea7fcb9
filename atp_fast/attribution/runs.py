"""The clean and the corrupted run of a batch of pairs: what the sweep and exact patching start from.

Only each layer's input is kept, (pairs, positions, hidden) for either run; everything inside a layer is computed
again when it is needed. Positions before the first differing token of the batch (`start` of them) are run once and
leave their keys and values behind: they have no effect, and nothing in the sweep needs them otherwise. Prompts of
different lengths are each run at their own positions; the corrupted values are then moved to those they stand for.

A run goes in steps, one per layer, between which others may take theirs: Steps says how.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from atp_fast.attribution.batch import Batch, Entered, enter_pairs, extent
from atp_fast.attribution.memory import SweepPlan
from atp_fast.attribution.tape import LayerTape, Values, keeper
from atp_fast.attribution.waiting import Each, Parcel, Waiting
from atp_fast.hf import FiniteCheck, LayerArguments, LayerRun, Plug, Prefix, check_finite
from atp_fast.metrics import Metric
from atp_fast.nodes import ATTENTION_KINDS
from atp_fast.prompts.pairs import PromptPairs

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in stages, each of which needs the weights of one layer or of what is no layer; it yields between two stages."""


def finish(steps: Steps[T]) -> T:
    """Take all steps on end; what they return."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: T = end.value
            return found


@dataclass
class PairRuns:
    """Both runs of pairs; lists have one entry per layer, the inputs one more for the last output.

    inputs: layer inputs of both runs, one behind the other, (2 * pairs, positions, hidden), each on the device of its layer,
    as parcels that may wait elsewhere; clean, corrupted: those of either, the latter at the corrupted prompts' own positions;
    source, live: as in Batch; values: node values of the corrupted run, resid_pre included, moved
    to the positions they stand for, and keys_values: keys and values of the clean run at every position, prefix
    included (None of a layer without attention), both if they were asked for; tapes: what the sweep would run again, for
    layers that were asked for.
    statistics: whether attention notes those of the key fix wherever z is compared, in the clean run and in the corrupted one:
    without them it is another kernel, of other rounding.
    given: the pairs in the user's layout; pairs: the same, right-padded and no wider than the longest, on the
    model's device. Everything is computed in the latter layout: no real position ever sees padding.
    """

    given: PromptPairs
    pairs: PromptPairs
    start: int
    arguments: list[LayerArguments]
    source: Tensor | None
    live: Tensor
    prefix: _PrefixRun | None = None
    inputs: list[tuple[Parcel, ...]] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    keys_values: list[Prefix | None] = field(default_factory=list)
    tapes: dict[int, tuple[LayerTape, Values]] = field(default_factory=dict)
    statistics: bool = False

    @property
    def clean(self) -> Sequence[Tensor]:
        return Each(self.inputs, lambda both: both[0][: len(self.pairs)])

    @property
    def corrupted(self) -> Sequence[Tensor]:
        return Each(self.inputs, lambda both: both[0][len(self.pairs) :])

    @property
    def prefixes(self) -> Sequence[Prefix | None]:
        """Keys and values of the shared positions, of layers that have been run."""
        if self.prefix is None:
            return [None] * len(self.arguments)
        return Each(self.prefix.kept, lambda kept: Prefix(*kept))

    @property
    def prefix_output(self) -> Tensor | None:
        """The last layer's output at the shared positions, of the layers that have been run, (pairs, positions, hidden)."""
        return None if self.prefix is None else self.prefix.output

    def bring(self, number: int) -> None:
        """A layer's input and prefix stay here from now on."""
        for parcels in self._parcels(number):
            parcels[number] = tuple(parcel.here() for parcel in parcels[number])

    def forget(self, number: int) -> None:
        """A layer's input and prefix, if they have waited elsewhere, are not needed any more."""
        for parcels in self._parcels(number):
            for parcel in parcels[number]:
                parcel.drop()

    def _parcels(self, number: int) -> list[list[tuple[Parcel, ...]]]:
        kept = [] if self.prefix is None else self.prefix.kept
        return [parcels for parcels in (self.inputs, kept) if number < len(parcels)]

    @property
    def positions(self) -> int:
        """Positions that are run: all from `start` on."""
        return self.pairs.clean_ids.shape[1] - self.start

    def aligned(self, plug: Plug, number: int, values: Values) -> Values:
        """A layer's corrupted values, resid_pre among them, moved to the clean positions that they stand for.

        Queries, keys and values are computed at the clean positions from the moved layer input: a rotation by position
        is then that of the place where they are put.
        """
        if self.source is None:
            return values
        at = self.source.clamp(min=0).to(values["resid_pre"].device)
        moved: Values = {}
        for kind, value in values.items():
            index = at[:, None, :, None] if kind in ATTENTION_KINDS else at[..., None]
            moved[kind] = value.take_along_dim(index, -2)
        projected = {"q", "k", "v"} & set(values)
        if projected:
            visit = keeper(moved, tuple(projected))
            given = self.arguments[number], self.prefixes[number], visit
            with torch.no_grad():
                plug.keys_values(number, moved["resid_pre"], *given)
        return moved


def run_pairs(
    plug: Plug, given: PromptPairs, kinds: Sequence[str] = (), *, keep_values: bool = False
) -> PairRuns:
    """Run pairs, clean and corrupted, both prompts in one batch.

    keep_values: leave the corrupted run's values of `kinds` in `values`, and the clean run's keys and values.
    Raises ValueError, naming the layer, where an output is not finite.
    """
    batch = enter_pairs(plug, given, *extent(plug, given))
    runs = run_batch(plug, batch, kinds, keep_values=keep_values)
    check_outputs(plug, batch, runs)
    return runs


def run_batch(
    plug: Plug,
    batch: Batch,
    kinds: Sequence[str] = (),
    *,
    keep_values: bool = False,
    plan: SweepPlan | None = None,
    statistics: bool = False,
) -> PairRuns:
    """All layers on both prompts.

    keep_values: see run_pairs; plan: of a sweep; its taped layers leave a tape of the clean run and the corrupted run's values
    of `kinds` in `tapes`, so that the sweep need not run them again. Other layers run both prompts in one batch. statistics:
    see PairRuns.
    """
    return finish(
        run_in_steps(plug, batch, kinds, keep_values=keep_values, plan=plan, statistics=statistics)
    )


def run_in_steps(
    plug: Plug,
    batch: Batch,
    kinds: Sequence[str] = (),
    *,
    keep_values: bool = False,
    plan: SweepPlan | None = None,
    statistics: bool = False,
    waiting: Waiting | None = None,
) -> Steps[PairRuns]:
    """run_batch in steps: after entering, every layer. waiting: where layer inputs and prefixes wait between steps."""
    waiting = waiting or Waiting()
    if plan is not None:
        plan = plan._replace(taped_from=max(plan.taped_from, plug.lowest(kinds)))
    kinds, pairs = plug.visited(kinds), len(batch.pairs)
    both, doubled = batch.both
    first = torch.arange(pairs, device=both.device)
    known: dict[int, Tensor] = {}
    runs = PairRuns(
        batch.given,
        batch.pairs,
        batch.start,
        [a.rows(first, 2 * pairs, known) for a in doubled],
        batch.source,
        batch.live,
        None if batch.prefix is None else _PrefixRun(plug, batch.prefix, pairs, waiting),
        [(waiting.put(both),)],
        statistics=statistics,
    )
    del batch, both
    for number in range(len(plug.layers)):
        yield
        if runs.prefix is not None:
            runs.prefix.run_layer(number)
        if plan is not None and number >= plan.taped_from:
            together = plan.together and plug.layers[number].together
            tape = _tape_together if together else _tape_apart
            output = tape(plug, runs, number, kinds, plan, doubled[number])
        else:
            output = _run_layer(plug, runs, number, kinds if keep_values else None, doubled[number])
        runs.inputs.append((waiting.put(plug.moved(output, number + 1)),))
        del output
    return runs


def _run_layer(
    plug: Plug, runs: PairRuns, number: int, kept: Sequence[str] | None, doubled: LayerArguments
) -> Tensor:
    """A layer's output for both inputs, one behind the other; values of the kinds `kept` are left in `runs`."""
    values: Values = {}
    batch, before = len(runs.pairs), runs.prefixes[number]
    visit = None if kept is None else keeper(values, (*kept, "k", "v"))
    run = LayerRun(plug.backend, visit, _twice(before), tuple(kept or ()))
    with torch.no_grad():
        (both,) = runs.inputs[number]
        output = plug.run_layer(number, both.take(), doubled, run)
    if kept is not None:
        # copies, so that the rest of this layer's values can go
        own = {kind: values[kind][batch:].clone() for kind in kept if kind in values}
        runs.values.append(runs.aligned(plug, number, {**own, "resid_pre": runs.corrupted[number]}))
        k, v = values.get("k"), values.get("v")
        runs.keys_values.append(
            None if k is None or v is None else _joined(before, k[:batch], v[:batch])
        )
    return output


def _tape_apart(
    plug: Plug,
    runs: PairRuns,
    number: int,
    kinds: Sequence[str],
    plan: SweepPlan,
    doubled: LayerArguments,
) -> Tensor:
    """Leave a layer's tape of the clean run and the corrupted run's values in `runs`; both outputs, one behind the other."""
    tape = taped(plug, runs, number, kinds, plan.precision)
    y, values = corrupted_values(plug, runs, number, kinds)
    runs.tapes[number] = tape, values
    return torch.cat([tape.out.detach(), y])


def _tape_together(
    plug: Plug,
    runs: PairRuns,
    number: int,
    kinds: Sequence[str],
    plan: SweepPlan,
    doubled: LayerArguments,
) -> Tensor:
    """_tape_apart, by one forward of both inputs."""
    (both,) = runs.inputs[number]
    prefix, rows = _twice(runs.prefixes[number]), len(runs.pairs)
    how = plan.precision, runs.statistics, rows
    tape = LayerTape(plug, number, both.take(), doubled, prefix, kinds, *how)
    runs.tapes[number] = tape, runs.aligned(plug, number, tape.corrupted())
    return tape.out.detach()


def are_finite(runs: PairRuns) -> bool:
    """Whether the last layer's outputs are finite: one wait for the device."""
    finite = FiniteCheck()
    for output in (runs.prefix_output, runs.clean[-1], runs.corrupted[-1]):
        if output is not None:
            finite.note(output, "the last layer")
    return finite.first_bad() is None


def check_outputs(plug: Plug, batch: Batch, runs: PairRuns) -> None:
    """ValueError that names the first layer whose output is not finite.

    What is not finite stays so in the residual stream: the last outputs tell, and only then is the layer looked for.
    """
    if are_finite(runs):
        return
    finite = FiniteCheck()
    if batch.prefix is not None:
        prefix = _PrefixRun(plug, batch.prefix, len(batch.pairs), Waiting())
        for number in range(len(plug.layers)):
            prefix.run_layer(number)
            finite.note(prefix.output, f"layer {number}")
    _find_bad(runs, finite)


def check_layers(runs: PairRuns) -> None:
    """check_outputs where the prompts at the first layer are not at hand any more: a shared start that is not finite is named
    by the first layer behind it that is not."""
    if not are_finite(runs):
        _find_bad(runs, FiniteCheck())


def _find_bad(runs: PairRuns, finite: FiniteCheck) -> None:
    for number in range(1, len(runs.inputs)):
        finite.note(runs.clean[number], f"layer {number - 1}")
        finite.note(runs.corrupted[number], f"layer {number - 1}")
    if runs.prefix_output is not None:
        finite.note(runs.prefix_output, "the last layer")
    finite.check()


def _joined(prefix: Prefix | None, k: Tensor, v: Tensor) -> Prefix:
    if prefix is None:
        return Prefix(k.clone(), v.clone())
    return Prefix(torch.cat([prefix.k, k], 2), torch.cat([prefix.v, v], 2))


def _twice(prefix: Prefix | None) -> Prefix | None:
    return None if prefix is None else Prefix(*(torch.cat([t, t]) for t in prefix))


class _PrefixRun:
    """A run of shared leading tokens: every layer's keys and values there, and the last layer's output."""

    def __init__(self, plug: Plug, entered: Entered, pairs: int, waiting: Waiting) -> None:
        self._plug, self._pairs, self._waiting = plug, pairs, waiting
        x, self._arguments = entered
        self._stream = waiting.put(x)
        self.kept: list[tuple[Parcel, ...]] = []

    def run_layer(self, number: int) -> None:
        run = LayerRun(backend=self._plug.backend)
        with torch.no_grad():
            x = self._plug.run_layer(number, self._stream.take(), self._arguments[number], run)
        self._stream.drop()
        self._stream = self._waiting.put(x)
        assert run.k is not None and run.v is not None
        both = (t.expand(self._pairs, -1, -1, -1) for t in (run.k, run.v))
        self.kept.append(tuple(map(self._waiting.put, both)))

    def end(self) -> _PrefixRun:
        """The same with the last layer's output alone."""
        found = copy.copy(self)
        found._arguments, found.kept = [], []
        return found

    @property
    def output(self) -> Tensor:
        """(pairs, positions, hidden), the same for all pairs if the prompt is."""
        return self._stream.take().expand(self._pairs, -1, -1)


def taped(
    plug: Plug,
    runs: PairRuns,
    number: int,
    kinds: Sequence[str],
    precision: str | None = None,
) -> LayerTape:
    """A tape of one layer of the clean run."""
    x, arguments, prefix = runs.clean[number], runs.arguments[number], runs.prefixes[number]
    return LayerTape(plug, number, x, arguments, prefix, kinds, precision, runs.statistics)


def corrupted_values(
    plug: Plug, runs: PairRuns, number: int, kinds: Sequence[str]
) -> tuple[Tensor, Values]:
    """One layer of the corrupted run, without a graph: its output, and its node values where they stand.

    q, k, v, z: (pairs, heads, positions, dim); neuron, writes, resid_pre: (pairs, positions, width).
    """
    x = runs.corrupted[number]
    values: Values = {"resid_pre": x}
    visit = keeper(values, (*kinds, *ATTENTION_KINDS))
    prefix = runs.prefixes[number]
    run = LayerRun(plug.backend, visit, prefix, tuple(kinds), statistics=runs.statistics)
    with torch.no_grad():
        out = plug.run_layer(number, x, runs.arguments[number], run)
    return out, runs.aligned(plug, number, values)


def metric_logits(plug: Plug, runs: PairRuns, output: Tensor, metric: Metric) -> Tensor:
    """Logits where the metric looks: (pairs, 1, vocab) at each last position, or (pairs, columns, vocab).

    output: the last layer's output (pairs, positions, hidden). All-position logits are in the user's layout; columns of
    padding repeat a real one.
    """
    if metric.positions == "last":
        return _finite_logits(plug, _ends(runs, output, runs.pairs.last))
    logits = _finite_logits(plug, output)
    if runs.prefix_output is not None:
        with torch.no_grad():
            before = _finite_logits(plug, runs.prefix_output)
        logits = torch.cat([before, logits], 1)
    columns = torch.arange(runs.given.clean_ids.shape[1], device=logits.device)
    columns = (columns - runs.given.starts.to(logits.device)[:, None]).clamp(0, logits.shape[1] - 1)
    return logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))


def both_logits(plug: Plug, runs: PairRuns, clean: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """metric_logits of the clean run, whose last output is given, and of the corrupted one, which has no graph."""
    corrupted = runs.corrupted[-1]
    if metric.positions == "last":  # few rows: the head's weights are read once for both
        last = runs.pairs.corrupted_lengths - 1
        ends = torch.cat([_ends(runs, clean, runs.pairs.last), _ends(runs, corrupted, last)])
        first, second = _finite_logits(plug, ends).chunk(2)
        return first, second.detach()
    with torch.no_grad():
        found = metric_logits(plug, runs, corrupted, metric)
    return metric_logits(plug, runs, clean, metric), found


def _ends(runs: PairRuns, output: Tensor, last: Tensor) -> Tensor:
    """The last layer's output at each pair's last position, (pairs, 1, hidden)."""
    rows = torch.arange(len(runs.pairs), device=output.device)
    return output[rows, last.to(output.device) - runs.start][:, None]


def _finite_logits(plug: Plug, output: Tensor) -> Tensor:
    logits = plug.logits(output)
    check_finite(logits.detach(), "the logits")
    return logits
