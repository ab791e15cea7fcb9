"""Which heads and neurons this process holds of a model that several share, and what they decide together.

Of a model that no others share, it holds all, and decides alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atp_fast.hf.attention import Mixture
from atp_fast.hf.inspection import Inspection, Layer
from atp_fast.hf.parallel import Parallel
from atp_fast.nodes import ATTENTION_KINDS, NodeSpace


class Shares:
    """The parts that the processes of a model hold of its nodes.

    Of a kind that is split each process holds a stretch of every one of its blocks: of the heads, of the neurons, or of each
    expert's neurons. Kinds that are not split all processes hold alike.
    """

    def __init__(self, parallel: Parallel | None, inspection: Inspection) -> None:
        self._parallel, self._inspection = parallel, inspection
        self.group = None if parallel is None else parallel.group
        self._blocks: dict[str, int] = {}  # 0 of a kind that is not split

    def note(self, number: int, layer: Layer, mixtures: Sequence[Mixture]) -> None:
        """Note which of a layer's nodes this process holds; kinds that layers split in different ways are refused."""
        if self._parallel is None:
            return
        blocks = {"neuron": int(self._parallel.style(layer.down) == "rowwise")}
        if mixtures:
            experts: Any = mixtures[0].module
            split = self._parallel.style(experts) is not None
            blocks["neuron"] = experts.num_experts if split else 0
        if layer.attention is not None:
            split = self._parallel.splits_heads(layer.attention)
            blocks |= dict.fromkeys(ATTENTION_KINDS, int(split))
        for kind, count in blocks.items():
            if self._blocks.setdefault(kind, count) != count:
                why = f"layer {number} splits them in another way over processes"
                self._inspection.refused.setdefault(kind, why)

    def count_all(self) -> None:
        """Make the inspection's numbers of heads and neurons, which are this process's, those of the model.

        Kinds of which layers have different numbers of nodes, other than none, are refused if they are split.
        """
        found = self._inspection
        for kind, counts in found.counts.items():
            if self.copies(kind) > 1 and len({*counts} - {0}) > 1:
                why = f"layers have {sorted({*counts} - {0})} of them in each process that shares the model"
                found.refused.setdefault(kind, why)
            found.counts[kind] = tuple(count * self.copies(kind) for count in counts)
        found.heads *= self.copies("q")
        found.kv_heads *= self.copies("k")
        found.neurons *= self.copies("neuron")

    def copies(self, kind: str) -> int:
        """How many times as many nodes of a kind the model has as this process holds."""
        return self.group.size if self.group is not None and self._blocks.get(kind) else 1

    def part(self, kind: str) -> int:
        """The number of the part of a kind's nodes that this process holds, 0 where all hold the same."""
        return self.group.rank if self.group is not None and self.copies(kind) > 1 else 0

    @property
    def held(self) -> Inspection:
        """The inspection, with the heads and neurons that this process holds."""
        found = self._inspection
        return replace(
            found,
            heads=found.heads // self.copies("q"),
            kv_heads=found.kv_heads // self.copies("k"),
            neurons=found.neurons // self.copies("neuron"),
        )

    def space(self, whole: NodeSpace) -> NodeSpace:
        """Those of a space's nodes that this process holds, numbered from 0."""
        widths = {kind: width // self.copies(kind) for kind, width in whole.widths.items()}
        counts = {
            kind: [count // self.copies(kind) for count in counts]
            for kind, counts in whole.counts.items()
        }
        return replace(whole, widths=widths, counts=counts)

    def index(self, kind: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these heads or neurons this process holds, bool, and their numbers among its own."""
        copies = self.copies(kind)
        if self.group is None or copies == 1:
            return torch.ones_like(index, dtype=torch.bool), index
        held = self.held
        widths = {"q": held.heads, "k": held.kv_heads, "v": held.kv_heads, "z": held.heads}
        width = widths.get(kind, held.neurons) // self._blocks[kind]
        block, within = index // (copies * width), index % (copies * width)
        return within // width == self.group.rank, block * width + within % width

    def whole(self, kind: str, table: Tensor) -> Tensor:
        """Numbers of all nodes of a kind, (..., width), from those of the nodes that each process holds."""
        if self.group is None or self.copies(kind) == 1:
            return table
        blocks = self._blocks[kind]
        parts = [p.view(*p.shape[:-1], blocks, -1) for p in self.group.parts(table)]
        return torch.cat(parts, -1).flatten(-2)

    def largest(self, number: float) -> float:
        """The largest of the numbers that the processes give, which then decide alike."""
        return number if self.group is None else self.group.largest(number)

    def check_same(self, **given: object) -> None:
        """ValueError, naming what differs, unless all processes were given the same."""
        told = [] if self.group is None else self.group.told(given)
        for rank, other in enumerate(told):
            for name, value in told[0].items():
                if other[name] != value:
                    raise ValueError(
                        f"{name} must be the same in every process that shares the model, got {other[name]!r} in "
                        f"process {rank} and {value!r} in process 0"
                    )
