"""atp-fast mib: a run's scores as the folder that MIB's leaderboard asks for, and their scores by MIB's protocol."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from atp_fast.cli import options
from atp_fast.cli.attribute import read_file
from atp_fast.cli.folder import writable_folder
from atp_fast.cli.opened import open_run
from atp_fast.cli.show import console, print_written
from atp_fast.files import write_text

if TYPE_CHECKING:
    from atp_fast.integrations.eap_faithfulness import Evaluation

FOLDER = "mib"
NUMBERS = "mib.json"
# the names that MIB's leaderboard looks for in a folder's name -> hub names of the model
LABELS = {"gpt2": "gpt2 gpt2-small", "qwen2.5": "Qwen2.5-0.5B", "gemma2": "gemma-2-2b"} | {
    "llama3": "Llama-3.1-8B"
}


def mib(
    run: options.Run,
    task: Annotated[
        str, typer.Option(help="Task in the folder's name: ioi, mcqa, arithmetic-addition, ...")
    ],
    label: Annotated[
        str | None,
        typer.Option(
            help="Model in the folder's name: gpt2, qwen2.5, gemma2 or llama3 on the leaderboard; by the model if not given."
        ),
    ] = None,
    scores: Annotated[
        str,
        typer.Option(
            help="effect (signed, as EAP-IG's) or contribution (mean |effect|: what GradDrop repairs)."
        ),
    ] = "effect",
    suffix: Annotated[str, typer.Option("--format", help="json or pt.")] = "json",
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Pairs to evaluate on (.jsonl or EAP-IG's .csv), such as a validation set; the run's own if not given."
        ),
    ] = None,
    metric: options.Metric = options.DEFAULT_METRIC,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the submission's folders; RUN/mib if not given.")
    ] = None,
    model: options.MovedModel = None,
    backend: options.Backend = "auto",
) -> None:
    """Write a run's node scores as MIB's importances, and score them: CPR and CMD by exact patching.

    The run must have scored z, mlp_out and resid_pre nodes. Circuits of the
    best nodes are kept clean, everything else is patched to its corrupted
    value, and the faithfulness of what is left is plotted over their size.
    """
    from atp_fast.integrations.eap import node_importances
    from atp_fast.integrations.eap_faithfulness import evaluate
    from atp_fast.integrations.graph_shape import GraphShape

    if scores not in ("effect", "contribution"):
        raise ValueError(f"scores must be effect or contribution, got {scores!r}")
    if suffix not in ("json", "pt"):
        raise ValueError(f"format must be json or pt, got {suffix!r}")
    for name, text in (("task", task), ("label", label or "model")):
        if not re.fullmatch(r"[A-Za-z0-9.-]+", text):
            raise ValueError(f"{name} must be letters, digits, . and -, got {text!r}")
    opened = open_run(run, model, backend)
    importances = node_importances(
        opened.found,
        GraphShape.of(opened.engine),
        scores="effect" if scores == "effect" else "contribution",
    )
    name = f"{task}_{label or _label(opened.found.model)}"
    folder = writable_folder((out or run / FOLDER) / name)
    path = folder / f"importances.{suffix}"
    chosen = opened.pairs if pairs is None else read_file(pairs, opened.tokenizer)
    evaluation = evaluate(opened.engine, chosen, importances, metric)
    importances.save(path)
    write_text(run / NUMBERS, json.dumps(evaluation.to_dict(), indent=2) + "\n")
    _print(evaluation, metric, len(chosen))
    print_written([path, run / NUMBERS])


def _label(model: str) -> str:
    """MIB's name of a model, or the last part of its own."""
    own = Path(model).name
    for label, names in LABELS.items():
        if own in names.split():
            return label
    return re.sub(r"[^A-Za-z0-9.-]+", "-", own)


def _print(found: Evaluation, metric: str, pairs: int) -> None:
    from atp_fast.integrations.eap_faithfulness import FRACTIONS

    out = console()
    out.print(
        f"{metric} on {pairs} pair{'s' * (pairs != 1)}: {found.full:.4f} with all nodes, {found.empty:.4f} with none",
        markup=False,
    )
    table = Table(title="Faithfulness of the best nodes")
    for name in ("part", "nodes", "by score", "by |score|"):
        table.add_column(name, justify="right")
    rows = zip(
        FRACTIONS, found.by_score.sizes, found.by_score.values, found.by_size.values, strict=True
    )
    for fraction, size, signed, absolute in rows:
        table.add_row(f"{100 * fraction:g} %", str(size), f"{signed:.4f}", f"{absolute:.4f}")
    out.print(table)
    out.print(
        f"CPR {found.by_score.area():.4f} (log axis {found.by_score.area(log=True):.4f}), high is good; "
        f"CMD {found.by_size.distance():.4f} (log axis {found.by_size.distance(log=True):.4f}), low is good",
        markup=False,
    )
