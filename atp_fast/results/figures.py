"""plotly figures of scores."""

from __future__ import annotations

import html
from typing import Any

from atp_fast.extras import require
from atp_fast.nodes import ATTENTION_KINDS
from atp_fast.prompts.directions import sign_text
from atp_fast.results.scores import By, NodeScores, Over

WIDEST = 64
"""Columns up to which a heat map names each."""


def heatmap(found: NodeScores, kind: str, *, by: By = "effect", over: Over | None = None) -> Any:
    """A plotly figure, layer x head or layer x position; see Attribution.heatmap. Raises ImportError, ValueError."""
    objects = require("plotly.graph_objects", "heatmap")
    over = over or ("head" if kind in ATTENTION_KINDS else "position")
    values = found.totals(kind, by=by, over=over).double().cpu()
    layers, columns = values.shape
    limit = float(values.nan_to_num(0, 0, 0).abs().max()) if values.numel() else 0.0
    limit = limit or 1.0
    signed = by == "effect"
    many = "neurons" if kind == "neuron" else "heads"
    if over == "position":
        tokens = found.tokens or [""] * columns
        names = [f"{i} {_label(token)}".rstrip() for i, token in enumerate(tokens)]
        summed, axis = (
            ("", "position")
            if found.space.widths[kind] == 1
            else (f", sum over {many}", "position")
        )
    else:
        names, axis = [str(i) for i in range(columns)], "neuron" if kind == "neuron" else "head"
        summed = ", sum over positions"
    figure = objects.Figure(
        objects.Heatmap(
            z=values.tolist(),
            colorscale="RdBu" if signed else "Blues",
            zmin=-limit if signed else 0.0,
            zmax=limit,
            zmid=0.0 if signed else None,
            customdata=[names] * layers,
            hovertemplate="layer %{y}, " + axis + " %{customdata}: %{z:.4g}<extra></extra>",
            colorbar={"title": {"text": by}},
        )
    )
    note = (
        f"{sign_text(found.direction)}; red < 0 < blue"
        if signed
        else f"{found.direction}; mean of |I|"
    )
    title = f"{kind} {by}{summed}: {found.method} of {found.metric}"
    figure.update_layout(
        title={"text": f"{html.escape(title)}<br><sub>{html.escape(note)}</sub>"},
        xaxis={"title": {"text": axis}},
        yaxis={"title": {"text": "layer"}, "dtick": 1 if layers <= 16 else None},
        template="plotly_white",
        height=max(360, 160 + 16 * layers),
    )
    if columns <= WIDEST:
        figure.update_xaxes(tickvals=list(range(columns)), ticktext=names)
    return figure


def visible(token: str) -> str:
    """A token with its line breaks and tabs written out."""
    return token.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def _label(token: str) -> str:
    """A token as a label in a figure, where plotly would read <bos> as a tag."""
    return html.escape(visible(token), quote=False)
