"""Node kinds, single nodes, and the index over all of a model's nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    key/value heads, neurons, or 1. Flat numbers run over (kind, layer, position, index).
    """

    layers: int
    positions: int
    widths: Mapping[str, int]

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.widths if kind not in KINDS]
        if unknown:
            raise ValueError(f"nodes must be among {', '.join(KINDS)}, got {unknown[0]!r}")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.widths)

    def shape(self, kind: str) -> tuple[int, int, int]:
        """(layers, positions, nodes per position) of one kind."""
        if kind not in self.widths:
            raise ValueError(f"kind must be among {', '.join(self.widths)}, got {kind!r}")
        return self.layers, self.positions, self.widths[kind]

    def size(self, kind: str) -> int:
        layers, positions, width = self.shape(kind)
        return layers * positions * width

    def __len__(self) -> int:
        return sum(self.size(kind) for kind in self.widths)

    def offset(self, kind: str) -> int:
        """Flat number of the kind's first node."""
        self.shape(kind)
        return sum(self.size(k) for k in self.kinds[: self.kinds.index(kind)])

    def flat(self, node: Node) -> int:
        """Number of a node; ValueError if the node lies outside this space."""
        self.check(node)
        width = self.widths[node.kind]
        within = (node.layer * self.positions + node.position) * width + node.index
        return self.offset(node.kind) + within

    def node(self, flat: int) -> Node:
        """The node of a flat number."""
        if not 0 <= flat < len(self):
            raise ValueError(f"flat must be in [0, {len(self)}), got {flat}")
        for kind, width in self.widths.items():
            if flat < self.size(kind):
                row, index = divmod(flat, width)
                layer, position = divmod(row, self.positions)
                return Node(kind, layer, position, index)
            flat -= self.size(kind)
        raise AssertionError("unreachable: flat was checked against the size")

    def check(self, node: Node) -> None:
        """ValueError, naming the field and its range, if the node lies outside this space."""
        shape = self.shape(node.kind)
        for name, value, limit in zip(("layer", "position", "index"), node[1:], shape, strict=True):
            if not 0 <= value < limit:
                raise ValueError(f"{name} of {node} must be in [0, {limit}), got {value}")

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
