"""Pictures of the rows in bench/results, written beside them (make bench-plots). No number is typed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rows import RESULTS, RowFile, shape_of

Rows = Sequence[Mapping[str, str]]


def chosen(rows: Rows, **wanted: str) -> list[Mapping[str, str]]:
    """Rows that hold a number and whose columns, or entries of their shape, are as wanted."""
    return [
        row
        for row in rows
        if row["median"] and all((row | shape_of(row)).get(k) == v for k, v in wanted.items())
    ]


def curve(axes: Axes, rows: Rows, by: str, label: str, scale: float = 1.0) -> None:
    """Medians over a shape entry, with p20 to p80 as bars."""
    points = sorted(
        (float(shape_of(r)[by]), *(scale * float(r[k]) for k in ("median", "p20", "p80")))
        for r in rows
    )
    if not points:
        return
    x, median, low, high = (list(column) for column in zip(*points, strict=True))
    below = [max(0.0, m - a) for m, a in zip(median, low, strict=True)]
    above = [max(0.0, b - m) for m, b in zip(median, high, strict=True)]
    axes.errorbar(x, median, (below, above), marker="o", capsize=3, label=label)


def finish(axes: Axes, title: str, x: str, y: str, log: str = "xy") -> None:
    """Titles, scales, ticks at the measured lengths, legend."""
    axes.set(title=title, xlabel=x, ylabel=y)
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if "y" in log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def sides(rows: Rows) -> list[tuple[str, str]]:
    """(provider, dtype) of all rows, in their order."""
    return list(dict.fromkeys((row["provider"], row["dtype"]) for row in rows))


def engine(rows: Rows, path: Path) -> None:
    """AtP* of every model: seconds, times faster than the literal reference, memory, share of the bound."""
    attribute = chosen(rows, op="attribute", mode="atp*")
    models = list(dict.fromkeys(shape_of(row)["model"] for row in attribute))
    panels = (
        ("wall_seconds", "seconds", 1.0, "xy"),
        ("times_faster_than literal", "times faster than the literal reference", 1.0, "x"),
        ("extra_peak_bytes", "peak memory above the model, MiB", 2.0**-20, "xy"),
        ("share_of_bound", "share of the arithmetic bound", 1.0, "x"),
    )
    figure, grid = plt.subplots(
        len(models), len(panels), figsize=(4.4 * len(panels), 3.6 * len(models)), squeeze=False
    )
    for model, line in zip(models, grid, strict=True):
        for (metric, label, scale, log), axes in zip(panels, line, strict=True):
            for provider, dtype in sides(attribute):
                found = chosen(
                    attribute, model=model, metric=metric, provider=provider, dtype=dtype
                )
                curve(axes, found, "T", f"{provider}, {dtype}", scale)
            finish(axes, f"AtP*, {model}", "tokens", label, log)
    save(figure, path)


def peers(rows: Rows, path: Path) -> None:
    """Every task and shape: seconds of each library's way."""
    cases = list(
        dict.fromkeys((row["op"], row["shape"]) for row in chosen(rows, metric="wall_seconds"))
    )
    figure, grid = plt.subplots(len(cases), 1, figsize=(9, 2.6 * len(cases)), squeeze=False)
    for (op, shape), axes in zip(cases, grid[:, 0], strict=True):
        found = chosen(rows, op=op, shape=shape, metric="wall_seconds")
        names = [f"{row['provider']}: {row['mode']}" for row in found]
        medians = [float(row["median"]) for row in found]
        ours = ["tab:blue" if name.startswith("atp_fast") else "tab:gray" for name in names]
        axes.barh(names, medians, color=ours)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set(title=f"{op}, {shape}", xlabel="seconds (median)")
    save(figure, path)


def scaling(rows: Rows, path: Path) -> None:
    """Seconds and memory against length, pairs, processes and prefix."""
    panels = (
        ("length", "T", "tokens"),
        ("pairs", "B", "pairs"),
        ("prefix", "shared", "shared tokens"),
    )
    figure, grid = plt.subplots(2, len(panels) + 1, figsize=(4.4 * (len(panels) + 1), 7.2))
    metrics = (
        ("wall_seconds", "seconds", 1.0),
        ("extra_peak_bytes", "peak memory above the model, MiB", 2.0**-20),
    )
    for (metric, label, scale), line in zip(metrics, grid, strict=True):
        for (op, by, x), axes in zip(panels, line, strict=False):
            found = chosen(rows, op=op, metric=metric)
            # the short prompt and the bare forward of the prefix part are no points of its curve
            found = [r for r in found if op != "prefix" or shape_of(r)["T"] == longest(found)]
            for provider, mode in dict.fromkeys((r["provider"], r["mode"]) for r in found):
                mine = chosen(found, provider=provider, mode=mode)
                curve(axes, mine, by, f"{provider} {mode}", scale)
            finish(axes, op, x, label, "" if op == "prefix" else "xy")
    for metric, axes in zip(("wall_seconds", "cpu_seconds"), grid[:, -1], strict=True):
        curve(axes, chosen(rows, op="processes", metric=metric), "processes", "atp_fast atp*")
        finish(axes, "processes", "processes", metric.replace("_", " "), "")
    save(figure, path)


def longest(rows: Rows) -> str:
    """The largest T of these rows."""
    return str(max((int(shape_of(row)["T"]) for row in rows), default=0))


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure and says so."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


PICTURES: dict[str, Callable[[Rows, Path], None]] = {
    "engine": engine,
    "peers": peers,
    "scaling": scaling,
}


def main() -> None:
    """One device in a picture: the one with most rows."""
    for name, draw in PICTURES.items():
        rows = RowFile(RESULTS / f"{name}.csv").read()
        if rows:
            device = Counter(row["device"] for row in rows).most_common(1)[0][0]
            draw(chosen(rows, device=device), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
