"""The clean and the corrupted run of a batch of pairs: what the sweep and exact patching start from.

Only each layer's input is kept, (pairs, positions, hidden) for either run; everything inside a layer is computed
again when it is needed. Positions before the first differing token of the batch (`start` of them) are run once and
leave their keys and values behind: they have no effect, and nothing in the sweep needs them otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atp_fast.attribution.memory import SweepPlan
from atp_fast.attribution.tape import LayerTape, Values, keeper
from atp_fast.hf import FiniteCheck, LayerArguments, LayerRun, Plug, Prefix, check_finite
from atp_fast.metrics import Metric
from atp_fast.nodes import ATTENTION_KINDS
from atp_fast.prompts.pairs import PromptPairs


@dataclass
class PairRuns:
    """Both runs of pairs; lists have one entry per layer, the inputs one more for the last output.

    clean, corrupted: layer inputs, (pairs, positions, hidden); values: node values of the corrupted run, and keys_values:
    keys and values of the clean run at every position, prefix included, both if they were asked for; tapes: what the sweep would run again, for layers that were asked for.
    given: the pairs in the user's layout; pairs: the same, right-padded and no wider than the longest, on the
    model's device. Everything is computed in the latter layout: no real position ever sees padding.
    """

    given: PromptPairs
    pairs: PromptPairs
    start: int
    arguments: list[LayerArguments]
    clean: list[Tensor] = field(default_factory=list)
    corrupted: list[Tensor] = field(default_factory=list)
    prefixes: list[Prefix | None] = field(default_factory=list)
    prefix_output: Tensor | None = None
    values: list[Values] = field(default_factory=list)
    keys_values: list[Prefix] = field(default_factory=list)
    tapes: dict[int, tuple[LayerTape, Values]] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """Positions that are run: all from `start` on."""
        return self.pairs.clean_ids.shape[1] - self.start

    def differs(self) -> Tensor:
        """(pairs, positions) bool: real positions from each pair's own first differing token on."""
        columns = torch.arange(
            self.start, self.start + self.positions, device=self.pairs.clean_ids.device
        )
        return (columns >= self.pairs.split[:, None]) & (columns < self.pairs.lengths[:, None])


def filled(pairs: PromptPairs, ids: Tensor) -> Tensor:
    """Right-padded ids with each row's last token in its padding: no real position sees it, no warning is due."""
    last = ids.gather(1, pairs.last[:, None])
    return torch.where(pairs.attention_mask, ids, last)


def run_pairs(
    plug: Plug,
    given: PromptPairs,
    kinds: Sequence[str] = (),
    *,
    keep_values: bool = False,
    plan: SweepPlan | None = None,
) -> PairRuns:
    """Run pairs, clean and corrupted.

    keep_values: leave the corrupted run's values of `kinds` in `values`, and the clean run's keys and values;
    plan: of a sweep; its taped layers leave a tape of the clean run and the corrupted run's values of `kinds` in `tapes`,
    so that the sweep need not run them again. Other layers run both prompts in one batch.
    """
    pairs = given.right_padded().to(plug.device)
    clean, corrupted = filled(pairs, pairs.clean_ids), filled(pairs, pairs.corrupted_ids)
    positions = clean.shape[1]
    start = min(int(pairs.split.min()), positions - 1) if plug.moves else 0
    prefixes: list[Prefix | None] = [None] * len(plug.layers)
    prefix_output = None
    if start:
        prefixes, prefix_output = _run_prefix(plug, clean[:, :start])
    batch = len(pairs)
    both, doubled = plug.enter(torch.cat([clean[:, start:], corrupted[:, start:]]), start)
    first = torch.arange(batch, device=both.device)
    arguments = [a.rows(first, 2 * batch) for a in doubled]
    runs = PairRuns(given, pairs, start, arguments, prefixes=prefixes, prefix_output=prefix_output)
    x, y = both[:batch], both[batch:]
    finite = FiniteCheck()
    for number in range(len(plug.layers)):
        runs.clean.append(x)
        runs.corrupted.append(y)
        if plan is not None and number >= plan.taped_from:
            prefix = prefixes[number]
            tape = LayerTape(plug, number, x, arguments[number], prefix, kinds, plan.precision)
            y, values = run_for_values(plug, runs, number, y, kinds)
            x = tape.out.detach()
            runs.tapes[number] = tape, values
        else:
            values = {}
            visit = keeper(values, (*kinds, "k", "v")) if keep_values else None
            run = LayerRun(
                plug.backend, visit, _twice(prefixes[number]), tuple(kinds) if visit else ()
            )
            with torch.no_grad():
                both = plug.run_layer(number, torch.cat([x, y]), doubled[number], run)
            x, y = both[:batch], both[batch:]
            if keep_values:
                # copies, so that the rest of this layer's values can go
                kept = {kind: values[kind][batch:].clone() for kind in kinds if kind in values}
                runs.values.append(kept)
                k, v = values["k"][:batch], values["v"][:batch]
                runs.keys_values.append(_joined(prefixes[number], k, v))
        finite.note(x, f"layer {number}")
        finite.note(y, f"layer {number}")
    finite.check()
    runs.clean.append(x)
    runs.corrupted.append(y)
    return runs


def _joined(prefix: Prefix | None, k: Tensor, v: Tensor) -> Prefix:
    if prefix is None:
        return Prefix(k.clone(), v.clone())
    return Prefix(torch.cat([prefix.k, k], 2), torch.cat([prefix.v, v], 2))


def _twice(prefix: Prefix | None) -> Prefix | None:
    return None if prefix is None else Prefix(*(torch.cat([t, t]) for t in prefix))


def _run_prefix(plug: Plug, ids: Tensor) -> tuple[list[Prefix | None], Tensor]:
    """Keys and values of every layer on shared leading tokens, and the last layer's output there."""
    batch = ids.shape[0]
    if bool((ids == ids[:1]).all()):
        ids = ids[:1]  # a prompt that all pairs share is run once
    x, arguments = plug.enter(ids)
    prefixes: list[Prefix | None] = []
    finite = FiniteCheck()
    with torch.no_grad():
        for number in range(len(plug.layers)):
            run = LayerRun(backend=plug.backend)
            x = plug.run_layer(number, x, arguments[number], run)
            finite.note(x, f"layer {number}")
            assert run.k is not None and run.v is not None
            prefixes.append(Prefix(*(t.expand(batch, -1, -1, -1) for t in (run.k, run.v))))
    finite.check()
    return prefixes, x.expand(batch, -1, -1)


def run_for_values(
    plug: Plug, runs: PairRuns, number: int, x: Tensor, kinds: Sequence[str]
) -> tuple[Tensor, Values]:
    """One layer on x without a graph: its output, and its node values.

    q, k, v, z: (pairs, heads, positions, dim); neuron, writes, resid_pre: (pairs, positions, width).
    """
    values: Values = {"resid_pre": x}
    visit = keeper(values, (*kinds, *ATTENTION_KINDS))
    run = LayerRun(plug.backend, visit, runs.prefixes[number], tuple(kinds))
    with torch.no_grad():
        return plug.run_layer(number, x, runs.arguments[number], run), values


def metric_logits(plug: Plug, runs: PairRuns, output: Tensor, metric: Metric) -> Tensor:
    """Logits where the metric looks: (pairs, 1, vocab) at each last position, or (pairs, columns, vocab).

    output: the last layer's output (pairs, positions, hidden). All-position logits are in the user's layout; columns of
    padding repeat a real one.
    """
    if metric.positions == "last":
        return _finite_logits(plug, _ends(runs, output))
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
        ends = torch.cat([_ends(runs, clean), _ends(runs, corrupted)])
        first, second = _finite_logits(plug, ends).chunk(2)
        return first, second.detach()
    with torch.no_grad():
        found = metric_logits(plug, runs, corrupted, metric)
    return metric_logits(plug, runs, clean, metric), found


def _ends(runs: PairRuns, output: Tensor) -> Tensor:
    """The last layer's output at each pair's last position, (pairs, 1, hidden)."""
    rows = torch.arange(len(runs.pairs), device=output.device)
    return output[rows, runs.pairs.last - runs.start][:, None]


def _finite_logits(plug: Plug, output: Tensor) -> Tensor:
    logits = plug.logits(output)
    check_finite(logits.detach(), "the logits")
    return logits
