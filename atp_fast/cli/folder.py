"""The folder of a run: what `attribute` leaves in it and the later verbs read."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from atp_fast.files import write_csv

if TYPE_CHECKING:
    from atp_fast.prompts.pairs import PromptPairs
    from atp_fast.results import Attribution

RUN = "run.safetensors"
PAIRS = "pairs.jsonl"
TABLE = "nodes.csv"
REPORT = "report.html"
TABLE_ROWS = 10_000
COLUMNS = ("kind", "layer", "position", "token", "index", "contribution", "effect")


def writable_folder(path: Path) -> Path:
    """The folder, made where it is missing. Raises OSError, before any work, where files cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f"out must be a folder that can be written, got {str(path)!r}: {error.strerror or error}"
        ) from error
    return path


def write_run(folder: Path, found: Attribution, pairs: PromptPairs, table_rows: int) -> list[Path]:
    """Writes the run, its pairs, a table of its best nodes and, where its packages are installed, the report."""
    found.save(folder / RUN)
    pairs.to_jsonl(folder / PAIRS)
    best = found.top(min(table_rows, len(found)))
    rows = ([getattr(node, name) for name in COLUMNS] for node in best)
    write_csv(folder / TABLE, COLUMNS, rows)
    written = [folder / RUN, folder / PAIRS, folder / TABLE]
    if all(importlib.util.find_spec(package) for package in ("plotly", "jinja2")):
        found.report(folder / REPORT)
        written.append(folder / REPORT)
    return written
