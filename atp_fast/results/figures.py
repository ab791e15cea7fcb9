"""plotly figures of scores, their looks, and figures as files for papers."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_fast.extras import require
from atp_fast.files import written_whole
from atp_fast.nodes import ATTENTION_KINDS, FEATURES, Node, name_of
from atp_fast.prompts.directions import sign_text
from atp_fast.results.scores import By, NodeScores, Over

FORMATS = ("svg", "png", "pdf")
_LONGEST = 40
"""Characters of a token that a label shows."""
STRONGEST = 32
"""Features that a map shows, each in a row of its own."""


def _template(
    text: str,
    soft: str,
    grid: str,
    back: str,
    diverging: list[str],
    sequential: list[str],
    lines: list[str],
) -> dict[str, Any]:
    def scale(colours: list[str]) -> list[list[Any]]:
        return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]

    axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "automargin": True}
    return {
        "layout": {
            "font": {"color": text, "family": "system-ui, sans-serif"},
            "paper_bgcolor": back,
            "plot_bgcolor": back,
            "xaxis": axis,
            "yaxis": axis,
            "colorscale": {"diverging": scale(diverging), "sequential": scale(sequential)},
            "colorway": lines,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": soft, "activecolor": text},
        }
    }


LIGHT = _template(
    "#1c1d21",
    "#8a8c96",
    "#dcdde3",
    "#ffffff",
    ["#67001f", "#d6604d", "#f7f7f7", "#4393c3", "#053061"],
    ["#f7fbff", "#9ecae1", "#3182bd", "#08306b"],
    "#0072b2 #d55e00 #009e73 #cc79a7 #997700 #56b4e9 #7a5195 #555555".split(),
)
"""The look of every figure; red is below zero, blue above."""

DARK = _template(
    "#e7e7ea",
    "#85878f",
    "#3a3b42",
    "#17181b",
    ["#ff9d8a", "#b3402f", "#1d1e22", "#2c6fa8", "#9ccbff"],
    ["#1d1e22", "#1f4e79", "#3f8fd0", "#cfe6ff"],
    "#56b4e9 #ff9b5e #3fcf9f #f0a6cf #f0e442 #8fd3ff #c8a2f0 #bbbbbb".split(),
)


OPTIONS = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "toImageButtonOptions": {"format": "svg"},
}
"""Of a figure on a page: no button that would upload it; its picture is an SVG."""


def heatmap(
    found: NodeScores, kind: str, *, by: By = "effect", over: Over | None = None, columns: int = 0
) -> Any:
    """A plotly figure, layer x head, layer x position or feature x position; see Attribution.heatmap.

    Raises ImportError, ValueError.

    columns: where there are more positions, neighbours are summed into at most this many; 0 keeps all apart.
    """
    objects = require("plotly.graph_objects", "heatmap")
    over = over or ("head" if kind in ATTENTION_KINDS else "position")
    values = found.totals(kind, by=by, over=over).double().cpu()
    of_features = kind.endswith(FEATURES)
    if of_features:
        if over == "head":
            raise ValueError(f"over must be 'position' for {kind}, got {over!r}")
        values, rows = _strongest(found, kind, by)
    else:
        rows = [str(layer) for layer in found.space.layers_of(kind)]
    if over == "position":
        values, names = _in_columns(found, values, columns)
        axis = found.axis
    else:
        names = [str(i) for i in range(values.shape[1])]
        axis = "neuron" if kind == "neuron" else "head"
    limit = float(values.nan_to_num(0, 0, 0).abs().max()) if values.numel() else 0.0
    limit = limit or 1.0
    signed = by == "effect"
    figure = objects.Figure(
        objects.Heatmap(
            z=values.float().numpy(),
            x=names,
            y=rows if kind in found.space.only else None,
            autocolorscale=True,
            zmin=-limit if signed else 0.0,
            zmax=limit,
            hovertemplate=f"{'' if of_features else 'layer '}%{{y}}, {axis}"
            + " %{x}: %{z:.4g}<extra></extra>",
            colorbar={"title": {"text": by}},
        )
    )
    note = (
        f"{sign_text(found.direction)}; red < 0 < blue"
        if signed
        else f"{found.direction}; mean of |I|"
    )
    title = f"{kind} {by}{_summed(found, kind, over)}: {found.method} of {found.metric}"
    figure.update_layout(
        title={"text": f"{html.escape(title)}<br><sub>{html.escape(note)}</sub>"},
        xaxis={"title": {"text": axis}, "type": "category"},
        yaxis={
            "title": {"text": "feature" if of_features else "layer"},
            "dtick": 1 if len(values) <= 16 or of_features else None,
            "type": "category" if kind in found.space.only else None,
        },
        template=LIGHT,
        height=max(360, 160 + 16 * len(values)),
    )
    return figure


def _strongest(found: NodeScores, kind: str, by: By) -> tuple[Tensor, list[str]]:
    """Scores (features, positions) of the features that have the largest sum over positions, least first, and their names."""
    scores = (found.effect if by == "effect" else found.contribution)[kind].double().cpu()
    share = found.counts.to(scores) / len(found.clean_value)  # as in NodeScores.totals
    strength = (scores.abs() * share[:, None]).sum(1).nan_to_num(0, 0, 0).flatten()
    best = strength.topk(min(STRONGEST, len(strength))).indices.flip(0)
    row, index = best // scores.shape[2], best % scores.shape[2]
    layers = found.space.layers_of(kind)
    nodes = [Node(kind, layers[r], 0, i) for r, i in zip(row.tolist(), index.tolist(), strict=True)]
    return scores[row, :, index], [name_of(node) for node in nodes]


def _summed(found: NodeScores, kind: str, over: Over) -> str:
    if kind.endswith(FEATURES):
        return ", the strongest"
    if over == "head":
        return f", sum over {found.axis}s"
    many = "neurons" if kind == "neuron" else "heads"
    return "" if found.space.widths[kind] == 1 else f", sum over {many}"


def _in_columns(found: NodeScores, values: Tensor, columns: int) -> tuple[Tensor, list[str]]:
    """The values (layers, positions) in so many columns at most, and the name of each, no two alike."""
    positions = values.shape[1]
    tokens = [""] * positions if found.tokens is None else [_token_label(t) for t in found.tokens]
    size = -(-positions // columns) if columns else 1
    if size == 1:
        if found.axis == "span" and len(set(tokens)) == positions:
            return values, tokens
        return values, [f"{i} {token}".rstrip() for i, token in enumerate(tokens)]
    share = found.counts.to(values) / len(found.clean_value)  # as in NodeScores.totals
    parts = torch.split(values * share, size, dim=1)
    ends = [(i, min(i + size, positions) - 1) for i in range(0, positions, size)]
    names = [f"{a}–{b} {tokens[a]}".rstrip() for a, b in ends]
    return torch.stack([part.sum(1) for part in parts], 1), names


def visible(token: str) -> str:
    """A token with its line breaks and tabs written out."""
    return token.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def plain(text: str) -> str:
    """A text for plotly, which would read <bos> as a tag."""
    return html.escape(text, quote=False)


def _token_label(token: str) -> str:
    token = visible(token)
    return plain(token if len(token) <= _LONGEST else f"{token[:_LONGEST]}…")


class BrowserError(OSError):
    """No browser to draw figures with."""


def save_figure(
    figure: Any,
    path: str | os.PathLike[str],
    *,
    width: int = 900,
    height: int | None = None,
    scale: float = 2.0,
) -> None:
    """Write a plotly figure as .svg, .png or .pdf, whole or not at all.

    width, height: in CSS pixels, the figure's own height when None; scale: pixels of a PNG for each of them.
    Raises ValueError for another suffix; ImportError without kaleido and BrowserError without Chrome or Chromium, which
    draw the figure, saying how to get them; OSError naming the path.
    """
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise ValueError(f"path must end in .{', .'.join(FORMATS)}, got {os.fspath(path)!r}")
    require("kaleido", "figures as files")
    try:
        drawn = figure.to_image(
            format=suffix, width=width, height=height or figure.layout.height, scale=scale
        )
    except RuntimeError as error:
        raise BrowserError(
            f"cannot write {os.fspath(path)}: Chrome or Chromium draws figures, and none was found that starts: "
            "apt-get install chromium, or name one in BROWSER_PATH"
        ) from error
    with written_whole(path) as temporary:
        temporary.write_bytes(drawn)
