"""A report of scores in one HTML file."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator

from torch import Tensor

from atp_fast.extras import require
from atp_fast.files import write_text
from atp_fast.nodes import label
from atp_fast.prompts.directions import sign_text
from atp_fast.results.figures import WIDEST, heatmap, visible
from atp_fast.results.scores import By, NodeScores, Over

_TOP = 50
_SEARCHED, _NAMED = 1000, 5
"""Best nodes among which each token's own are looked for, and how many of them are named."""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: pre-wrap; }
.scroll { overflow-x: auto; } .prompt { line-height: 2.2; white-space: pre-wrap; font-size: 1.15rem; }
.prompt span { padding: .25rem 0; border-radius: .2rem; cursor: help; } summary { cursor: pointer; }
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
    """Write one HTML page that needs no network: the prompt, top nodes, heat maps of every kind, how to read them.

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
<p>{html.escape(_question(found))}</p>
{_prompt(found)}
<h2>Top nodes</h2><div class="scroll">{_top_table(found)}</div>
<h2>Heat maps</h2>{figures}
<h2>How to read this</h2>{"".join(f"<p>{text}</p>" for text in _HOW_TO_READ)}
<details><summary>Where the numbers come from</summary>{_provenance(found)}</details>
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


def _question(found: NodeScores) -> str:
    """What was asked, in words."""
    pairs = len(found.clean_value)
    clean, corrupted = (
        float(x.double().mean()) for x in (found.clean_value, found.corrupted_value)
    )
    return (
        f"{len(found):,} nodes ({', '.join(found.space.kinds)}) on {pairs} pair{'s' * (pairs != 1)} of prompts, "
        f"{found.direction}; {sign_text(found.direction)}. The metric is {clean:.5g} on the clean and "
        f"{corrupted:.5g} on the corrupted prompts (mean)."
    )


def _prompt(found: NodeScores) -> str:
    """The tokens, coloured by the contributions of all nodes there; each names its best nodes."""
    if found.tokens is None:
        return ""
    tables = [found.totals(kind, by="contribution", over="position") for kind in found.space.kinds]
    sums = sum(table.double().cpu().nan_to_num(0, 0, 0).sum(0) for table in tables)
    assert isinstance(sums, Tensor)
    largest = float(sums[found.counts > 0].max()) or 1.0
    best: dict[int, list[str]] = {}
    for node in found.top(min(_SEARCHED, len(found))):
        names = best.setdefault(node.position, [])
        if len(names) < _NAMED:
            names.append(f"{label(node)}: {node.contribution:.4g}")
    spans = []
    for position, token in enumerate(found.tokens):
        if not int(found.counts[position]):
            continue
        total = float(sums[position])
        hint = "\n".join([f"position {position}, {total:.4g} in all", *best.get(position, [])])
        spans.append(
            f'<span tabindex="0" style="background: rgb(5 90 170 / {0.75 * total / largest:.3f})" '
            f'title="{html.escape(hint)}">{html.escape(visible(token))}</span>'
        )
    text = "The prompt, by the contributions of all nodes at a token (point at one for its best)"
    return f'<h2>{text}</h2><p class="prompt" dir="auto">{"".join(spans)}</p>'


def _provenance(found: NodeScores) -> str:
    rows = {"backend": found.backend, **found.metadata}
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
