"""The result of an attribution: scores with tables, figures, a report, and a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from atp_fast.extras import require
from atp_fast.files import loading, save_tensors, write_csv
from atp_fast.nodes import NodeSpace
from atp_fast.patching.diagnostics import MissedBound
from atp_fast.results.figures import heatmap
from atp_fast.results.patch_effects import PatchEffects
from atp_fast.results.prompts import Prompt
from atp_fast.results.report import write_report
from atp_fast.results.scores import By, NodeScores, Over

if TYPE_CHECKING:
    import pandas as pd

_TEXT_FIELDS = ("method", "metric", "direction", "backend", "model", "tokens", "metadata")


class Attribution(NodeScores):
    """Scores of every node of a model on some prompt pairs, as `Engine.attribute` finds them.

    The fields are those of NodeScores.
    """

    def to_dataframe(self, kinds: Iterable[str] | None = None) -> pd.DataFrame:
        """All nodes, one row each: kind, layer, position, token, index, contribution, effect.

        Needs pandas (pip install atp_fast[reports]); ImportError says so.
        """
        pandas = require("pandas", "to_dataframe")
        table: pd.DataFrame = pandas.DataFrame(self.table(kinds))
        return table

    def to_csv(self, path: str | os.PathLike[str], kinds: Iterable[str] | None = None) -> None:
        """The table of to_dataframe as a CSV file, written whole or not at all; needs no extra package."""
        table = self.table(kinds)
        write_csv(path, table, zip(*(column.tolist() for column in table.values()), strict=True))

    def heatmap(self, kind: str, *, by: By = "effect", over: Over | None = None) -> Any:
        """A plotly figure, layer x head (summed over positions) or layer x position (summed over heads).

        over: "head" or "position"; None takes "head" for q, k, v, z and "position" for the other kinds. Of a dictionary's
        features the strongest are shown, feature x position, and "head" raises ValueError.
        Effects are red below and blue above zero, white at zero. Needs plotly; ImportError says so.
        """
        return heatmap(self, kind, by=by, over=over)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        exact: PatchEffects | None = None,
        bound: MissedBound | Mapping[str, Any] | None = None,
    ) -> None:
        """Write one HTML page that needs no network: the prompts, the best 1,000 nodes, maps, checks, provenance.

        exact: what `engine.patch` found for some of the nodes, shown beside their estimates;
        bound: what `engine.bound_missed` found, or the content of its file.
        Needs plotly and jinja2; ImportError says so. Raises ValueError for exact effects or a bound of another metric,
        direction or other pairs, and OSError naming the path if it cannot be written; nothing half-written is left.
        """
        write_report(self, path, exact, bound)

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
            "space": [
                self.space.layers,
                self.space.positions,
                list(self.space.widths.items()),
                {kind: list(counts) for kind, counts in self.space.counts.items()},
                {kind: list(layers) for kind, layers in self.space.only.items()},
            ],
            "per_pair": self.per_pair is not None,
            "prompts": self.prompts,
        } | {name: getattr(self, name) for name in _TEXT_FIELDS}
        save_tensors(path, "attribution", tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read what save wrote. Raises ValueError naming the path if it is no such file, or damaged."""
        with loading(path, "attribution") as (tensors, header):
            layers, positions, widths, *more = header["space"]  # early files have no more
            by_layer = [{kind: tuple(own) for kind, own in part.items()} for part in more]
            prompts = header.get("prompts")  # files of early versions have none
            space = NodeSpace(layers, positions, dict(widths), *by_layer)

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
                prompts=None if prompts is None else [Prompt(*texts) for texts in prompts],
                **{name: header[name] for name in _TEXT_FIELDS},
            )
