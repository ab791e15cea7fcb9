"""A report of scores in one HTML file."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator

from atp_fast.extras import require
from atp_fast.files import write_text
from atp_fast.prompts.directions import sign_text
from atp_fast.results.figures import WIDEST, heatmap, visible
from atp_fast.results.scores import By, NodeScores, Over

_TOP = 50

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: pre-wrap; }
td.number { text-align: right; } .scroll { overflow-x: auto; } code { white-space: pre-wrap; }
"""

_HOW_TO_READ = (
    "A node is one component at one token position: q, k, v, z are a head's query, key, value and output (q and k "
    "after the rotation; k and v are shared by the query heads of a group), neuron is one MLP activation, attn_out and "
    "mlp_out are what a layer's attention and MLP write, resid_pre is a layer's input. Layers, positions and heads "
    "count from 0.",
    "The effect of a node estimates how the metric changes when this node alone takes the value it has on the other "
    "prompt; it is signed, and averaged over pairs. The contribution is the mean of its absolute value, taken before "
    "averaging, so opposite effects on different pairs do not cancel. With GradDrop it also averages over gradients "
    "that skip one layer each, so a contribution can be large where the effect is small.",
    "The scores are estimates by gradients, made to choose what to check: patch the nodes at the top exactly before "
    "relying on them.",
)


def write_report(found: NodeScores, path: str | os.PathLike[str]) -> None:
    """Write one HTML page that needs no network: summary, top nodes, heat maps of every kind, how to read them.

    Needs plotly; ImportError says so. Raises OSError naming the path if it cannot be written.
    """
    offline = require("plotly.offline", "report")
    figures = "\n".join(_figures(found))
    title = f"{found.method} of {found.metric} on {found.model}"
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style>
<script>{offline.get_plotlyjs()}</script></head><body>
<h1>{html.escape(title)}</h1>
<h2>Summary</h2>{_summary(found)}
<h2>Top nodes</h2><div class="scroll">{_top_table(found)}</div>
<h2>Heat maps</h2>{figures}
<h2>How to read this</h2>{"".join(f"<p>{text}</p>" for text in _HOW_TO_READ)}
</body></html>
"""
    write_text(path, page)


def _figures(found: NodeScores) -> Iterator[str]:
    for kind, width in found.space.widths.items():
        views: list[tuple[By, Over]] = [("effect", "position"), ("contribution", "position")]
        if 1 < width <= WIDEST:
            views = [("effect", "head"), ("contribution", "head"), ("effect", "position")]
        yield f"<h3>{kind}</h3>"
        for by, over in views:
            figure = heatmap(found, kind, by=by, over=over)
            yield str(
                figure.to_html(
                    full_html=False,
                    include_plotlyjs=False,
                    config={"displaylogo": False, "responsive": True},
                )
            )


def _summary(found: NodeScores) -> str:
    pairs = len(found.clean_value)
    rows = {
        "model": found.model,
        "method": found.method,
        "metric": found.metric,
        "direction": f"{found.direction}; {sign_text(found.direction)}",
        "pairs": str(pairs),
        "nodes": f"{len(found):,} ({', '.join(found.space.kinds)})",
        "metric on clean prompts": f"{found.clean_value.double().mean():.5g} (mean)",
        "metric on corrupted prompts": f"{found.corrupted_value.double().mean():.5g} (mean)",
        "backend": found.backend,
        **found.metadata,
    }
    if found.tokens is not None:
        rows["tokens"] = " | ".join(visible(token) for token in found.tokens)
    return _table([[html.escape(name), html.escape(value)] for name, value in rows.items()])


def _top_table(found: NodeScores) -> str:
    head = ["", "kind", "layer", "head or neuron", "position", "token", "contribution", "effect"]
    rows = [
        [
            str(rank),
            node.kind,
            str(node.layer),
            str(node[3]),
            str(node.position),
            "" if node.token is None else html.escape(visible(node.token)),
            f"{node.contribution:.5g}",
            f"{node.effect:+.5g}",
        ]
        for rank, node in enumerate(found.top(min(_TOP, len(found))), start=1)
    ]
    return _table(rows, head)


def _table(rows: list[list[str]], head: list[str] | None = None) -> str:
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    if head is not None:
        lines.insert(0, "".join(f"<th>{cell}</th>" for cell in head))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
