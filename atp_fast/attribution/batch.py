"""A batch of pairs before a layer runs: everything about it that the host must know or decide.

What follows from here on, the layers' runs and the sweep, depends on the host by shapes alone (attribution.replay).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atp_fast.attribution.scores import Place
from atp_fast.hf import LayerArguments, Plug
from atp_fast.prompts.pairs import PromptPairs

_STEP = 16


class Entered(NamedTuple):
    """Prompts at the first layer: hidden states (rows, positions, hidden), and what every layer is given beside them."""

    x: Tensor
    arguments: list[LayerArguments]


@dataclass(frozen=True)
class Batch:
    """Pairs whose runs can begin; tensors lie on the model's device.

    given: the pairs in the user's layout; pairs: the same, right-padded to start + positions columns; start: leading
    positions, the same in all prompts, that are run once, as `prefix` (one row where all pairs share them);
    both: the clean prompts from `start` on, and the corrupted ones behind them; source: the corrupted position, from
    `start` on, that stands for each clean one, -1 where none does, (pairs, positions), None where each stands for itself;
    live: real positions from each pair's own first differing token on, that a value of the corrupted run stands for, (pairs,
    positions) bool; spans: which of them belong to each span, (pairs, spans, positions), None without spans;
    column: the user's column of the pairs' first positions, or, where that is not one for all, of each, (pairs,); nothing
    that counts with spans.
    """

    given: PromptPairs
    pairs: PromptPairs
    start: int
    prefix: Entered | None
    both: Entered
    source: Tensor | None
    live: Tensor
    any_live: bool
    all_live: bool
    spans: Tensor | None
    column: int | Tensor

    @property
    def positions(self) -> int:
        """Positions that are run: all from `start` on."""
        return self.pairs.clean_ids.shape[1] - self.start

    def place(self, rows: Tensor, width: int) -> Place:
        """Where the batch's effects belong among scores of `width` columns; rows: the pairs' numbers."""
        if self.spans is not None:
            return Place(rows, slice(None), None)
        live = None if self.all_live else self.live
        return Place.of(rows, self.column, self.positions, live, width)


def filled(ids: Tensor, mask: Tensor) -> Tensor:
    """Right-padded ids with each row's last token in its padding: no real position sees it, no warning is due."""
    return torch.where(mask, ids, ids.gather(1, mask.sum(1, keepdim=True) - 1))


def extent(plug: Plug, pairs: PromptPairs) -> tuple[int, int]:
    """Leading positions that are the same in all prompts, up to the shortest prompt's last, and those that remain of the
    longest."""
    longest = int(torch.maximum(pairs.lengths, pairs.corrupted_lengths).max())
    if not plug.moves:
        return 0, longest
    shortest = torch.minimum(pairs.lengths, pairs.corrupted_lengths)
    start = min(int(pairs.split.min()), int(shortest.min()) - 1)
    return start, longest - start


def sweep_extent(plug: Plug, pairs: PromptPairs) -> tuple[int, int]:
    """`extent`, on a GPU rounded so that batches share shapes, for attribution.replay: leading positions down to a multiple of
    16, the others up to one, or to a sixteenth of the next power of two where that is more.

    Nothing changes but rounding: leading positions may be run with the others, and no position sees the padding behind it.
    Not for models whose tables of positions depend on the length, nor beyond what a model's context holds.
    """
    start, positions = extent(plug, pairs)
    if not (plug.moves and rounds_shapes(plug.device)):
        return start, positions
    end = start + positions
    start -= start % _STEP
    step = max(_STEP, (1 << (end - start - 1).bit_length()) // 16)
    positions = -(-(end - start) // step) * step
    context = plug.inspection.context
    return start, positions if context is None else min(positions, context - start)


def rounds_shapes(device: torch.device) -> bool:
    """Whether a device has sweeps replayed. It does not matter whether this engine's are: replayed or not, the bits are the
    same."""
    return device.type == "cuda"


def enter_pairs(plug: Plug, given: PromptPairs, start: int, positions: int) -> Batch:
    """Both prompts of pairs at the first layer; start, positions: at most and at least what `extent` says."""
    host = given.right_padded(
        start + positions
    )  # decided where the pairs lie: no waiting for a device
    live, source, spans = _differs(host, start)
    prefix_ids = host.clean_ids[:, :start]
    if bool((prefix_ids == prefix_ids[:1]).all()):
        prefix_ids = prefix_ids[:1]  # a prompt that all pairs share is run once
    pairs, device = host.to(plug.device), plug.device
    columns = start + given.starts
    first = int(columns[0])
    clean = filled(pairs.clean_ids, pairs.attention_mask)
    corrupted = filled(pairs.corrupted_ids, pairs.corrupted_attention_mask)
    return Batch(
        given=given,
        pairs=pairs,
        start=start,
        prefix=Entered(*plug.enter(prefix_ids.to(device))) if start else None,
        both=Entered(*plug.enter(torch.cat([clean[:, start:], corrupted[:, start:]]), start)),
        source=None if source is None else source.to(device),
        live=live.to(device),
        any_live=bool(live.any()),
        all_live=bool(live.all()),
        spans=None if spans is None else spans.to(device),
        column=first if spans is not None or bool((columns == first).all()) else columns.to(device),
    )


def _differs(pairs: PromptPairs, start: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """live, source and spans of a Batch."""
    width = pairs.clean_ids.shape[1]
    columns = torch.arange(start, width, device=pairs.device)
    live = (columns >= pairs.split[:, None]) & (columns < pairs.lengths[:, None])
    if pairs.spans is None:
        return live, None, None
    source = pairs.sources(width)[:, start:]  # never before `start`: see PairTable.split
    source = torch.where(source >= 0, source - start, -1)
    live = live & (source >= 0)
    return live, source, pairs.spans.members(width)[..., start:] & live[:, None]
