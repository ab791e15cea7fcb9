"""atp-fast bench: the kernels on this machine, against their definition in PyTorch."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Annotated

import typer

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def bench(
    positions: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    cotangents: Annotated[
        int, typer.Option(min=1, help="Gradients taken together, as AtP* does.")
    ] = 12,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.")] = "float32",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each kernel.")] = 5,
) -> None:
    """Time every kernel on random inputs, beside the PyTorch code that defines it.

    Backends take turns; the table has median milliseconds of a call, and how many times faster than `reference`
    it is. The project's own measurements, with other opponents and their rows, are `make bench-kernels`.
    """
    import torch
    from rich.table import Table

    from atp_fast import ops
    from atp_fast.cli.show import console
    from atp_fast.ops.trial import calls_of, in_turns, random_inputs, seconds

    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be among {', '.join(_DTYPES)}, got {dtype!r}")
    has_cuda = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be among auto, cpu, cuda, got {device!r}")
    if device == "cuda" and not has_cuda:
        raise ValueError("--device cuda needs a CUDA device, torch sees none")
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    shape = (1, heads, positions, head_dim)
    calls = calls_of(random_inputs(shape, cotangents, getattr(torch, dtype), device))
    compiled = ops.backend_for(torch.empty(0, device=device))
    names = list(dict.fromkeys(["reference", compiled]))
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    table = Table(
        title=f"{positions} tokens, {heads} heads of {head_dim}, {cotangents} cotangents, {dtype}, {device}{threads}"
    )
    table.add_column("op")
    for name in names:
        table.add_column(f"{name}, ms", justify="right")
    table.add_column("times faster", justify="right")
    for op, call in calls.items():
        turns = in_turns({name: partial(call, backend=name) for name in names}, rounds, seconds)
        medians = {name: statistics.median(found) for name, found in turns.items()}
        table.add_row(
            op,
            *(f"{1e3 * medians[name]:.2f}" for name in names),
            f"{medians['reference'] / medians[compiled]:.1f}",
        )
    console().print(table)
