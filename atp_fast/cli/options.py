"""The options that several verbs share, each worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atp_fast.attribution.question import METHODS, Question
from atp_fast.nodes import KINDS

METHOD_PANEL = "Method"

DEFAULT_METRIC = str(Question.metric)
DEFAULT_NODES = ",".join(Question.nodes)
METRIC_NAMES = "nll, logit_diff, prob_diff, kl"
TASK_NAMES = "city, ioi, ioi_pair, a_an, greater_than, induction, random"

Model = Annotated[str, typer.Option(help="Hub id, local folder, or smollm2-135m (the demo model).")]
MovedModel = Annotated[
    str | None, typer.Option("--model", help="The model, where it has moved since the run.")
]
Run = Annotated[Path, typer.Argument(help="Folder that `atp-fast attribute` wrote.")]
Metric = Annotated[str, typer.Option(help=f"{METRIC_NAMES}.", rich_help_panel=METHOD_PANEL)]
Method = Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.", rich_help_panel=METHOD_PANEL)]
Nodes = Annotated[
    str,
    typer.Option(
        help=f"Node kinds, with commas: {', '.join(KINDS)}.", rich_help_panel=METHOD_PANEL
    ),
]
RunNodes = Annotated[
    str | None,
    typer.Option("--nodes", help="Node kinds, with commas; all of the run's if not given."),
]
Direction = Annotated[
    str,
    typer.Option(
        help="noising patches corrupted values into the clean run, denoising the reverse.",
        rich_help_panel=METHOD_PANEL,
    ),
]
Backend = Annotated[
    str, typer.Option(help="auto, reference, cpp or triton.", rich_help_panel=METHOD_PANEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Load the model as float32, float64, bfloat16 or float16; its own if not given.",
        rich_help_panel=METHOD_PANEL,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="bf16: the sweep's matrix products in bfloat16; the model's dtype if not given.",
        rich_help_panel=METHOD_PANEL,
    ),
]
MemoryBudget = Annotated[
    str | None, typer.Option(help="Bytes, 8GiB, or auto.", rich_help_panel=METHOD_PANEL)
]
Top = Annotated[int, typer.Option(min=1, help="Nodes to print.")]


def names(text: str) -> tuple[str, ...]:
    """The parts of an option that takes several names with commas."""
    return tuple(part.strip() for part in text.split(","))
