"""Exact activation patching: the effect of one node, or of many at once, by running the model with it patched.

Patching a node of layer m at position t changes nothing below m and nothing before t. So a row starts from the stored
clean input of its lowest patched layer, joins the batch there, computes only the positions from its first patched one
on (with the clean keys and values as prefix), and ends in logits only where the metric looks. Nodes before a pair's
first differing token, or in its padding, have effect 0 and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atp_fast.attribution.batch import filled
from atp_fast.attribution.memory import Budget, patched_rows, stored_pairs
from atp_fast.attribution.runs import PairRuns, both_logits, metric_logits, run_pairs
from atp_fast.hf import LayerArguments, LayerRun, Plug, Prefix, Visit, check_finite
from atp_fast.metrics import METRICS_BY_NAME, Metric, check_rows
from atp_fast.nodes import COARSE_KINDS, KINDS, Node
from atp_fast.prompts.pairs import PromptPairs


class NodeTable(NamedTuple):
    """Nodes as columns of numbers: kind (index into KINDS), layer, position (user's column), index; all (nodes,)."""

    kind: Tensor
    layer: Tensor
    position: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not used

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> NodeTable:
        number = {kind: i for i, kind in enumerate(KINDS)}
        rows = [(number[kind], layer, position, index) for kind, layer, position, index in nodes]
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


_PAIRS_AT_ONCE = 16  # more of them share fewer leading tokens


class Patching:
    """Pairs ready to be patched again and again, in batches.

    The two runs of a batch, a quarter of the budget at most, are made when it is first patched, and kept for the next time as
    long as all that are kept fit half of the budget; the rest is for the rows run at once.
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
        """kinds: the node kinds that will be patched; pairs_at_once: of a batch, by default as the budget has it."""
        order = torch.argsort(pairs.split, descending=True, stable=True)
        size = len(pairs)
        if not metric.all_pairs_at_once:
            most = int(torch.maximum(pairs.lengths, pairs.corrupted_lengths).max())
            room = budget.bytes // 4
            size = pairs_at_once or min(_PAIRS_AT_ONCE, stored_pairs(plug, room, most, kinds))
        self.batches = (
            [torch.arange(len(pairs))] if size >= len(pairs) else list(torch.split(order, size))
        )
        self.plug, self.pairs, self.metric, self.kinds = plug, pairs, metric, kinds
        self._budget, self._stored = budget, 0
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
        return (self._session(number) for number in range(len(self.batches)))

    def _session(self, number: int) -> PatchSession:
        session = self._kept.get(number)
        if session is None:
            pairs = self.pairs[self.batches[number]]
            session = PatchSession(self.plug, pairs, self.metric, self.kinds)
            self._values[number] = session.clean_value.cpu()
            stored = session.stored_bytes()
            if self._stored + stored <= self._budget.bytes // 2:
                self._kept[number], self._stored = session, self._stored + stored
        beside = 0 if number in self._kept else session.stored_bytes()
        session.room = self._budget.bytes - self._stored - beside
        return session

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
            return self._effects(NodeTable.of(nodes), subsets, pair_index, advance)

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
        for number, rows in enumerate(self.batches):
            place = torch.full((len(self.pairs),), -1)
            place[rows] = torch.arange(len(rows))
            mine = None if pair_index is None else (place[pair_index] >= 0).nonzero().flatten()
            if mine is not None and len(mine) == 0 and number in self._values:
                continue  # its runs need not be made again
            session = self._session(number)
            dtype = session.clean_value.dtype
            present = _all_present(self.pairs[rows], table, subset, node, count)
            if pair_index is None or mine is None:
                part = session.effects(table, subset, node, count, advance=advance)
                effect[rows] = part.double()
                measured[rows] = present
                del session  # before the next one is made
                continue
            renumber = torch.full((count,), -1)
            renumber[mine] = torch.arange(len(mine))
            member = renumber[subset] >= 0
            where = pair_index[mine]
            effect[where, mine] = session.effects(
                table, renumber[subset[member]], node[member], len(mine), place[where], advance
            ).double()
            measured[where, mine] = present[place[where], mine]
            del session
        return effect.to(dtype), measured


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
    """A batch of pairs ready to be patched: both runs, the node values of both, and the clean metric."""

    def __init__(
        self,
        plug: Plug,
        pairs: PromptPairs,
        metric: Metric,
        kinds: Sequence[str],
    ) -> None:
        """kinds: the node kinds that will be patched."""
        self.plug, self.pairs, self.metric = plug, pairs, metric
        self.room = 0  # bytes for the rows run at once; Patching sets it when all runs are stored
        self.runs: PairRuns = run_pairs(plug, pairs, kinds, keep_values=True)
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
        lengths = set(self.runs.pairs.lengths.tolist())
        # the one position that the last layer's output is needed at
        self.end = lengths.pop() - 1 if len(lengths) == 1 and metric.positions == "last" else None

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

    def effects(
        self,
        table: NodeTable,
        subset: Tensor,
        node: Tensor,
        subsets: int,
        pair_index: Tensor | None = None,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> Tensor:
        """Signed effects of patching each subset of nodes at once.

        subset, node: (members,), subset number and row of `table` of every member;
        pair_index: (subsets,), the pair each subset is measured on; every pair when None.
        Returns (pairs, subsets), or (subsets,) with pair_index.
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
            self._all_at_once(patches, found.view(pairs, subsets), advance)
        else:
            done = 0
            for rows in self._batches(patches, len(row_pair)):
                logits = self._run(patches, rows, row_pair)
                found[rows] = self._values(logits, row_pair[rows]).cpu()
                advance(len(rows))
                done += len(rows)
            advance(len(row_pair) - done)
        return found.view(pairs, subsets) if pair_index is None else found

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
    ) -> None:
        """For a metric that must see all pairs' logits in one call: as many subsets at a time as one batch has rows for."""
        pairs, subsets = found.shape
        assert self.clean_logits is not None
        row_pair = torch.arange(pairs).repeat_interleave(subsets)
        group = max(1, self._rows(self.runs.start) // pairs)
        for first in range(0, subsets, group):
            part = torch.arange(first, min(first + group, subsets))
            column = patches.row % subsets
            mine = patches.take((column >= first) & (column < first + group))
            logits = self.clean_logits.expand(len(part), *self.clean_logits.shape).clone()
            for rows in self._batches(mine, pairs * subsets):
                at = (rows % subsets - first).to(logits.device), row_pair[rows].to(logits.device)
                logits[at] = self._run(mine, rows, row_pair)
            for subset in torch.unique(mine.row % subsets).tolist():  # the others change nothing
                values = self.metric(logits[subset - first], self.pairs, self.source_logits)
                found[:, subset] = (values - self.clean_value).cpu()
            advance(pairs * len(part))

    # ---- batches of rows

    def _batches(self, patches: Patches, rows: int) -> list[Tensor]:
        """Rows with a patch, in batches of similar first position, each sorted by first layer."""
        layer, position = _firsts(patches, rows)
        touched = torch.unique(patches.row)
        key = position[touched] * len(self.plug.layers) + layer[touched]
        order = touched[torch.argsort(key, stable=True)]
        batches, start = [], 0
        while start < len(order):
            begin = int(position[order[start]]) if self.plug.moves else 0
            size = self._rows(begin)
            batches.append(order[start : start + size])
            start += size
        return batches

    def _rows(self, begin: int) -> int:
        """Rows run at once whose first position is `begin`."""
        logits = self.pairs.clean_ids.shape[1] if self.metric.positions == "all" else 1
        width = self.runs.start + self.runs.positions - begin
        return patched_rows(self.plug, self.room, width, begin, logits)

    def _run(self, patches: Patches, rows: Tensor, row_pair: Tensor) -> Tensor:
        """Run patched rows from their first layer to the logits of the metric, in the order of `rows`."""
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
        with torch.no_grad():
            arguments = plug.enter(ids, begin)[1]
            x = runs.clean[0].new_empty((0, ids.shape[1], runs.clean[0].shape[-1]))
            last = len(plug.layers) - 1
            for layer in range(int(layers[0]), last + 1):
                active = int((layers <= layer).sum())
                joining = pair[len(x) : active]
                if len(joining):
                    x = torch.cat([x, runs.clean[layer][joining, begin - runs.start :]])
                prefix = self._clean_prefix(layer, pair[:active], begin)
                if layer == last and plug.moves and self.end is not None and begin < self.end:
                    patch, _ = self._patch(layer, mine, pair, begin)
                    given = arguments[layer].rows(pair, len(self.pairs))
                    whole = plug.keys_values(layer, patch("resid_pre", x), given, prefix, patch)
                    prefix = Prefix(*(t[:, :, : self.end] for t in whole))
                    x, begin = x[:, self.end - begin :], self.end
                    arguments = plug.enter(ids[:, -1:], begin)[1]
                x = self._run_layer(layer, x, mine, pair, begin, arguments[layer], prefix)
            check_finite(x, "a patched run")
            return self._logits(x[back.to(x.device)], row_pair[rows].to(plug.device), begin)

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
        return Prefix(*(t[:, :, :begin][pair] for t in kept))

    def _patch(
        self, layer: int, patches: Patches, pair: Tensor, begin: int
    ) -> tuple[Visit, tuple[str, ...]]:
        """A function that makes a layer's patches from position `begin` on, and the kinds that have some."""
        here = patches.take((patches.layer == layer) & (patches.position >= begin))
        corrupted, start, device = self.runs.values[layer], self.runs.start, pair.device

        def patch(kind: str, value: Tensor) -> Tensor:
            at = here.take(here.kind == KINDS.index(kind))
            if len(at.row) == 0:
                return value
            row, position, index = at.row.to(device), at.position.to(device), at.index.to(device)
            source, target = position - start, position - begin
            value = value.clone()
            if kind in COARSE_KINDS:
                value[row, target] = corrupted[kind][pair[row], source]
            elif kind == "neuron":
                value[row, target, index] = corrupted[kind][pair[row], source, index]
            else:
                value[row, index, target] = corrupted[kind][pair[row], index, source]
            return value

        return patch, tuple(KINDS[i] for i in torch.unique(here.kind).tolist())

    def _logits(self, x: Tensor, pair: Tensor, begin: int) -> Tensor:
        """Logits where the metric looks, of the last layer's output x (rows, positions from `begin`, hidden)."""
        rows = torch.arange(len(x), device=x.device)
        if self.metric.positions == "last":
            return self.plug.logits(x[rows, self.runs.pairs.last[pair] - begin][:, None])
        assert self.clean_logits is not None
        given = self.pairs
        logits = self.clean_logits[pair].clone()
        patched = self.plug.logits(x)
        columns = torch.arange(logits.shape[1], device=x.device)
        source = columns - given.starts.to(x.device)[pair][:, None] - begin
        real = (source >= 0) & (source < patched.shape[1])
        gathered = patched.gather(
            1, source.clamp(0, patched.shape[1] - 1)[..., None].expand_as(logits)
        )
        return torch.where(real[..., None], gathered, logits)


def _firsts(patches: Patches, rows: int) -> tuple[Tensor, Tensor]:
    """Lowest patched layer and first patched position of each row; rows without a patch get large numbers."""
    none = torch.iinfo(torch.int64).max
    first = torch.full((2, rows), none)
    for i, column in enumerate((patches.layer, patches.position)):
        first[i].scatter_reduce_(0, patches.row, column, "amin")
    return first[0], first[1]
