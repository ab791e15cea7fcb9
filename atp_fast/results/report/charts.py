"""The heat maps of a page, as many and as fine as fit on it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from atp_fast.nodes import FEATURES, is_scalar
from atp_fast.results.figures import STRONGEST, heatmap
from atp_fast.results.scores import By, NodeScores

CELLS = 50_000
"""Numbers that all maps of a page hold together, of three digits and in 2 to 3 bytes each."""
_HEAD_CELLS = 45_000
_FEWEST, _MOST = 16, 512
"""Columns of a layer x position map."""
_SCORES: tuple[By, ...] = ("contribution", "effect")


class HeatMaps(NamedTuple):
    """figures: by "position KIND SCORE" and "head KIND SCORE"; columns: the names of all position maps' columns;
    left_out: kinds whose heads did not fit; summed: whether a column is the sum of several positions.
    """

    figures: dict[str, Any]
    columns: list[str]
    left_out: list[str]
    summed: bool


def heat_maps(found: NodeScores) -> HeatMaps:
    """Maps of every kind and score; what a kind has one of, neurons and features have no map by head."""
    layers, widths = found.space.layers, found.space.widths
    rows = 0
    figures, left_out, cells = {}, [], 0
    for kind, width in widths.items():
        of_kind = len(found.space.layers_of(kind))
        rows += min(STRONGEST, of_kind * width) if kind.endswith(FEATURES) else of_kind
        if is_scalar(kind) or width == 1:
            continue
        needed = layers * width * len(_SCORES)
        if cells + needed > _HEAD_CELLS:
            left_out.append(kind)
            continue
        cells += needed
        for by in _SCORES:
            figures[f"head {kind} {by}"] = _rounded(heatmap(found, kind, by=by, over="head"))
    room = (CELLS - cells) // (rows * len(_SCORES))
    most = min(max(room, _FEWEST), _MOST)
    columns: list[str] = []
    for kind in widths:
        for by in _SCORES:
            figure = heatmap(found, kind, by=by, over="position", columns=most)
            columns = list(figure.data[0].x)
            figure.data[0].x = None  # one list for all maps
            figures[f"position {kind} {by}"] = _rounded(figure)
    return HeatMaps(figures, columns, left_out, len(columns) < found.space.positions)


def _rounded(figure: Any) -> Any:
    """Numbers to three digits, and none finer than a ten-thousandth of the largest: a colour shows no more."""
    trace = figure.data[0]
    digits = 4 - math.ceil(math.log10(trace.zmax))
    trace.z = [[float(f"{round(x, digits):.3g}") for x in row] for row in trace.z.tolist()]
    return figure
