"""atp-fast attribute: score every node of a model on prompt pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atp_fast.attribution.question import Question
from atp_fast.cli import options
from atp_fast.cli.commands import note
from atp_fast.cli.folder import TABLE_ROWS, writable_folder, write_run
from atp_fast.cli.show import print_top, print_written

if TYPE_CHECKING:
    from atp_fast.engine import Engine
    from atp_fast.prompts import Direction, PromptPairs
    from atp_fast.prompts.encoding import Tokenizer
    from atp_fast.results import Attribution

PROMPTS = "Prompts (one of --task, --pairs, --clean)"
RESULTS = "Results"


def attribute(
    model: options.Model,
    task: Annotated[
        str | None,
        typer.Option(help=f"Built-in task: {options.TASK_NAMES}.", rich_help_panel=PROMPTS),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="File of pairs: .jsonl with clean, corrupted, answer and wrong_answer on each line, or EAP-IG's .csv.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    clean: Annotated[
        list[str] | None,
        typer.Option(help="Clean prompt; repeat for more pairs.", rich_help_panel=PROMPTS),
    ] = None,
    corrupted: Annotated[
        list[str] | None,
        typer.Option(
            help="Corrupted prompt of as many tokens, one per --clean.", rich_help_panel=PROMPTS
        ),
    ] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            help="Token that should follow the clean prompt, usually with its space: ' Jessica'.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    wrong_answer: Annotated[
        list[str] | None,
        typer.Option(
            help="Token to compare it with; logit_diff and prob_diff need it.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    n_pairs: Annotated[
        int | None,
        typer.Option(
            help="Pairs of the task; its own number if not given.", rich_help_panel=PROMPTS
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the task.", rich_help_panel=PROMPTS)] = 0,
    metric: options.Metric = options.DEFAULT_METRIC,
    method: options.Method = Question.method,
    nodes: options.Nodes = options.DEFAULT_NODES,
    direction: options.Direction = Question.direction,
    backend: options.Backend = "auto",
    dtype: options.Dtype = None,
    precision: options.Precision = None,
    memory_budget: options.MemoryBudget = None,
    shard_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pairs per shard. A killed run, typed again, goes on from the shards it had finished.",
            rich_help_panel=options.METHOD_PANEL,
        ),
    ] = 16,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="So many of torchrun's processes share one model's heads and neurons.",
            rich_help_panel=options.METHOD_PANEL,
        ),
    ] = 1,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the run, its pairs, a table and the report; later verbs take it.",
            rich_help_panel=RESULTS,
        ),
    ] = Path("runs/attribute"),
    top: Annotated[int, typer.Option(min=1, help="Nodes to print.", rich_help_panel=RESULTS)] = 20,
    table_rows: Annotated[
        int, typer.Option(min=1, help="Best nodes in the table nodes.csv.", rich_help_panel=RESULTS)
    ] = TABLE_ROWS,
) -> None:
    """Score every attention and MLP node of a model on prompt pairs, and show the best.

    A contribution says how strongly patching one node alone would change
    the metric, on average over the pairs; the effect is the same with its
    sign. Both are estimates from gradients: verify the best before use.
    Many pairs can be shared by several processes:
    torchrun --nproc-per-node 4 --no-python atp-fast attribute ...
    """
    sources = {"--task": task, "--pairs": pairs, "--clean": clean}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of --task, --pairs and --clean is needed, got {' and '.join(given) or 'none'}"
        )
    writable_folder(out)

    from atp_fast.distributed import launched, rank, remove_shards, to_local_device
    from atp_fast.engine import Engine
    from atp_fast.models import load_model
    from atp_fast.prompts import PromptPairs
    from atp_fast.prompts.tasks import load_task

    note(f"loading {model}")
    network, tokenizer = load_model(model, dtype=dtype, tensor_parallel=tensor_parallel)
    if task:
        chosen = load_task(task, tokenizer, n_pairs=n_pairs, seed=seed)
    elif pairs:
        chosen = read_file(pairs, tokenizer)
    else:
        chosen = PromptPairs.from_text(
            tokenizer,
            clean=clean or [],
            corrupted=corrupted or [],
            answers=answer or [],
            wrong_answers=wrong_answer or None,
        )
    if launched() and tensor_parallel == 1:
        to_local_device(network)
    engine = Engine(network, backend, precision, memory_budget)
    way = cast("Direction", direction)
    question = Question(metric, method, options.names(nodes), way)
    shards = out / "shards"
    found = _ask(engine, chosen, question, shards, shard_size)
    if rank() > 0:
        return
    print_top(found, found.top(min(top, len(found))))
    print_written(write_run(out, found, chosen, table_rows))
    remove_shards(shards)


def _ask(
    engine: Engine, pairs: PromptPairs, question: Question, folder: Path, shard_size: int
) -> Attribution:
    """In shards, kept in the folder until the run is done, for several processes or more pairs than one shard's."""
    from atp_fast.distributed import ShardError, attribute_sharded, launched

    if not launched() and len(pairs) <= shard_size:
        return engine.attribute(pairs, **vars(question))
    try:
        return attribute_sharded(engine, pairs, folder, **vars(question), shard_size=shard_size)
    except ShardError as error:
        raise ValueError(str(error)) from error


def read_file(path: Path, tokenizer: Tokenizer) -> PromptPairs:
    from atp_fast.prompts import PromptPairs

    readers = {".jsonl": PromptPairs.from_jsonl, ".csv": PromptPairs.from_csv}
    if path.suffix not in readers:
        raise ValueError(f"pairs must be a .jsonl or .csv file, got {str(path)!r}")
    return readers[path.suffix](path, tokenizer)
