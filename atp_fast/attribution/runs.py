"""The clean and the corrupted run of a batch of pairs: what the sweep and exact patching start from.

Only each layer's input is kept, (pairs, positions, hidden) for either run; everything inside a layer is computed
again when it is needed. Positions before the first differing token of the batch (`start` of them) are run once and
leave their keys and values behind: they have no effect, and nothing in the sweep needs them otherwise. Prompts of
different lengths are each run at their own positions; the corrupted values are then moved to those they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atp_fast.attribution.batch import Batch, Entered, enter_pairs, extent
from atp_fast.attribution.memory import SweepPlan
from atp_fast.attribution.tape import LayerTape, Values, keeper
from atp_fast.attribution.twins import Twins, run_twins
from atp_fast.hf import FiniteCheck, LayerArguments, LayerRun, Plug, Prefix, check_finite
from atp_fast.metrics import Metric
from atp_fast.nodes import ATTENTION_KINDS
from atp_fast.prompts.pairs import PromptPairs


@dataclass
class PairRuns:
    """Both runs of pairs; lists have one entry per layer, the inputs one more for the last output.

    clean, corrupted: layer inputs, (pairs, positions, hidden), the latter at the corrupted prompts' own positions;
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
    clean: list[Tensor] = field(default_factory=list)
    corrupted: list[Tensor] = field(default_factory=list)
    prefixes: list[Prefix | None] = field(default_factory=list)
    prefix_output: Tensor | None = None
    values: list[Values] = field(default_factory=list)
    keys_values: list[Prefix | None] = field(default_factory=list)
    tapes: dict[int, tuple[LayerTape, Values]] = field(default_factory=dict)
    statistics: bool = False

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
        at = self.source.clamp(min=0)
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
    prefixes: list[Prefix | None] = [None] * len(plug.layers)
    prefix_output = None
    pairs = len(batch.pairs)
    if batch.prefix is not None:
        prefixes, prefix_output = _run_prefix(plug, batch.prefix, pairs)
    both, doubled = batch.both
    first = torch.arange(pairs, device=both.device)
    runs = PairRuns(
        batch.given,
        batch.pairs,
        batch.start,
        [a.rows(first, 2 * pairs) for a in doubled],
        batch.source,
        batch.live,
        prefixes=prefixes,
        prefix_output=prefix_output,
        statistics=statistics,
    )
    for number in range(len(plug.layers)):
        runs.clean.append(both[:pairs])
        runs.corrupted.append(both[pairs:])
        if plan is not None and number >= plan.taped_from:
            layer = plug.layers[number]
            # not experts, to whom others' tokens go, and not layers of another kind than attention
            plain = layer.down is not None and layer.attention is not None
            tape = _tape_together if plan.together and plain else _tape_apart
            both = tape(plug, runs, number, kinds, plan, both, doubled[number])
        else:
            values: Values = {}
            visit = keeper(values, (*kinds, "k", "v")) if keep_values else None
            run = LayerRun(
                plug.backend, visit, _twice(prefixes[number]), tuple(kinds) if visit else ()
            )
            with torch.no_grad():
                both = plug.run_layer(number, both, doubled[number], run)
            if keep_values:
                # copies, so that the rest of this layer's values can go
                kept = {kind: values[kind][pairs:].clone() for kind in kinds if kind in values}
                runs.values.append(
                    runs.aligned(plug, number, {**kept, "resid_pre": runs.corrupted[-1]})
                )
                k, v = values.get("k"), values.get("v")
                runs.keys_values.append(
                    None
                    if k is None or v is None
                    else _joined(prefixes[number], k[:pairs], v[:pairs])
                )
    runs.clean.append(both[:pairs])
    runs.corrupted.append(both[pairs:])
    return runs


def _tape_apart(
    plug: Plug,
    runs: PairRuns,
    number: int,
    kinds: Sequence[str],
    plan: SweepPlan,
    both: Tensor,
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
    both: Tensor,
    doubled: LayerArguments,
) -> Tensor:
    """_tape_apart, by one forward of both inputs."""
    values: Values = {}
    visit = keeper(values, (*kinds, *ATTENTION_KINDS))
    prefix = _twice(runs.prefixes[number])
    run = LayerRun(plug.backend, visit, prefix, tuple(kinds), statistics=runs.statistics)
    twins = run_twins(plug, number, both, doubled, run)
    tape = taped(plug, runs, number, kinds, plan.precision, twins)
    kept = {kind: value[len(tape.x) :] for kind, value in values.items()}
    kept["resid_pre"] = runs.corrupted[number]
    runs.tapes[number] = tape, runs.aligned(plug, number, kept)
    return twins.out


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
        _run_prefix(plug, batch.prefix, len(batch.pairs), finite)
    for number in range(1, len(runs.clean)):
        finite.note(runs.clean[number], f"layer {number - 1}")
        finite.note(runs.corrupted[number], f"layer {number - 1}")
    finite.check()


def _joined(prefix: Prefix | None, k: Tensor, v: Tensor) -> Prefix:
    if prefix is None:
        return Prefix(k.clone(), v.clone())
    return Prefix(torch.cat([prefix.k, k], 2), torch.cat([prefix.v, v], 2))


def _twice(prefix: Prefix | None) -> Prefix | None:
    return None if prefix is None else Prefix(*(torch.cat([t, t]) for t in prefix))


def _run_prefix(
    plug: Plug, entered: Entered, pairs: int, finite: FiniteCheck | None = None
) -> tuple[list[Prefix | None], Tensor]:
    """Keys and values of every layer on shared leading tokens, and the last layer's output there; finite: notes all outputs."""
    x, arguments = entered
    prefixes: list[Prefix | None] = []
    with torch.no_grad():
        for number in range(len(plug.layers)):
            run = LayerRun(backend=plug.backend)
            x = plug.run_layer(number, x, arguments[number], run)
            if finite is not None:
                finite.note(x, f"layer {number}")
            assert run.k is not None and run.v is not None
            prefixes.append(Prefix(*(t.expand(pairs, -1, -1, -1) for t in (run.k, run.v))))
    return prefixes, x.expand(pairs, -1, -1)


def taped(
    plug: Plug,
    runs: PairRuns,
    number: int,
    kinds: Sequence[str],
    precision: str | None = None,
    twins: Twins | None = None,
) -> LayerTape:
    """A tape of one layer of the clean run."""
    x, arguments, prefix = runs.clean[number], runs.arguments[number], runs.prefixes[number]
    return LayerTape(plug, number, x, arguments, prefix, kinds, precision, runs.statistics, twins)


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
    return output[rows, last - runs.start][:, None]


def _finite_logits(plug: Plug, output: Tensor) -> Tensor:
    logits = plug.logits(output)
    check_finite(logits.detach(), "the logits")
    return logits
