"""Exact activation patching: the effect of one node, or of many at once, by running the model with it patched.

Patching a node of layer m at position t changes nothing below m and nothing before t. So a row starts from the stored
clean input of its lowest patched layer, joins the batch there, computes only the positions from its first patched one
on (with the clean keys and values as prefix), and ends in logits only where the metric looks. Nodes before a pair's
first differing token, or in its padding, have effect 0 and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atp_fast.attribution.batch import enter_pairs, extent, filled
from atp_fast.attribution.features import exchanged
from atp_fast.attribution.memory import (
    Budget,
    features_at_once,
    patched_rows,
    stored_pair,
    stored_pairs,
)
from atp_fast.attribution.runs import (
    PairRuns,
    Steps,
    both_logits,
    check_outputs,
    metric_logits,
    run_in_steps,
)
from atp_fast.attribution.streaming import abreast
from atp_fast.hf import Dictionary, LayerArguments, LayerRun, Plug, Prefix, Visit, check_finite
from atp_fast.metrics import METRICS_BY_NAME, Metric, check_rows
from atp_fast.nodes import COARSE_KINDS, KINDS, Node
from atp_fast.patching.lockstep import Alone, Job, Lockstep
from atp_fast.prompts.pairs import PromptPairs


class NodeTable(NamedTuple):
    """Nodes as columns of numbers: kind (index into the plug's kinds), the layer that shows their values, position (user's
    column), index; all (nodes,)."""

    kind: Tensor
    layer: Tensor
    position: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not used

    @classmethod
    def of(cls, plug: Plug, nodes: Sequence[Node]) -> NodeTable:
        number = {kind: i for i, kind in enumerate(plug.kinds)}
        later = {(kind, d.layer): d.seat[0] for d in plug.dictionaries for kind in d.kinds}
        rows = [
            (number[kind], later.get((kind, layer), layer), position, index)
            for kind, layer, position, index in nodes
        ]
        return cls(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1))


class Patches(NamedTuple):
    """Patched nodes of many rows, all (patches,); row counts rows, position counts from a prompt's first token."""

    row: Tensor
    kind: Tensor
    layer: Tensor
    position: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not used

    def take(self, which: Tensor) -> Patches:
        return Patches(*(column[which] for column in self))


class RowBatch(NamedTuple):
    """Rows that are run together: their numbers, the lowest patched layer and the first patched position of any."""

    rows: Tensor
    first: int
    begin: int


_PAIRS_AT_ONCE = 16  # more of them share fewer leading tokens


class Patching:
    """Pairs ready to be patched again and again, in batches.

    The two runs of a batch, a quarter of the budget at most, are made when it is first patched, and kept for the next time as
    long as all that are kept fit half of the budget; the rest is for the rows run at once. Where weights have to be fetched, batches
    that fit half of the budget are run, and patched, in lockstep, and all are kept or none.
    """

    def __init__(
        self,
        plug: Plug,
        pairs: PromptPairs,
        metric: Metric,
        kinds: Sequence[str],
        budget: Budget,
        pairs_at_once: int | None = None,
    ) -> None:
        """kinds: the node kinds that will be patched; pairs_at_once: of a batch, by default as the budget has it.

        weights: bytes of fetched weights that are held; budget: what is left beside them.
        """
        self._turns = Lockstep(plug, budget) if plug.offloaded else Alone(budget)
        self.weights = budget.bytes - self._turns.budget.bytes
        budget = self._turns.budget
        order = torch.argsort(pairs.split, descending=True, stable=True)
        size = len(pairs)
        most = int(torch.maximum(pairs.lengths, pairs.corrupted_lengths).max())
        if not metric.all_pairs_at_once:
            room = budget.bytes // 4
            size = pairs_at_once or min(_PAIRS_AT_ONCE, stored_pairs(plug, room, most, kinds))
        self.batches = (
            [torch.arange(len(pairs))] if size >= len(pairs) else list(torch.split(order, size))
        )
        self._together, self._keeps = 1, True
        if plug.offloaded:
            batch = stored_pair(plug, 0, most, kinds) * len(self.batches[0])
            self._together = max(1, budget.bytes // 2 // batch)
            self._keeps = self._together >= len(self.batches)
        self.plug, self.pairs, self.metric, self.kinds = plug, pairs, metric, kinds
        self.budget, self._stored = budget, 0
        self._kept: dict[int, PatchSession] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def clean_value(self) -> Tensor:
        """The metric of the unpatched runs, (pairs,), on the CPU."""
        if len(self._values) < len(self.batches):
            with self.plug.plugged():
                for _ in self.sessions():
                    pass
        return self._gather([self._values[number] for number in range(len(self.batches))])

    def sessions(self) -> Iterator[PatchSession]:
        """Each batch, inside `plug.plugged()`."""
        for group in self._groups(range(len(self.batches))):
            yield from self._sessions(group)

    def _groups(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Numbers of batches that are run together."""
        for first in range(0, len(numbers), self._together):
            yield numbers[first : first + self._together]

    def _sessions(self, numbers: Sequence[int]) -> list[PatchSession]:
        """A group's sessions, with room for patched rows beside all of them."""
        made = {
            number: PatchSession(
                self.plug, self.pairs[self.batches[number]], self.metric, self.kinds
            )
            for number in numbers
            if number not in self._kept
        }
        self._turns.open([session.open() for session in made.values()])
        beside = 0
        for number, session in made.items():
            self._values[number] = session.clean_value.cpu()
            stored = session.stored_bytes()
            if self._keeps and self._stored + stored <= self.budget.bytes // 2:
                self._kept[number], self._stored = session, self._stored + stored
            else:
                beside += stored
        sessions = [self._kept.get(number) or made[number] for number in numbers]
        for session in sessions:
            session.room = (self.budget.bytes - self._stored - beside) // self._turns.share
        return sessions

    def _gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all batches back in the pairs' own order."""
        return torch.cat(list(parts))[torch.argsort(torch.cat(self.batches))]

    def effects(
        self,
        nodes: Sequence[Node],
        subsets: Sequence[Sequence[int]] | None = None,
        pair_index: Tensor | None = None,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> tuple[Tensor, Tensor]:
        """Signed effects (pairs, subsets) of patching subsets of `nodes` (numbers into it; each alone when None).

        pair_index: (subsets,), the one pair each subset is measured on. Also returns which effects were measured, bool
        of the same shape: a pair that lacks a node's position, or was not asked for, is False.
        """
        with self.plug.plugged():
            return self._effects(NodeTable.of(self.plug, nodes), subsets, pair_index, advance)

    def _effects(
        self,
        table: NodeTable,
        subsets: Sequence[Sequence[int]] | None,
        pair_index: Tensor | None,
        advance: Callable[[int], object],
    ) -> tuple[Tensor, Tensor]:
        if subsets is None:
            count = len(table.kind)
            subset = node = torch.arange(count)
        else:
            count = len(subsets)
            sizes = torch.tensor([len(members) for members in subsets], dtype=torch.int64)
            subset = torch.arange(count).repeat_interleave(sizes)
            node = torch.tensor([i for members in subsets for i in members], dtype=torch.int64)
        effect = torch.zeros((len(self.pairs), count), dtype=torch.float64)
        measured = torch.zeros(effect.shape, dtype=torch.bool)
        dtype = torch.float32
        batch_of = torch.empty(len(self.pairs), dtype=torch.int64)
        for number, rows in enumerate(self.batches):
            batch_of[rows] = number
        asked = set(
            range(len(self.batches)) if pair_index is None else batch_of[pair_index].tolist()
        )
        # the runs of others need not be made again
        wanted = [n for n in range(len(self.batches)) if n in asked or n not in self._values]
        for group in self._groups(wanted):
            dtype = self._measure(group, table, subset, node, pair_index, advance, effect, measured)
        return effect.to(dtype), measured

    def _measure(
        self,
        group: Sequence[int],
        table: NodeTable,
        subset: Tensor,
        node: Tensor,
        pair_index: Tensor | None,
        advance: Callable[[int], object],
        effect: Tensor,
        measured: Tensor,
    ) -> torch.dtype:
        """Put the effects on a group of batches into `effect` and `measured`; the metric's type. No session is left behind."""
        count = effect.shape[1]
        parts: list[tuple[Any, Tensor, Tensor]] = []
        jobs: list[Job] = []
        sessions = self._sessions(group)
        for number, session in zip(group, sessions, strict=True):
            rows = self.batches[number]
            where: Any = rows
            present = _all_present(self.pairs[rows], table, subset, node, count)
            if pair_index is None:
                part, some = session.start(table, subset, node, count, advance=advance)
            else:
                place = torch.full((len(self.pairs),), -1)
                place[rows] = torch.arange(len(rows))
                mine = (place[pair_index] >= 0).nonzero().flatten()
                renumber = torch.full((count,), -1)
                renumber[mine] = torch.arange(len(mine))
                member = renumber[subset] >= 0
                pair = place[pair_index[mine]]
                where, present = (pair_index[mine], mine), present[pair, mine]
                part, some = session.start(
                    table, renumber[subset[member]], node[member], len(mine), pair, advance
                )
            parts.append((where, part, present))
            jobs += some
        self._turns.run(jobs, sessions[0].room)
        for where, part, present in parts:
            effect[where], measured[where] = part.double(), present
        return sessions[0].clean_value.dtype


def _all_present(
    pairs: PromptPairs, table: NodeTable, subset: Tensor, node: Tensor, subsets: int
) -> Tensor:
    """(pairs, subsets) bool: the pair has a real token, or the span, at every node of the subset."""
    missing = ~pairs.present.cpu()[:, table.position[node]]
    count = torch.zeros((len(pairs), subsets), dtype=torch.int64).index_add_(
        1, subset, missing.long()
    )
    return count == 0


class PatchSession:
    """A batch of pairs, ready to be patched once `open` has run: both runs, the node values of both, and the clean metric."""

    runs: PairRuns
    clean_value: Tensor
    source_logits: Tensor | None
    clean_logits: Tensor | None

    def __init__(
        self,
        plug: Plug,
        pairs: PromptPairs,
        metric: Metric,
        kinds: Sequence[str],
    ) -> None:
        """kinds: the node kinds that will be patched."""
        self.plug, self.pairs, self.metric, self.kinds = plug, pairs, metric, kinds
        self.dictionaries = plug.asked(kinds)
        self.room = 0  # bytes for the rows run at once; Patching sets it when all runs are stored

    def open(self) -> Steps[None]:
        """Steps: entering, every layer, the logits."""
        plug, metric = self.plug, self.metric
        batch = enter_pairs(plug, self.pairs, *extent(plug, self.pairs))
        self.runs = yield from run_in_steps(plug, batch, self.kinds, keep_values=True)
        check_outputs(plug, batch, self.runs)
        del batch
        yield
        with torch.no_grad():
            last, self.source_logits = self.runs.clean[-1], None
            if metric.needs_source_logits:
                logits, self.source_logits = both_logits(plug, self.runs, last, metric)
            else:
                logits = metric_logits(plug, self.runs, last, metric)
            self.clean_value = metric(logits, self.runs.given, self.source_logits)
            self._check_rows(logits)
            whole = metric.positions == "all" or metric.all_pairs_at_once
            self.clean_logits = logits if whole else None
        self.end = only_end(self.runs.pairs, metric)

    def _check_rows(self, logits: Tensor) -> None:
        """A metric that is called with parts of the pairs must not mix them; one that sees all at once may."""
        if self.metric.all_pairs_at_once or self.metric in METRICS_BY_NAME.values():
            return
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            value = self.metric(leaf, self.runs.given, self.source_logits)
            if value.requires_grad:  # else nothing can be asked
                check_rows(self.metric, value, leaf)

    def stored_bytes(self) -> int:
        """Bytes of both runs and of their node values."""
        kept = [*self.runs.clean, *self.runs.corrupted]
        for values, keys_values in zip(self.runs.values, self.runs.keys_values, strict=True):
            kept += [*values.values(), *(keys_values or ())]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(sizes.values())

    def start(
        self,
        table: NodeTable,
        subset: Tensor,
        node: Tensor,
        subsets: int,
        pair_index: Tensor | None = None,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> tuple[Tensor, list[Job]]:
        """Signed effects of patching each subset of nodes at once, and what has to be run before they are there.

        subset, node: (members,), subset number and row of `table` of every member;
        pair_index: (subsets,), the pair each subset is measured on; every pair when None.
        The effects are (pairs, subsets), or (subsets,) with pair_index.
        """
        pairs = len(self.pairs)
        if pair_index is None:
            pair = torch.arange(pairs).repeat_interleave(len(subset))
            subset, node = subset.repeat(pairs), node.repeat(pairs)
            row = pair * subsets + subset
            row_pair = torch.arange(pairs).repeat_interleave(subsets)
        else:
            pair, row, row_pair = pair_index[subset], subset, pair_index
        member, position = self._positions(pair, table.position[node])
        pair, node = pair[member], node[member]
        moved = self._moves(pair, position)
        patches = Patches(
            row[member], table.kind[node], table.layer[node], position, table.index[node]
        ).take(moved)
        found = torch.zeros(len(row_pair), dtype=self.clean_value.dtype)
        if self.metric.all_pairs_at_once:
            if pair_index is not None:
                raise ValueError(
                    "pair_index needs a metric of single pairs, got one that sees all pairs at once"
                )
            return found.view(pairs, subsets), self._all_at_once(
                patches, found.view(pairs, subsets), advance
            )
        batches = self._batches(patches, len(row_pair))
        advance(len(row_pair) - sum(len(batch.rows) for batch in batches))
        jobs = [
            self._job(
                [batch], partial(self._measure, patches, batch.rows, row_pair, found, advance)
            )
            for batch in batches
        ]
        return found.view(pairs, subsets) if pair_index is None else found, jobs

    def _job(self, batches: Sequence[RowBatch], steps: Callable[[int], Steps[None]]) -> Job:
        rotations = 2 * len(self.pairs) * self.plug.inspection.head_dim
        hidden = self.plug.inspection.hidden
        waits = sum((len(b.rows) * hidden + rotations) * self._width(b.begin) for b in batches)
        return Job(steps, min(batch.first for batch in batches), self.plug.itemsize * waits)

    def _measure(
        self,
        patches: Patches,
        rows: Tensor,
        row_pair: Tensor,
        found: Tensor,
        advance: Callable[[int], object],
        first: int,
    ) -> Steps[None]:
        """Run a batch of rows from layer `first` on; their values are put into `found`."""
        logits = yield from self._run(patches, rows, row_pair, first)
        found[rows] = self._values(logits, row_pair[rows]).cpu()
        advance(len(rows))

    def _positions(self, pair: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Positions, from the prompt's first token, of each pair's column or of all tokens of its span, and the number
        of the member that each belongs to; all (members,) or longer."""
        spans = self.pairs.spans
        if spans is None:
            return torch.arange(len(pair)), column - self.pairs.starts.cpu()[pair]
        first, end = spans.clean.cpu()[pair, column].unbind(1)
        member = torch.arange(len(pair)).repeat_interleave(end - first)
        before = (end - first).cumsum(0) - (end - first)
        return member, first[member] + torch.arange(len(member)) - before[member]

    def _moves(self, pair: Tensor, position: Tensor) -> Tensor:
        """Bool: patching can change something there: the position is real, not before the first differing token, and a
        corrupted value stands for it."""
        first, length = self.pairs.split.cpu()[pair], self.pairs.lengths.cpu()[pair]
        moved = (position >= first) & (position < length)
        if self.runs.source is not None:
            at = (position - self.runs.start).clamp(0, self.runs.positions - 1)
            moved &= self.runs.source.cpu()[pair, at] >= 0
        return moved

    def _values(self, logits: Tensor, pair: Tensor) -> Tensor:
        at = pair.to(logits.device)
        source = None if self.source_logits is None else self.source_logits[at]
        return self.metric(logits, self.pairs[pair], source) - self.clean_value[at]

    def _all_at_once(
        self, patches: Patches, found: Tensor, advance: Callable[[int], object]
    ) -> list[Job]:
        """For a metric that must see all pairs' logits in one call: as many subsets at a time as one batch has rows for."""
        pairs, subsets = found.shape
        jobs = []
        group = max(1, self._rows(self.runs.start) // pairs)
        for first in range(0, subsets, group):
            part = torch.arange(first, min(first + group, subsets))
            column = patches.row % subsets
            mine = patches.take((column >= first) & (column < first + group))
            batches = self._batches(mine, pairs * subsets)
            if batches:
                steps = partial(self._measure_at_once, mine, part, batches, found, advance)
                jobs.append(self._job(batches, steps))
            else:
                advance(pairs * len(part))
        return jobs

    def _measure_at_once(
        self,
        patches: Patches,
        part: Tensor,
        batches: Sequence[RowBatch],
        found: Tensor,
        advance: Callable[[int], object],
        first: int,
    ) -> Steps[None]:
        """_measure for the subsets `part` on all pairs."""
        pairs, subsets = found.shape
        row_pair = torch.arange(pairs).repeat_interleave(subsets)
        runs = [self._run(patches, batch.rows, row_pair, first) for batch in batches]
        patched = yield from abreast(runs)
        assert self.clean_logits is not None
        logits = self.clean_logits.expand(len(part), *self.clean_logits.shape).clone()
        for (rows, *_), theirs in zip(batches, patched, strict=True):
            at = (rows % subsets - part[0]).to(logits.device), row_pair[rows].to(logits.device)
            logits[at] = theirs
        for subset in torch.unique(patches.row % subsets).tolist():  # the others change nothing
            values = self.metric(logits[subset - int(part[0])], self.pairs, self.source_logits)
            found[:, subset] = (values - self.clean_value).cpu()
        advance(pairs * len(part))

    # ---- batches of rows

    def _batches(self, patches: Patches, rows: int) -> list[RowBatch]:
        """Rows with a patch, in batches of similar first position, each sorted by first layer."""
        layer, position = _firsts(patches, rows)
        return list(row_batches(self.plug, torch.unique(patches.row), layer, position, self._rows))

    def _rows(self, begin: int) -> int:
        """Rows run at once whose first position is `begin`."""
        logits = self.metric.columns(self.pairs)
        room = self.room * 7 // 8 if self.dictionaries else self.room  # the rest is for features
        return patched_rows(self.plug, room, self._width(begin), begin, logits)

    def _width(self, begin: int) -> int:
        """Positions that are run of rows whose first one is `begin`."""
        return self.runs.start + self.runs.positions - begin

    @torch.no_grad()
    def _run(self, patches: Patches, rows: Tensor, row_pair: Tensor, first: int) -> Steps[Tensor]:
        """Run patched rows, none of which is patched below layer `first`, to the logits of the metric, in the order of `rows`.

        Steps: entering, every layer from `first` on, the logits.
        """
        plug, runs = self.plug, self.runs
        number = torch.full((int(row_pair.numel()),), -1, dtype=torch.int64)
        number[rows] = torch.arange(len(rows))
        mine = patches.take(number[patches.row] >= 0)
        mine = mine._replace(row=number[mine.row])
        layers, positions = _firsts(mine, len(rows))
        begin = int(positions.min()) if plug.moves else 0
        order = torch.argsort(layers, stable=True)
        back = torch.argsort(order)
        mine = mine._replace(row=back[mine.row])
        layers, pair = layers[order], row_pair[rows][order].to(plug.device)
        ids = filled(runs.pairs.clean_ids, runs.pairs.attention_mask)[:, begin:]
        arguments, last, end = plug.enter(ids, begin)[1], len(plug.layers) - 1, None
        if plug.moves and self.end is not None and begin < self.end:
            end = plug.enter(ids[:, -1:], self.end)[1][last]
        x = runs.clean[0].new_empty((0, ids.shape[1], runs.clean[0].shape[-1]))
        for layer in range(first, last + 1):
            yield
            active = int((layers <= layer).sum())
            if active == 0:
                continue
            x = plug.moved(x, layer)
            joining = pair[len(x) : active].to(x.device)
            if len(joining):
                x = torch.cat([x, runs.clean[layer][joining, begin - runs.start :]])
            given = arguments[layer]
            if layer == last and end is not None:
                x = self._run_end(x, mine, pair[:active], begin, given, end)
            else:
                prefix = self._clean_prefix(layer, pair[:active], begin)
                x = self._run_layer(layer, x, mine, pair, begin, given, prefix)
                del prefix
        yield
        if end is not None and self.end is not None:
            x, begin = x[:, -1:], self.end
        if self.dictionaries:  # some may stand behind the last layer
            joining = pair[len(x) :].to(runs.clean[-1].device)
            x = torch.cat([x.to(joining.device), runs.clean[-1][joining, begin - runs.start :]])
            x = self._patch(last + 1, mine, pair, begin)[0]("resid_pre", x)
        check_finite(x, "a patched run")
        return self._logits(x[back.to(x.device)], row_pair[rows].to(plug.device), begin)

    def _run_end(
        self,
        x: Tensor,
        patches: Patches,
        pair: Tensor,
        begin: int,
        arguments: LayerArguments,
        at_end: LayerArguments,
    ) -> Tensor:
        """The last layer's output at the metric's one position, on rows x (rows, positions from `begin`, hidden)."""
        plug, layer, end = self.plug, len(self.plug.layers) - 1, self.end
        assert end is not None
        patch, _ = self._patch(layer, patches, pair, begin)
        given = arguments.rows(pair, len(self.pairs))
        prefix = self._clean_prefix(layer, pair, begin)
        whole = plug.keys_values(layer, patch("resid_pre", x), given, prefix, patch)
        prefix = Prefix(*(t[:, :, :end] for t in whole))
        return self._run_layer(layer, x[:, end - begin :], patches, pair, end, at_end, prefix)

    def _run_layer(
        self,
        layer: int,
        x: Tensor,
        patches: Patches,
        pair: Tensor,
        begin: int,
        arguments: LayerArguments,
        prefix: Prefix | None,
    ) -> Tensor:
        """One layer on the active rows x (rows, positions from `begin`, hidden), with its patches there made."""
        patch, kinds = self._patch(layer, patches, pair, begin)
        run = LayerRun(self.plug.backend, patch if kinds else None, prefix, kinds)
        rows = arguments.rows(pair[: len(x)], len(self.pairs))
        return self.plug.run_layer(layer, patch("resid_pre", x), rows, run)

    def _clean_prefix(self, layer: int, pair: Tensor, begin: int) -> Prefix | None:
        """The clean keys and values of the positions before `begin`, a row for each of `pair`."""
        if not begin:
            return None
        kept = self.runs.keys_values[layer]
        assert kept is not None  # prefixes are run alone only where every layer has attention
        return Prefix(*(t[:, :, :begin][pair.to(t.device)] for t in kept))

    def _patch(
        self, layer: int, patches: Patches, pair: Tensor, begin: int
    ) -> tuple[Visit, tuple[str, ...]]:
        """A function that makes a layer's patches from position `begin` on, and the kinds that have some."""
        here = patches.take((patches.layer == layer) & (patches.position >= begin))
        kinds, start = self.plug.kinds, self.runs.start
        device = self.plug.device_of(min(layer, len(self.plug.layers) - 1))
        pair = pair.to(device)
        present = {kinds[i] for i in torch.unique(here.kind).tolist()}
        dictionaries = [
            d for d in self.dictionaries if d.seat[0] == layer and not present.isdisjoint(d.kinds)
        ]
        corrupted = self._corrupted(layer) if present else {}

        def patch(kind: str, value: Tensor) -> Tensor:
            at = here.take(here.kind == KINDS.index(kind))
            if len(at.row):
                mine, index = self.plug.shares.index(kind, at.index)
                at = at._replace(index=index).take(mine)
                row, position, index = (
                    at.row.to(device),
                    at.position.to(device),
                    at.index.to(device),
                )
                source, target = position - start, position - begin
                value = value.clone()
                if kind in COARSE_KINDS:
                    value[row, target] = corrupted[kind][pair[row], source]
                elif kind == "neuron":
                    value[row, target, index] = corrupted[kind][pair[row], source, index]
                else:
                    value[row, index, target] = corrupted[kind][pair[row], index, source]
            for dictionary in dictionaries:
                if dictionary.seat[1] == kind:
                    value = self._exchange(dictionary, here, pair, begin, value, corrupted[kind])
            return value

        sites = [d.seat[1] for d in dictionaries]
        return patch, tuple(kind for kind in KINDS if kind in present or kind in sites)

    def _corrupted(self, layer: int) -> dict[str, Tensor]:
        """The corrupted run's values in a layer, where they are put; behind the last layer its output."""
        if layer < len(self.plug.layers):
            return self.runs.values[layer]
        return self.runs.aligned(self.plug, layer, {"resid_pre": self.runs.corrupted[-1]})

    def _exchange(
        self,
        dictionary: Dictionary,
        here: Patches,
        pair: Tensor,
        begin: int,
        value: Tensor,
        corrupted: Tensor,
    ) -> Tensor:
        """The value at a dictionary's place, (rows, positions from `begin`, ...), with its patches among `here` made.

        All patches of a row and position are made together, as many of these at a time as there is room for features.
        """
        features, error = (here.kind == self.plug.kinds.index(kind) for kind in dictionary.kinds)
        mine, errors = here.take(features | error), error[features | error]
        at = torch.stack([mine.row, mine.position])
        places, place = torch.unique(at, dim=1, return_inverse=True)
        value = value.clone()
        if dictionary.seat[1] == "z":
            by_position, corrupted = value.transpose(1, 2), corrupted.transpose(1, 2)
        else:
            by_position = value
        step = max(1, features_at_once(self.plug, self.room) // dictionary.features)
        for first in range(0, places.shape[1], step):
            row, position = places[:, first : first + step].to(value.device)
            inside = (place >= first) & (place < first + len(row))
            chosen = torch.stack([place - first, mine.index])[:, inside & ~errors]
            whole = torch.zeros(len(row), dtype=torch.bool)
            whole[place[inside & errors] - first] = True
            x, other = (
                values[rows, columns].flatten(1)
                for values, rows, columns in (
                    (by_position, row, position - begin),
                    (corrupted, pair[row], position - self.runs.start),
                )
            )
            x = exchanged(dictionary, x, other, chosen.to(x.device), whole.to(x.device))
            by_position[row, position - begin] = x.view(len(row), *by_position.shape[2:])
        return value

    def _logits(self, x: Tensor, pair: Tensor, begin: int) -> Tensor:
        """Logits where the metric looks, of the last layer's output x (rows, positions from `begin`, hidden)."""
        if self.metric.positions == "last":
            rows = torch.arange(len(x), device=x.device)
            last = (self.runs.pairs.last[pair] - begin).to(x.device)
            return self.plug.logits(x[rows, last][:, None])
        assert self.clean_logits is not None
        given = self.pairs
        logits = self.clean_logits[pair].clone()
        patched = self.plug.logits(x)
        columns = torch.arange(logits.shape[1], device=logits.device)
        source = columns - given.starts.to(logits.device)[pair][:, None] - begin
        real = (source >= 0) & (source < patched.shape[1])
        gathered = patched.gather(
            1, source.clamp(0, patched.shape[1] - 1)[..., None].expand_as(logits)
        )
        return torch.where(real[..., None], gathered, logits)


def only_end(pairs: PromptPairs, metric: Metric) -> int | None:
    """The one position at which the last layer's output is needed, from the prompts' first token; None where there are more."""
    lengths = set(pairs.lengths.tolist())
    return lengths.pop() - 1 if len(lengths) == 1 and metric.positions == "last" else None


def row_batches(
    plug: Plug, rows: Tensor, layer: Tensor, position: Tensor, most: Callable[[int], int]
) -> Iterator[RowBatch]:
    """Rows in batches of similar first position, each sorted by first layer.

    layer, position: the first patched ones of every row number; most: rows at once whose first position is the one given.
    """
    key = position[rows] * len(plug.layers) + layer[rows]
    order, start = rows[torch.argsort(key, stable=True)], 0
    while start < len(order):
        begin = int(position[order[start]]) if plug.moves else 0
        mine = order[start : start + most(begin)]
        yield RowBatch(mine, min(int(layer[mine].min()), len(plug.layers) - 1), begin)
        start += len(mine)


def _firsts(patches: Patches, rows: int) -> tuple[Tensor, Tensor]:
    """Lowest patched layer and first patched position of each row; rows without a patch get large numbers."""
    none = torch.iinfo(torch.int64).max
    first = torch.full((2, rows), none)
    for i, column in enumerate((patches.layer, patches.position)):
        first[i].scatter_reduce_(0, patches.row, column, "amin")
    return first[0], first[1]
