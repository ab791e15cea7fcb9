"""What a run found: scores of every node, exact effects of chosen ones; tables, ranking, saving, loading."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from atp_fast.files import loading, save_tensors, written_whole
from atp_fast.nodes import KINDS, Node, NodeSpace, check_kinds, label

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]
By = Literal["contribution", "effect"]
Over = Literal["head", "position"]

DIRECTIONS = ("noising", "denoising")
_SIGNS = {
    "noising": "effect > 0: putting the corrupted value into the clean run raises the metric",
    "denoising": "effect > 0: putting the clean value into the corrupted run raises the metric",
}


def sign_text(direction: str) -> str:
    """What a positive effect means, in words."""
    if direction not in _SIGNS:
        raise ValueError(f"direction must be 'noising' or 'denoising', got {direction!r}")
    return _SIGNS[direction]


class ScoredNode(Node):
    """A Node with its scores; equal to, and hashed like, the Node itself.

    contribution: mean over pairs of |I|, >= 0; effect: mean of I, signed; token: text at its position, or None.
    """

    contribution: float
    effect: float
    token: str | None

    def __new__(
        cls,
        kind: str,
        layer: int,
        position: int,
        index: int = 0,
        contribution: float = float("nan"),
        effect: float = float("nan"),
        token: str | None = None,
    ) -> ScoredNode:
        node = super().__new__(cls, kind, layer, position, index)
        node.contribution, node.effect, node.token = contribution, effect, token
        return node

    def __repr__(self) -> str:
        at = "" if self.token is None else f" {self.token!r}"
        return (
            f"<{label(self)}{at}: contribution {self.contribution:.4g}, effect {self.effect:+.4g}>"
        )


@dataclass(eq=False, repr=False, kw_only=True)
class Attribution:
    """Scores of every node of a model on some prompt pairs.

    contribution: kind -> c(n) >= 0, (layers, positions, nodes per position); effect: the same shape, signed, the mean
    of I(n) under the ordinary gradient; per_pair: the same with a leading pairs axis, or None; means are over the
    pairs that have a real token at the position;
    space: the nodes; counts: pairs with a real token at each position, (positions,); where it is 0 there is no node;
    tokens: the text of each position, "·" where pairs differ, or None;
    clean_value, corrupted_value: the metric on both runs, (pairs,);
    metadata: whatever else a reader should know (versions, date, seconds), strings only.
    The tables lie on the device of the model that was run, everything else on the CPU.
    Raises ValueError if shapes or kinds do not fit the space.
    """

    contribution: dict[str, Tensor]
    effect: dict[str, Tensor]
    space: NodeSpace
    counts: Tensor
    clean_value: Tensor
    corrupted_value: Tensor
    method: str
    metric: str
    direction: str
    backend: str
    model: str
    per_pair: dict[str, Tensor] | None = None
    tokens: list[str] | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sign_text(self.direction)
        _check_strings(self.metadata)
        pairs = _check_values(self.clean_value, self.corrupted_value)
        tables: list[tuple[str, dict[str, Tensor], tuple[int, ...]]] = [
            ("contribution", self.contribution, ()),
            ("effect", self.effect, ()),
        ]
        if self.per_pair is not None:
            tables.append(("per_pair", self.per_pair, (pairs,)))
        for name, table, lead in tables:
            if tuple(table) != self.space.kinds:
                raise ValueError(
                    f"{name} must have the kinds {self.space.kinds}, got {tuple(table)}"
                )
            for kind, x in table.items():
                _check_shape(f"{name}[{kind!r}]", x, (*lead, *self.space.shape(kind)))
        _check_shape("counts", self.counts, (self.space.positions,))
        if self.tokens is not None and len(self.tokens) != self.space.positions:
            raise ValueError(
                f"tokens must have {self.space.positions} entries, got {len(self.tokens)}"
            )

    def __repr__(self) -> str:
        return (
            f"Attribution({self.method} of {self.metric}, {self.direction}, {len(self.clean_value)} pairs, "
            f"{self.model}, {len(self):,} nodes: {', '.join(self.space.kinds)}; {sign_text(self.direction)})"
        )

    def __len__(self) -> int:
        """Nodes that some pair has: positions that are padding everywhere hold none."""
        live = int((self.counts > 0).sum())
        return sum(self.space.layers * live * self.space.widths[kind] for kind in self.space.kinds)

    def cpu(self) -> Attribution:
        """The same with all tables on the CPU: what to keep of many runs on a GPU, whose memory they would fill."""

        def moved(table: dict[str, Tensor]) -> dict[str, Tensor]:
            return {kind: x.cpu() for kind, x in table.items()}

        return replace(
            self,
            contribution=moved(self.contribution),
            effect=moved(self.effect),
            per_pair=None if self.per_pair is None else moved(self.per_pair),
        )

    def top(
        self, k: int, kinds: Iterable[str] | None = None, by: By = "contribution"
    ) -> list[ScoredNode]:
        """The k nodes with the largest contribution, or the largest |effect|, best first.

        Ties go to the earlier node (kind, layer, position, index); NaN scores rank last.
        Raises ValueError if k exceeds the number of nodes, for an unknown kind, or one that was not computed.
        """
        chosen = self._kinds(kinds)
        scores = self._flat(by, chosen)
        scores = scores.abs() if by == "effect" else scores
        if not 1 <= k <= scores.numel():
            raise ValueError(f"k must be in [1, {scores.numel()}], the number of nodes, got {k}")
        best = _top(scores, k)
        columns = self._columns(chosen, best.cpu().numpy())
        values = (self._flat(name, chosen)[best].tolist() for name in ("contribution", "effect"))
        rows = zip(*(column.tolist() for column in columns.values()), *values, strict=True)
        return [
            ScoredNode(kind, layer, position, index, contribution, effect, self._token(position))
            for kind, layer, position, index, contribution, effect in rows
        ]

    def to_dataframe(self, kinds: Iterable[str] | None = None) -> pd.DataFrame:
        """All nodes, one row each: kind, layer, position, token, index, contribution, effect.

        Needs pandas (pip install atp_fast[reports]); ImportError says so.
        """
        pandas = require("pandas", "to_dataframe")
        table: pd.DataFrame = pandas.DataFrame(self._table(kinds))
        return table

    def to_csv(self, path: str | os.PathLike[str], kinds: Iterable[str] | None = None) -> None:
        """The table of to_dataframe as a CSV file, written whole or not at all; needs no extra package."""
        table = self._table(kinds)
        _write_csv(path, table)

    def heatmap(self, kind: str, *, by: By = "effect", over: Over | None = None) -> Any:
        """A plotly figure, layer x head (summed over positions) or layer x position (summed over heads).

        over: "head" or "position"; None takes "head" for q, k, v, z and "position" for the other kinds.
        Effects are red below and blue above zero, white at zero. Needs plotly; ImportError says so.
        """
        from atp_fast.report import heatmap

        return heatmap(self, kind, by=by, over=over)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML page that needs no network: summary, top nodes, heat maps, how to read them."""
        from atp_fast.report import report

        report(self, path)

    def totals(self, kind: str, *, by: By = "effect", over: Over) -> Tensor:
        """Scores of one kind summed over positions, (layers, nodes per position), or over a position's nodes,
        (layers, positions). A sum over positions weighs each by the share of pairs that have it, so it is the mean
        over pairs of each pair's own sum.
        """
        self.space.shape(kind)
        if over not in ("head", "position"):
            raise ValueError(f"over must be 'head' or 'position', got {over!r}")
        scores = self._scores(by)[kind]
        if over == "position":
            return scores.sum(2)
        share = self.counts.to(scores) / len(self.clean_value)
        return (scores * share[:, None]).sum(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all. Raises OSError naming the path."""
        tensors = {"counts": self.counts, "clean_value": self.clean_value}
        tensors["corrupted_value"] = self.corrupted_value
        for name, table in (
            ("contribution", self.contribution),
            ("effect", self.effect),
            ("per_pair", self.per_pair or {}),
        ):
            tensors |= {f"{name}.{kind}": x for kind, x in table.items()}
        header = {
            "space": [self.space.layers, self.space.positions, list(self.space.widths.items())],
            "per_pair": self.per_pair is not None,
        } | {name: getattr(self, name) for name in (*_TEXT_FIELDS, "method", "tokens", "metadata")}
        save_tensors(path, "attribution", tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read what save wrote. Raises ValueError naming the path if it is no such file, or damaged."""
        with loading(path, "attribution") as (tensors, header):
            layers, positions, widths = header["space"]
            space = NodeSpace(layers, positions, dict(widths))

            def table(name: str) -> dict[str, Tensor]:
                return {kind: tensors[f"{name}.{kind}"] for kind in space.kinds}

            return cls(
                contribution=table("contribution"),
                effect=table("effect"),
                per_pair=table("per_pair") if header["per_pair"] else None,
                space=space,
                counts=tensors["counts"],
                clean_value=tensors["clean_value"],
                corrupted_value=tensors["corrupted_value"],
                **{name: header[name] for name in (*_TEXT_FIELDS, "method", "tokens", "metadata")},
            )

    def _kinds(self, kinds: Iterable[str] | None) -> tuple[str, ...]:
        chosen = self.space.kinds if kinds is None else check_kinds(kinds)
        for kind in chosen:
            self.space.shape(kind)
        return chosen

    def _scores(self, by: By) -> dict[str, Tensor]:
        if by not in ("contribution", "effect"):
            raise ValueError(f"by must be 'contribution' or 'effect', got {by!r}")
        return self.contribution if by == "contribution" else self.effect

    def _flat(self, by: By, kinds: Sequence[str]) -> Tensor:
        """One score per existing node, kind by kind."""
        scores, live = self._scores(by), self.counts > 0
        return torch.cat(
            [scores[kind][:, live.to(scores[kind].device)].flatten() for kind in kinds]
        )

    def _token(self, position: int) -> str | None:
        return None if self.tokens is None else self.tokens[position]

    def _columns(self, kinds: Sequence[str], flat: Array) -> dict[str, Array]:
        """Kind, layer, position and index of the numbers that `_flat` counts nodes by."""
        live = (self.counts > 0).nonzero().flatten().cpu().numpy()
        widths = np.array([self.space.widths[kind] for kind in kinds])
        starts = np.concatenate(([0], np.cumsum(self.space.layers * len(live) * widths)))
        which = np.searchsorted(starts, flat, side="right") - 1
        row, index = np.divmod(flat - starts[which], widths[which])
        layer, column = np.divmod(row, len(live))
        kind = np.array(kinds, dtype=object)[which]
        return {"kind": kind, "layer": layer, "position": live[column], "index": index}

    def _table(self, kinds: Iterable[str] | None) -> dict[str, Array]:
        chosen = self._kinds(kinds)
        contribution, effect = self._flat("contribution", chosen), self._flat("effect", chosen)
        columns = self._columns(chosen, np.arange(len(effect)))
        tokens = np.array([self._token(t) for t in range(self.space.positions)], dtype=object)
        return {
            "kind": columns["kind"],
            "layer": columns["layer"],
            "position": columns["position"],
            "token": tokens[columns["position"]],
            "index": columns["index"],
            "contribution": contribution.cpu().numpy(),
            "effect": effect.cpu().numpy(),
        }


@dataclass(eq=False, repr=False, kw_only=True)
class PatchEffects:
    """Exact effects of patching single nodes, or whole subsets of nodes.

    nodes: the patched nodes; subsets: instead of nodes, the sets patched at once;
    effect: signed, (pairs, nodes or subsets); clean_value: the metric without a patch, (pairs,);
    valid: bool, the shape of effect, False where a pair was not patched (its prompt lacks the position, or it was not
    sampled); all True when None.
    """

    effect: Tensor
    clean_value: Tensor
    metric: str
    direction: str
    backend: str
    model: str
    nodes: list[Node] | None = None
    subsets: list[list[Node]] | None = None
    valid: Tensor | None = None
    tokens: list[str] | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sign_text(self.direction)
        _check_strings(self.metadata)
        if (self.nodes is None) == (self.subsets is None):
            raise ValueError("PatchEffects must have nodes or subsets, one of the two")
        columns = len(self.nodes if self.nodes is not None else self.subsets or [])
        _check_values(self.clean_value, self.clean_value)
        _check_shape("effect", self.effect, (len(self.clean_value), columns))
        if self.valid is not None:
            _check_shape("valid", self.valid, tuple(self.effect.shape))

    def __repr__(self) -> str:
        what = "nodes" if self.nodes is not None else "subsets"
        return (
            f"PatchEffects(exact {self.metric}, {self.direction}, {len(self.clean_value)} pairs, {self.model}, "
            f"{self.effect.shape[1]:,} {what}; {sign_text(self.direction)})"
        )

    @property
    def mean(self) -> Tensor:
        """Mean of I over the pairs that were patched, signed, (nodes,); NaN where none was."""
        return self._mean(self.effect)

    @property
    def mean_abs(self) -> Tensor:
        """c(n): mean of |I| over the pairs that were patched, (nodes,); NaN where none was."""
        return self._mean(self.effect.abs())

    def _mean(self, x: Tensor) -> Tensor:
        if self.valid is None:
            return x.mean(0)
        return x.masked_fill(~self.valid, 0).sum(0) / self.valid.sum(0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a node: kind, layer, position, token, index, contribution, effect; or one row a subset: subset,
        nodes (how many), contribution, effect. Means over pairs; needs pandas.
        """
        pandas = require("pandas", "to_dataframe")
        table: pd.DataFrame = pandas.DataFrame(self._table())
        return table

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """The table of to_dataframe as a CSV file, written whole or not at all; needs no extra package."""
        _write_csv(path, self._table())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all. Raises OSError naming the path."""
        sets = [[node] for node in self.nodes] if self.nodes is not None else self.subsets or []
        rows = [[KINDS.index(node.kind), *node[1:]] for members in sets for node in members]
        tensors = {
            "effect": self.effect,
            "clean_value": self.clean_value,
            "nodes": torch.tensor(rows, dtype=torch.long).reshape(-1, 4),
            "sizes": torch.tensor([len(members) for members in sets], dtype=torch.long),
        }
        if self.valid is not None:
            tensors["valid"] = self.valid
        header = {name: getattr(self, name) for name in (*_TEXT_FIELDS, "tokens", "metadata")}
        header |= {"kinds": KINDS, "single": self.nodes is not None}
        save_tensors(path, "patch_effects", tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PatchEffects:
        """Read what save wrote. Raises ValueError naming the path if it is no such file, or damaged."""
        with loading(path, "patch_effects") as (tensors, header):
            kinds, sizes = header["kinds"], tensors["sizes"].tolist()
            members = [Node(kinds[kind], *rest) for kind, *rest in tensors["nodes"].tolist()]
            ends = np.cumsum(sizes).tolist()
            sets = [members[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            return cls(
                effect=tensors["effect"],
                clean_value=tensors["clean_value"],
                valid=tensors.get("valid"),
                nodes=members if header["single"] else None,
                subsets=None if header["single"] else sets,
                **{name: header[name] for name in (*_TEXT_FIELDS, "tokens", "metadata")},
            )

    def _table(self) -> dict[str, Any]:
        scores = {
            "contribution": self.mean_abs.cpu().numpy(),
            "effect": self.mean.cpu().numpy(),
        }
        if self.nodes is None:
            sizes = [len(members) for members in self.subsets or []]
            return {"subset": list(range(len(sizes))), "nodes": sizes} | scores
        tokens = self.tokens
        return {
            "kind": [node.kind for node in self.nodes],
            "layer": [node.layer for node in self.nodes],
            "position": [node.position for node in self.nodes],
            "token": [None if tokens is None else tokens[node.position] for node in self.nodes],
            "index": [node[3] for node in self.nodes],
        } | scores


_TEXT_FIELDS = ("metric", "direction", "backend", "model")


def require(package: str, what: str) -> Any:
    """A package of the reports extra; ImportError that names the extra if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"{what} needs {name}: pip install 'atp_fast[reports]'") from error


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ties by index: topk alone leaves the order of ties open."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = scores.topk(k).values[-1]
    above = (scores > least).nonzero().flatten()
    ties = (scores == least).nonzero().flatten()[: k - len(above)]
    order = scores[above].sort(descending=True, stable=True).indices
    return torch.cat((above[order], ties))


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def _check_values(clean_value: Tensor, corrupted_value: Tensor) -> int:
    if clean_value.ndim != 1 or clean_value.shape != corrupted_value.shape:
        raise ValueError(
            "clean_value and corrupted_value must both have shape (pairs,), "
            f"got {tuple(clean_value.shape)} and {tuple(corrupted_value.shape)}"
        )
    return len(clean_value)


def _check_strings(metadata: Mapping[str, str]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")


def _write_csv(path: str | os.PathLike[str], table: Mapping[str, Any]) -> None:
    with (
        written_whole(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(table)
        columns = [
            column.tolist() if hasattr(column, "tolist") else column for column in table.values()
        ]
        writer.writerows(zip(*columns, strict=True))
