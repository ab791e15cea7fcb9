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
FEATURES, ERROR = ".features", ".error"
"""Ends of the two kinds of a dictionary (see Engine.add_dictionary), whose name stands before."""


def is_scalar(kind: str) -> bool:
    """Whether a node of the kind is one number of a vector at its position: a neuron, or a dictionary's feature."""
    return kind == "neuron" or kind.endswith(FEATURES)


def is_whole(kind: str) -> bool:
    """Whether a layer has one node of the kind at each position: a write, a layer's input, or an error term."""
    return kind in COARSE_KINDS or kind.endswith(ERROR)


class Node(NamedTuple):
    """A component at one token position.

    kind: one of KINDS, or one of a dictionary's two; layer and position count from 0; index is the head (q, z: query
    heads; k, v: key/value heads), the neuron or the feature, and 0 for the coarse kinds and error terms.
    """

    kind: str
    layer: int
    position: int
    index: int = 0  # type: ignore[assignment]  # the field's name; tuple.index is not used


@dataclass(frozen=True)
class NodeSpace:
    """All nodes of a model on prompts of one length, numbered kind by kind.

    widths maps each kind, in order, to the nodes it has per layer and position: heads,
    key/value heads, neurons, features, or 1; counts: the same layer by layer, for kinds whose layers differ (0: a layer
    without them), the largest of which is the width. Tables have room for the width in every layer, zeros where a layer
    has fewer. only: the kinds of dictionaries -> the layers that have one, ascending; their tables have no others. Flat
    numbers run over (kind, layer, position, index) of the nodes that there are.
    """

    layers: int
    positions: int
    widths: Mapping[str, int]
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    only: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.widths if kind not in KINDS and kind not in self.only]
        if unknown:
            raise ValueError(f"nodes must be among {', '.join(KINDS)}, got {unknown[0]!r}")
        for kind, counts in self.counts.items():
            if len(counts) != self.layers or max(counts) != self.widths.get(kind):
                raise ValueError(
                    f"counts of {kind!r} must be one for each of {self.layers} layers, the largest "
                    f"{self.widths.get(kind)}, got {list(counts)}"
                )

    def in_layers(self, kind: str) -> Sequence[int]:
        """Nodes per position of one kind, for each of its layers."""
        layers, _, width = self.shape(kind)
        return self.counts.get(kind, (width,) * layers)

    def layers_of(self, kind: str) -> Sequence[int]:
        """The layers that the tables of a kind have, in the order of their rows."""
        return self.only.get(kind, range(self.layers))

    def row(self, kind: str, layer: int) -> int:
        """The row of a layer in the tables of a kind."""
        return self.layers_of(kind).index(layer)

    @functools.cached_property
    def _rows(self) -> list[tuple[str, int]]:
        """Each kind's layers, one after the other."""
        return [(kind, layer) for kind in self.widths for layer in self.layers_of(kind)]

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Flat number of the first node of each kind's layers, one after the other, and of none at the end."""
        counts = (n for kind in self.widths for n in self.in_layers(kind))
        return [0, *accumulate(self.positions * n for n in counts)]

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, int], int]:
        """Where a kind's layer stands in `_rows`."""
        return {place: number for number, place in enumerate(self._rows)}

    def _count(self, number: int) -> int:
        """Nodes per position of row `number`."""
        return (self._starts[number + 1] - self._starts[number]) // self.positions

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.widths)

    def shape(self, kind: str) -> tuple[int, int, int]:
        """(layers that it has, positions, nodes per position) of one kind."""
        if kind not in self.widths:
            raise ValueError(f"kind must be among {', '.join(self.widths)}, got {kind!r}")
        return len(self.layers_of(kind)), self.positions, self.widths[kind]

    def size(self, kind: str) -> int:
        return self.positions * sum(self.in_layers(kind))

    def __len__(self) -> int:
        return self._starts[-1]

    def offset(self, kind: str) -> int:
        """Flat number of the kind's first node."""
        self.shape(kind)
        return self._starts[self._numbers[kind, self.layers_of(kind)[0]]]

    def flat(self, node: Node) -> int:
        """Number of a node; ValueError if the node lies outside this space."""
        self.check(node)
        number = self._numbers[node.kind, node.layer]
        return self._starts[number] + node.position * self._count(number) + node.index

    def node(self, flat: int) -> Node:
        """The node of a flat number."""
        if not 0 <= flat < len(self):
            raise ValueError(f"flat must be in [0, {len(self)}), got {flat}")
        # the last of several rows that start there is not empty
        number = bisect_right(self._starts, flat) - 1
        position, index = divmod(flat - self._starts[number], self._count(number))
        return Node(*self._rows[number], position, index)

    def check(self, node: Node) -> None:
        """ValueError, naming the field and its range, if the node lies outside this space."""
        _, positions, _ = self.shape(node.kind)
        for name, value, limit in (
            ("layer", node.layer, self.layers),
            ("position", node.position, positions),
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{name} of {node} must be in [0, {limit}), got {value}")
        if node.layer not in self.layers_of(node.kind):
            layers = ", ".join(map(str, self.only[node.kind]))
            raise ValueError(f"layer of {node} must be among {layers}, got {node.layer}")
        limit = self._count(self._numbers[node.kind, node.layer])
        if limit == 0:
            raise ValueError(f"layer {node.layer} has no nodes {node.kind!r}, got {node}")
        if not 0 <= node.index < limit:
            raise ValueError(f"index of {node} must be in [0, {limit}), got {node.index}")

    def __iter__(self) -> Iterator[Node]:
        return (self.node(i) for i in range(len(self)))


def check_kinds(nodes: Iterable[str], known: Sequence[str] = KINDS) -> tuple[str, ...]:
    """The requested node kinds, checked, in the order of those that are known."""
    if isinstance(nodes, str):
        raise TypeError(f"nodes must be a sequence of kinds such as ('q', 'k'), got {nodes!r}")
    wanted = tuple(nodes)
    if not wanted:
        raise ValueError(f"nodes must name at least one of {', '.join(known)}, got none")
    for kind in wanted:
        if kind not in known:
            raise ValueError(f"nodes must be among {', '.join(known)}, got {kind!r}")
    return tuple(kind for kind in known if kind in wanted)


def name_of(node: Node) -> str:
    """A node without its position: `L5 H3 k`, `L5 N77`, `L5 mlp_out`, `L5 F1234 resid_pre`, `L5 error resid_pre`."""
    if node.kind == "neuron":
        return f"L{node.layer} N{node.index}"
    if node.kind in COARSE_KINDS:
        return f"L{node.layer} {node.kind}"
    dictionary, dot, part = node.kind.partition(".")
    part = part if dot + part == ERROR else f"{'F' if dot else 'H'}{node.index}"
    return f"L{node.layer} {part} {dictionary}"


def label(node: Node, tokens: Sequence[str] | None = None) -> str:
    """A short name such as `L5 H3 k @7 ' Mary'`."""
    at = f" @{node.position}"
    return name_of(node) + at + (f" {tokens[node.position]!r}" if tokens is not None else "")
