"""atp-fast attribute: score every node of a model on prompt pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atp_fast.cli.commands import note
from atp_fast.cli.folder import writable_folder, write_run
from atp_fast.cli.show import print_top, print_written

if TYPE_CHECKING:
    from atp_fast.engine import Engine
    from atp_fast.prompts.encoding import Tokenizer
    from atp_fast.prompts.pairs import PromptPairs
    from atp_fast.results import Attribution

PROMPTS = "Prompts (one of --task, --pairs, --clean)"
METHOD = "Method"
RESULTS = "Results"


def attribute(
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, or smollm2-135m (the demo model).")
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="Built-in task: city, ioi, ioi_pair, a_an, greater_than, induction or random.",
            rich_help_panel=PROMPTS,
        ),
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
    metric: Annotated[
        str, typer.Option(help="nll, logit_diff, prob_diff or kl.", rich_help_panel=METHOD)
    ] = "nll",
    method: Annotated[
        str,
        typer.Option(help="atp, atp+qk, atp+graddrop or atp*.", rich_help_panel=METHOD),
    ] = "atp*",
    nodes: Annotated[
        str,
        typer.Option(
            help="Node kinds, with commas: q, k, v, z, neuron, attn_out, mlp_out, resid_pre.",
            rich_help_panel=METHOD,
        ),
    ] = "q,k,v,z,neuron",
    direction: Annotated[
        str,
        typer.Option(
            help="noising patches corrupted values into the clean run, denoising the reverse.",
            rich_help_panel=METHOD,
        ),
    ] = "noising",
    backend: Annotated[
        str, typer.Option(help="auto, reference, cpp or triton.", rich_help_panel=METHOD)
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Load the model as float32, float64, bfloat16 or float16; its own if not given.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="bf16: the sweep's matrix products in bfloat16; the model's dtype if not given.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Bytes, 8GiB, or auto.", rich_help_panel=METHOD),
    ] = None,
    shard_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pairs per shard. A killed run, typed again, goes on from the shards it had finished.",
            rich_help_panel=METHOD,
        ),
    ] = 16,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the run, its pairs, a table and the page of heat maps; later verbs take it.",
            rich_help_panel=RESULTS,
        ),
    ] = Path("runs/attribute"),
    top: Annotated[int, typer.Option(min=1, help="Nodes to print.", rich_help_panel=RESULTS)] = 20,
    table_rows: Annotated[
        int, typer.Option(min=1, help="Best nodes in the table nodes.csv.", rich_help_panel=RESULTS)
    ] = 10_000,
) -> None:
    """Score every attention and MLP node of a model on prompt pairs, and show the best.

    A contribution says how strongly patching one node alone would change
    the metric, on average over the pairs; the effect is the same with its
    sign. Both are estimates from gradients: verify the best before use.
    Many pairs can be shared by several processes:
    torchrun --nproc-per-node 4 --no-python atp-fast attribute ...
    """
    _check_source(task, pairs, clean)
    writable_folder(out)

    from atp_fast.distributed import launched, rank, remove_shards, to_local_device
    from atp_fast.engine import Engine
    from atp_fast.models import load_model

    note(f"loading {model}")
    network, tokenizer = load_model(model, dtype=dtype)
    found_pairs = _read_pairs(
        tokenizer, task, pairs, clean, corrupted, answer, wrong_answer, n_pairs, seed
    )
    if launched():
        to_local_device(network)
    engine = Engine(network, backend, precision, memory_budget)
    kinds = [kind.strip() for kind in nodes.split(",")]
    shards = out / "shards"
    found = _attribute(engine, found_pairs, shards, metric, method, kinds, direction, shard_size)
    if rank() > 0:
        return
    print_top(found, found.top(min(top, len(found))))
    print_written(write_run(out, found, found_pairs, table_rows))
    remove_shards(shards)


def _attribute(
    engine: Engine,
    pairs: PromptPairs,
    folder: Path,
    metric: str,
    method: str,
    nodes: list[str],
    direction: str,
    shard_size: int,
) -> Attribution:
    """In shards, kept in the folder until the run is done, for several processes or more pairs than one shard's."""
    from atp_fast.distributed import ShardError, attribute_sharded, launched
    from atp_fast.prompts.directions import Direction

    way = cast(Direction, direction)
    if not launched() and len(pairs) <= shard_size:
        return engine.attribute(pairs, metric=metric, method=method, nodes=nodes, direction=way)
    try:
        return attribute_sharded(
            engine,
            pairs,
            folder,
            metric=metric,
            method=method,
            nodes=nodes,
            direction=way,
            shard_size=shard_size,
        )
    except ShardError as error:
        raise ValueError(str(error)) from error


def _check_source(task: str | None, pairs: Path | None, clean: list[str] | None) -> None:
    given = [
        name for name, value in (("--task", task), ("--pairs", pairs), ("--clean", clean)) if value
    ]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of --task, --pairs and --clean is needed, got {' and '.join(given) or 'none'}"
        )


def _read_pairs(
    tokenizer: Tokenizer,
    task: str | None,
    pairs: Path | None,
    clean: list[str] | None,
    corrupted: list[str] | None,
    answer: list[str] | None,
    wrong_answer: list[str] | None,
    n_pairs: int | None,
    seed: int,
) -> PromptPairs:
    from atp_fast.prompts.pairs import PromptPairs
    from atp_fast.prompts.tasks import load_task

    if task:
        return load_task(task, tokenizer, n_pairs=n_pairs, seed=seed)
    if pairs:
        if pairs.suffix == ".jsonl":
            return PromptPairs.from_jsonl(pairs, tokenizer)
        if pairs.suffix == ".csv":
            return PromptPairs.from_csv(pairs, tokenizer)
        raise ValueError(f"pairs must be a .jsonl or .csv file, got {str(pairs)!r}")
    return PromptPairs.from_text(
        tokenizer,
        clean=clean or [],
        corrupted=corrupted or [],
        answers=answer or [],
        wrong_answers=wrong_answer or None,
    )
