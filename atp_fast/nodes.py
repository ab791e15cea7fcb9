"""Node kinds, single nodes, and the index over all of a model's nodes."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

KINDS = ("q", "k", "v", "z", "neuron", "attn_out", "mlp_out", "resid_pre")
ATTENTION_KINDS = ("q", "k", "v", "z")
COARSE_KINDS = ("attn_out", "mlp_out", "resid_pre")
NODE_KINDS = (*ATTENTION_KINDS, "neuron")
"""The kinds that are scored unless others are asked for."""


class Node(NamedTuple):
    """A component at one token position.

    kind: one of KINDS; layer and position count from 0; index is the head (q, z: query heads;
    k, v: key/value heads) or the neuron, and 0 for the coarse kinds.
    """

    kind: str
    layer: int
    position: int
    index: int = 0  # type: ignore[assignment]  # the field's name; tuple.index is not used


@dataclass(frozen=True)
class NodeSpace:
    """All nodes of a model on prompts of one length, numbered kind by kind.

    widths maps each kind, in order, to the nodes it has per layer and position: heads,
    key/value heads, neurons, or 1; counts: the same layer by layer, for kinds whose layers differ (0: a layer without
    them), the largest of which is the width. Tables have room for the width in every layer, zeros where a layer has
    fewer. Flat numbers run over (kind, layer, position, index) of the nodes that there are.
    """

    layers: int
    positions: int
    widths: Mapping[str, int]
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.widths if kind not in KINDS]
        if unknown:
            raise ValueError(f"nodes must be among {', '.join(KINDS)}, got {unknown[0]!r}")
        for kind, counts in self.counts.items():
            if len(counts) != self.layers or max(counts) != self.widths.get(kind):
                raise ValueError(
                    f"counts of {kind!r} must be one for each of {self.layers} layers, the largest "
                    f"{self.widths.get(kind)}, got {list(counts)}"
                )

    def in_layers(self, kind: str) -> Sequence[int]:
        """Nodes per position of one kind, for each layer."""
        layers, _, width = self.shape(kind)
        return self.counts.get(kind, (width,) * layers)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Flat number of the first node of each kind's layers, one after the other, and of none at the end."""
        counts = (n for kind in self.widths for n in self.in_layers(kind))
        return [0, *accumulate(self.positions * n for n in counts)]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.widths)

    def shape(self, kind: str) -> tuple[int, int, int]:
        """(layers, positions, nodes per position) of one kind."""
        if kind not in self.widths:
            raise ValueError(f"kind must be among {', '.join(self.widths)}, got {kind!r}")
        return self.layers, self.positions, self.widths[kind]

    def size(self, kind: str) -> int:
        return self.positions * sum(self.in_layers(kind))

    def __len__(self) -> int:
        return self._starts[-1]

    def offset(self, kind: str) -> int:
        """Flat number of the kind's first node."""
        self.shape(kind)
        return self._starts[self.kinds.index(kind) * self.layers]

    def flat(self, node: Node) -> int:
        """Number of a node; ValueError if the node lies outside this space."""
        self.check(node)
        start = self._starts[self.kinds.index(node.kind) * self.layers + node.layer]
        return start + node.position * self.in_layers(node.kind)[node.layer] + node.index

    def node(self, flat: int) -> Node:
        """The node of a flat number."""
        if not 0 <= flat < len(self):
            raise ValueError(f"flat must be in [0, {len(self)}), got {flat}")
        row = (
            bisect_right(self._starts, flat) - 1
        )  # the last of several that start there is not empty
        number, layer = divmod(row, self.layers)
        kind = self.kinds[number]
        position, index = divmod(flat - self._starts[row], self.in_layers(kind)[layer])
        return Node(kind, layer, position, index)

    def check(self, node: Node) -> None:
        """ValueError, naming the field and its range, if the node lies outside this space."""
        layers, positions, _ = self.shape(node.kind)
        for name, value, limit in (
            ("layer", node.layer, layers),
            ("position", node.position, positions),
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{name} of {node} must be in [0, {limit}), got {value}")
        limit = self.in_layers(node.kind)[node.layer]
        if limit == 0:
            raise ValueError(f"layer {node.layer} has no nodes {node.kind!r}, got {node}")
        if not 0 <= node.index < limit:
            raise ValueError(f"index of {node} must be in [0, {limit}), got {node.index}")

    def __iter__(self) -> Iterator[Node]:
        return (self.node(i) for i in range(len(self)))


def check_kinds(nodes: Iterable[str]) -> tuple[str, ...]:
    """The requested node kinds, checked, in the order of KINDS."""
    if isinstance(nodes, str):
        raise TypeError(f"nodes must be a sequence of kinds such as ('q', 'k'), got {nodes!r}")
    wanted = tuple(nodes)
    if not wanted:
        raise ValueError(f"nodes must name at least one of {', '.join(KINDS)}, got none")
    for kind in wanted:
        if kind not in KINDS:
            raise ValueError(f"nodes must be among {', '.join(KINDS)}, got {kind!r}")
    return tuple(kind for kind in KINDS if kind in wanted)


def label(node: Node, tokens: Sequence[str] | None = None) -> str:
    """A short name such as `L5 H3 k @7 ' Mary'`."""
    part = {"neuron": f"N{node.index}"}.get(node.kind, f"H{node.index}")
    name = (
        f"L{node.layer} {node.kind}"
        if node.kind in COARSE_KINDS
        else f"L{node.layer} {part} {node.kind}"
    )
    if node.kind == "neuron":
        name = f"L{node.layer} {part}"
    at = f" @{node.position}"
    return name + at + (f" {tokens[node.position]!r}" if tokens is not None else "")
