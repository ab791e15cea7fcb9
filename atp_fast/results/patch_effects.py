"""Exact effects of chosen nodes, or of sets of nodes: a table and a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from atp_fast.extras import require
from atp_fast.files import loading, save_tensors, write_csv
from atp_fast.nodes import Node
from atp_fast.prompts.directions import sign_text
from atp_fast.results.scores import check_shape, check_strings, check_values

if TYPE_CHECKING:
    import pandas as pd

_TEXT_FIELDS = ("metric", "direction", "backend", "model", "tokens", "metadata")


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
        check_strings(self.metadata)
        if (self.nodes is None) == (self.subsets is None):
            raise ValueError("PatchEffects must have nodes or subsets, one of the two")
        columns = len(self.nodes if self.nodes is not None else self.subsets or [])
        check_values(self.clean_value, self.clean_value)
        check_shape("effect", self.effect, (len(self.clean_value), columns))
        if self.valid is not None:
            check_shape("valid", self.valid, tuple(self.effect.shape))

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
        table: pd.DataFrame = pandas.DataFrame(self.table())
        return table

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """The table of to_dataframe as a CSV file, written whole or not at all; needs no extra package."""
        table = self.table()
        write_csv(path, table, zip(*table.values(), strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all. Raises OSError naming the path."""
        sets = [[node] for node in self.nodes] if self.nodes is not None else self.subsets or []
        kinds = list(dict.fromkeys(node.kind for members in sets for node in members))
        rows = [[kinds.index(node.kind), *node[1:]] for members in sets for node in members]
        tensors = {
            "effect": self.effect,
            "clean_value": self.clean_value,
            "nodes": torch.tensor(rows, dtype=torch.long).reshape(-1, 4),
            "sizes": torch.tensor([len(members) for members in sets], dtype=torch.long),
        }
        if self.valid is not None:
            tensors["valid"] = self.valid
        header = {name: getattr(self, name) for name in _TEXT_FIELDS}
        header |= {"kinds": kinds, "single": self.nodes is not None}
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
                **{name: header[name] for name in _TEXT_FIELDS},
            )

    def table(self) -> dict[str, Any]:
        scores = {
            "contribution": self.mean_abs.tolist(),
            "effect": self.mean.tolist(),
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
