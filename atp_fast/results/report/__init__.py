"""A report of scores: one HTML page that opens without a network."""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp_fast.extras import require
from atp_fast.files import write_text
from atp_fast.patching.diagnostics import MissedBound
from atp_fast.results.figures import DARK, LIGHT, OPTIONS
from atp_fast.results.patch_effects import PatchEffects
from atp_fast.results.report.charts import heat_maps
from atp_fast.results.report.checks import bounded, checked
from atp_fast.results.report.texts import node_rows, provenance, question, shown_prompts
from atp_fast.results.scores import NodeScores

_FOLDER = Path(__file__).parent


def write_report(
    found: NodeScores,
    path: str | os.PathLike[str],
    exact: PatchEffects | None = None,
    bound: MissedBound | Mapping[str, Any] | None = None,
) -> None:
    """Write the page; see Attribution.report. Its own part stays below 500 kB beside plotly's script."""
    jinja2, offline = require("jinja2", "report"), require("plotly.offline", "report")
    found = found.cpu()
    maps, prompts = heat_maps(found), shown_prompts(found)
    agreement = None if exact is None else checked(found, exact)
    figures = dict(maps.figures)
    if agreement is not None:
        figures["scatter"] = agreement.scatter()
    data = {
        "templates": {"light": LIGHT, "dark": DARK},
        "options": OPTIONS,
        "columns": maps.columns,
        "figures": {name: _without_template(figure) for name, figure in figures.items()},
        "tips": prompts.tips,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        found=found,
        question=question(found),
        prompts=prompts,
        nodes=node_rows(found, exact),
        maps=maps,
        checked=agreement,
        bound=None if bound is None else bounded(found, bound),
        provenance=provenance(found),
        data=_packed(data),
        plotly=offline.get_plotlyjs(),
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(_FOLDER / "page.js").read_text(encoding="utf-8"),
    )
    write_text(path, page)


def _packed(data: Any) -> str:
    """JSON, compressed, in base64: a quarter of its size, and nothing in it can end a script."""
    return base64.b64encode(gzip.compress(json.dumps(data).encode(), mtime=0)).decode()


def _without_template(figure: Any) -> dict[str, Any]:
    """A figure ready for JSON, NaN as null; its looks stand in the page once."""
    figure.layout.template = None
    found: dict[str, Any] = json.loads(figure.to_json())
    return found


__all__ = ["write_report"]
