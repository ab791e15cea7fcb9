"""What a study leaves behind: CSV tables, curves, and a Markdown summary."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atp_fast.extras import require
from atp_fast.files import write_csv, write_text, written_whole
from atp_fast.results.figures import LIGHT, OPTIONS, BrowserError, plain, save_figure
from atp_fast.study.runs import MARKS, Study

CONVENTION = (
    "Costs are forward-pass equivalents: a forward on one pair is 1, a backward 2. Verifying a node costs one forward "
    "per pair. AtP costs 2 forwards and 1 backward per pair. The QK fix adds at most 1 forward. GradDrop and AtP* take "
    "(L+1)/2 backwards in place of 1, L being the number of layers, since all dropped gradients share one sweep. The "
    "clean and the corrupted forward that exact patching itself needs are counted for no method; AtP pays for its own "
    "two. cost(K) is the cost until all K nodes of largest contribution are verified (or 90 % of them). IRWRGM is the "
    "geometric mean over K, weighted by 1/K, of cost(K) over the oracle's; 1 is the oracle. Over seeds all numbers are "
    "geometric means. A number after ≥ is a lower bound: a run was stopped at its limit."
)
COLOURS = {
    "oracle": "#000000",
    "iterative": "#9e9e9e",
    "subsampling": "#b07aa1",
    "blocks": "#edc948",
    "hierarchical": "#f28e2b",
    "atp": "#4e79a7",
    "atp+qk": "#76b7b2",
    "atp+graddrop": "#59a14f",
    "atp*": "#e15759",
}


def write_study(
    study: Study, folder: str | Path, title: str = "Method study", about: str = ""
) -> list[Path]:
    """Write results.csv, settings.csv, curves.csv, bounds.csv, summary.md, curves.html and, where a browser can draw it,
    curves.png.

    about: what else the summary says at its top, such as the machine.
    Returns their paths. Raises ImportError, after the tables are written, when plotly or kaleido is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "results": study.results,
        "settings": study.settings,
        "curves": study.curves,
        "bounds": study.bounds,
    }
    paths = []
    for name, rows in tables.items():
        paths.append(folder / f"{name}.csv")
        write_rows(paths[-1], rows)
    paths.append(folder / "summary.md")
    write_text(paths[-1], summary(study, title, about))
    paths.append(folder / "curves.html")
    figure = recall_curves(study, title)
    with written_whole(paths[-1]) as temporary:
        figure.write_html(temporary, include_plotlyjs=True, config=OPTIONS)
    with contextlib.suppress(BrowserError):
        drawn = recall_curves(study, title, recalls=[1.0])
        save_figure(drawn, folder / "curves.png", width=1400, scale=1)
        paths.append(folder / "curves.png")
    return paths


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV table, floats with six significant digits; an empty file for no rows."""
    header = list(rows[0]) if rows else []
    write_csv(path, header, ([_cell(row[name]) for name in header] for row in rows))


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def cases(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(task, family) of rows, in order of first appearance."""
    return list(dict.fromkeys((row["task"], row["family"]) for row in rows))


def of_case(rows: Iterable[Mapping[str, Any]], case: tuple[str, str]) -> list[Mapping[str, Any]]:
    return [row for row in rows if (row["task"], row["family"]) == case]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if value == "":
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cost(row: Mapping[str, Any], k: int) -> str:
    bound = row["censored_from"] != "" and k >= row["censored_from"]
    return ("≥ " if bound else "") + _number(row[f"cost_{k}"])


def summary(study: Study, title: str, about: str = "") -> str:
    """Per case a table of methods, best first, and the bounds; what the numbers mean above them."""
    parts = [f"# {title}", *([about] if about else []), CONVENTION]
    for case in cases(study.results):
        rows = of_case(study.results, case)
        first = rows[0]
        parts.append(f"## {case[0]}, {case[1]} nodes")
        parts.append(
            f"{first['nodes']:,} candidate nodes on {first['pairs']} pair{'s' if first['pairs'] > 1 else ''}, K up to "
            f"{first['top']:,}. Exact patching took {1000 * first['verify_seconds_per_forward']:.3g} ms per node and "
            f"pair. Each baseline's best setting of {_settings(study, case)}, over {_seeds(rows)} seeds."
        )
        marks = [k for k in MARKS if k <= first["top"]]
        header = ["method", "setting", "IRWRGM", "lowest to highest", "IRWRGM 90 %"]
        header += [f"cost({k})" for k in marks] + ["cost of the ranking", "its seconds"]
        table = []
        for row in sorted(rows, key=lambda row: (row["method"] != "oracle", row["irwrgm"])):
            least = "≥ " if row["censored_from"] != "" else ""
            table.append(
                [
                    row["method"],
                    row["setting"],
                    f"{least}{row['irwrgm']:.3g}",
                    f"{row['irwrgm_lowest']:.3g} to {row['irwrgm_highest']:.3g}",
                    f"{least}{row['irwrgm_90']:.3g}",
                    *(_cost(row, k) for k in marks),
                    _number(row["ranking_forwards"]),
                    _number(row["ranking_seconds"]),
                ]
            )
        parts.append(markdown_table(header, table))
        bounds = of_case(study.bounds, case)
        if bounds:
            parts.append(_bounds_text(bounds))
    return "\n\n".join(parts) + "\n"


def _settings(study: Study, case: tuple[str, str]) -> str:
    tried: dict[str, int] = {}
    for row in of_case(study.settings, case):
        if row["setting"]:
            tried[row["method"]] = tried.get(row["method"], 0) + 1
    return ", ".join(f"{count} ({method})" for method, count in tried.items()) or "1"


def _seeds(rows: Iterable[Mapping[str, Any]]) -> int:
    return max(int(row["seeds"]) for row in rows)


def _bounds_text(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    header = ["after verifying", *(f"{100 * c:g} %" for c in _levels(rows)), "largest missed"]
    if first["pairs"] > 1:
        header.append("largest missed, mean of abs.")
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        line = [f"top {of_method[0]['verified']} of {method}"]
        line += [f"{row['bound']:.3g}" for row in of_method]
        line.append(f"{of_method[0]['true_largest_missed']:.3g}")
        if first["pairs"] > 1:
            line.append(f"{of_method[0]['true_largest_missed_contribution']:.3g}")
        table.append(line)
    return (
        f"Bound on the largest missed |effect|, from {first['forwards']:,} random subsets (p = "
        f"{first['probability']:g}), beside the true one; the largest effect of all is {first['largest_of_all']:.3g}. "
        "The bound assumes near-additive, near-normal subset effects.\n\n"
        + markdown_table(header, table)
    )


def _levels(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    return list(dict.fromkeys(row["confidence"] for row in rows))


def recall_curves(study: Study, title: str, recalls: Sequence[float] | None = None) -> Any:
    """plotly figure: per case, cost of verified recall against K on logarithmic axes, in forward-pass equivalents.

    recalls: those drawn, all that the study has when None; those below 1 are dashed, and hidden until the legend is clicked.
    """
    go = require("plotly.graph_objects", "the recall curves")
    make_subplots = require("plotly.subplots", "the recall curves").make_subplots
    found = cases(study.curves)
    columns = min(2, max(1, len(found)))
    rows = max(1, math.ceil(len(found) / columns))
    names = [plain(f"{task}, {family}") for task, family in found]
    figure = make_subplots(rows, columns, subplot_titles=names, vertical_spacing=0.25 / rows)
    shown: set[str] = set()
    for number, case in enumerate(found):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for method, recall, k, cost in _lines(study, case):
            if recalls is not None and recall not in recalls:
                continue
            name = method if recall == 1.0 else f"{method}, {100 * recall:g} %"
            figure.add_trace(
                go.Scatter(
                    x=k,
                    y=cost,
                    mode="lines",
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    visible=True if recall == 1.0 else "legendonly",
                    line={"color": _colour(method), "dash": "solid" if recall == 1.0 else "dash"},
                ),
                **place,
            )
            shown.add(name)
    decades = dict(type="log", dtick=1, exponentformat="none", separatethousands=True)
    figure.update_xaxes(title="K", **decades)
    figure.update_yaxes(title="cost until the top K are verified", **decades)
    figure.update_layout(title=plain(title), height=450 * rows, template=LIGHT)
    return figure


def _colour(method: str) -> str:
    return COLOURS.get(method, "#af7aa1")


def _lines(
    study: Study, case: tuple[str, str]
) -> Iterable[tuple[str, float, list[int], list[float]]]:
    """Method, recall, K and cost of every curve of a case, as far as the costs are known."""
    rows = [row for row in of_case(study.curves, case) if not row["lower_bound"]]
    for method, recall in dict.fromkeys((row["method"], row["recall"]) for row in rows):
        points = [row for row in rows if (row["method"], row["recall"]) == (method, recall)]
        yield method, recall, [row["k"] for row in points], [row["cost"] for row in points]
