"""Every op and backend against the reference and the best stock PyTorch (make bench-kernels).

Causal; on a CPU one batch of 12 heads in float32, on a GPU (taken where there is one) four of 16 in bfloat16 and float32.
The op tests run first; no number is printed on red. Providers of a cell take turns; rows go to bench/results/kernels.csv:
seconds, how many times faster each backend is than each opponent, the share of the best matrix-product rate that torch
reaches here in the same run (node_effects: of the copy bandwidth), and the peak memory beside inputs and outputs, on a
CPU in a process of its own. On a GPU also the seconds that it works on a call (kernel_seconds) and those that Python needs to
start it (host_seconds), the share of the peak then by the former; KV in a shape is the number of grouped key and value heads.
Operations are those of the causal half.
  attention              2 products; opponents: reference, SDPA (which keeps no row statistics)
  attention_vjp          1 + 4 C;    reference, SDPA's backward under vmap, and once per cotangent
  query_patch_effects    2;          reference
  key_patch_effects      2 + C;      reference, reference under torch.compile (at T = 1024, C = 12)
  attention_vjp_effects  3 + 4 C;    reference
  node_effects           bytes read; reference
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import (
    DEVICE,
    check_environment,
    device_seconds,
    extra_peak,
    host_seconds,
    in_subprocess,
    interleaved,
    product_paths,
    reset_peak,
    write_ratios,
)
from rows import RESULTS, ROOT, RowFile
from torch import Tensor

from atp_fast import ops
from atp_fast.ops.trial import Inputs, calls_of, random_inputs

GPU = DEVICE == "cuda"
BATCH, HEADS = (4, 16) if GPU else (1, 12)
# bytes of one (C, B, heads, T, T) matrix; the reference makes several
LARGEST_REFERENCE = 1 << (32 if GPU else 30)
REPEATS = 10 if GPU else 1
OPS = (
    "attention",
    "attention_vjp",
    "query_patch_effects",
    "key_patch_effects",
    "attention_vjp_effects",
    "node_effects",
)
PRODUCTS: dict[str, Callable[[int], int]] = {
    "attention": lambda c: 2,
    "attention_vjp": lambda c: 1 + 4 * c,
    "query_patch_effects": lambda c: 2,
    "key_patch_effects": lambda c: 2 + c,
    "attention_vjp_effects": lambda c: 3 + 4 * c,
}
Provider = Callable[[], object]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def stock(op: str, x: Inputs) -> dict[str, Provider]:
    """What a user without this package would write."""
    if op == "attention":
        attend = partial(sdpa, x.q, x.k, x.v)
        return {"SDPA": attend}
    if op != "attention_vjp":
        return {}
    inputs = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    z = sdpa(*inputs)

    def grad(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(z, inputs, g, retain_graph=True)

    def one_by_one() -> list[tuple[Tensor, ...]]:
        return [grad(g) for g in x.grad_z]

    return {"SDPA, vmap": lambda: torch.func.vmap(grad)(x.grad_z), "SDPA, loop": one_by_one}


def bench_cell(
    file: RowFile,
    op: str,
    cell: Cell,
    dtype: torch.dtype,
    rounds: int,
    compiled: bool,
) -> None:
    positions, head_dim, cotangents, kv_heads = cell
    shape = (BATCH, HEADS, positions, head_dim)
    x = random_inputs(shape, cotangents, dtype, DEVICE, kv_heads)
    call, backend = calls_of(x)[op], ops.backend_for(x.q)
    reference = partial(call, backend="reference")
    providers: dict[str, Provider] = {backend: partial(call, backend=backend), **stock(op, x)}
    matrix = 4 * BATCH * HEADS * positions**2 * (1 if op == "attention" else cotangents)
    note = ""
    if op == "node_effects" or matrix <= LARGEST_REFERENCE:
        providers["reference"] = reference
    else:
        note = f"reference left out: one of its matrices takes {matrix / 2**30:.1f} GiB"
    if compiled and op == "key_patch_effects" and (positions, cotangents) == (1024, 12):
        providers["reference, torch.compile"] = torch.compile(reference)
    name_of_dtype = str(dtype).removeprefix("torch.")
    paths = {k: path for k, path in product_paths().items() if k.startswith(name_of_dtype)}
    source = torch.randn(1 << (29 if GPU else 25), device=DEVICE)
    target = torch.empty_like(source)
    peaks: dict[str, Provider] = {f"peak {name}": run for name, (run, _) in paths.items()}
    if op == "node_effects":
        peaks = {"peak copy": lambda: target.copy_(source)}
    timings = interleaved({**providers, **peaks}, rounds, repeats=REPEATS)
    best = {"peak copy": 2 * source.nbytes}
    best |= {f"peak {name}": count for name, (_, count) in paths.items()}
    rate = max(best[name] / min(timings[name].wall) for name in peaks)
    columns: dict[str, Any] = {
        "op": op,
        "mode": "one call",
        "shape": {"B": BATCH, "H": HEADS, "T": positions, "D": head_dim, "C": cotangents}
        | ({"KV": kv_heads} if kv_heads != HEADS else {}),
        "dtype": name_of_dtype,
    }
    worked = timings[backend].wall
    if GPU:
        seconds = {name: device_seconds(fn) for name, fn in providers.items()}
        worked = seconds[backend]
        for name, fn in providers.items():
            file.add(seconds[name], metric="kernel_seconds", provider=name, **columns)
            started = host_seconds(fn, rounds)
            file.add(started, metric="host_seconds", provider=name, **columns)
    for name in providers:
        timings[name].write(file, provider=name, note=note if name == backend else "", **columns)
    for name in providers:
        if name != backend:
            write_ratios(
                file, timings[name], timings[backend], of=name, provider=backend, **columns
            )
    file.add(
        shares(op, worked, rate, positions, head_dim, cotangents, dtype.itemsize),
        metric="share_of_copy_bandwidth" if op == "node_effects" else "share_of_product_peak",
        provider=backend,
        note=f"peak {rate / 1e9:.4g} G/s",
        **columns,
    )


def shares(
    op: str,
    seconds: Sequence[float],
    rate: float,
    positions: int,
    head_dim: int,
    cotangents: int,
    itemsize: int,
) -> list[float]:
    """Share of the peak rate, call by call."""
    if op == "node_effects":
        work = itemsize * BATCH * HEADS * positions * head_dim * (1 + cotangents)
    else:
        pairs = positions * (positions + 1) / 2
        work = PRODUCTS[op](cotangents) * 2 * head_dim * BATCH * HEADS * pairs
    return [work / each / rate for each in seconds]


def memory_of(
    op: str, positions: int, head_dim: int, cotangents: int, dtype: torch.dtype, backend: str
) -> int:
    """Peak bytes of one call beside its inputs and outputs; run in a process of its own."""
    calls_of(random_inputs((BATCH, HEADS, 16, head_dim), 2, dtype, DEVICE))[op](backend=backend)
    call = calls_of(random_inputs((BATCH, HEADS, positions, head_dim), cotangents, dtype, DEVICE))[
        op
    ]
    before = reset_peak(DEVICE)
    out = call(backend=backend)
    tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
    return extra_peak(before, DEVICE) - sum(t.nbytes for t in tensors)


def bench_memory(file: RowFile, op: str, positions: int, dtype: torch.dtype, backend: str) -> None:
    dtype_name = str(dtype).removeprefix("torch.")
    if GPU:  # its allocator knows; resident memory is told in a process of its own alone
        found = memory_of(op, positions, 64, 12, dtype, backend)
    else:
        arguments = ["--memory", op, str(positions), "64", "12", dtype_name, backend]
        found = in_subprocess([__file__, *arguments])
    file.add(
        [found],
        op=op,
        provider=backend,
        mode="one call",
        shape={"B": BATCH, "H": HEADS, "T": positions, "D": 64, "C": 12},
        dtype=dtype_name,
        metric="extra_peak_bytes",
        note="beside inputs and outputs",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="head_dim 64; T = 64, 1024 and C = 12, on a GPU T = 1024, 4096 and C = 1, 12",
    )
    parser.add_argument("--op", choices=OPS, action="append")
    parser.add_argument("--T", type=int, action="append", help="prompt lengths")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-gate", action="store_true", help="do not run the op tests first")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--memory", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        op, *sizes, dtype_name, backend = given.memory
        positions, head_dim, cotangents = (int(size) for size in sizes)
        dtype = getattr(torch, dtype_name)
        print(memory_of(op, positions, head_dim, cotangents, dtype, backend))
        return
    check_environment()
    if not given.no_gate:
        tests = "tests/test_ops_triton.py" if GPU else "tests/test_ops_cpp.py"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", tests], cwd=ROOT, check=True)
    file = RowFile(RESULTS / "kernels.csv")
    lengths = given.T or (
        ([1024, 4096] if GPU else [64, 1024])
        if given.quick
        else ([512, 1024, 2048, 4096, 8192] if GPU else [64, 256, 1024, 4096])
    )
    dtypes = given.dtype or (["bfloat16", "float32"] if GPU else ["float32"])
    for dtype in (getattr(torch, name) for name in dtypes):
        for cell in cells(lengths, given.quick):
            rounds = given.rounds if cell.positions <= 1024 else min(given.rounds, 3)
            for op in given.op or OPS:
                if op in ("attention", "query_patch_effects") and cell.cotangents not in (1, 12):
                    continue  # hardly depends on the cotangents
                bench_cell(file, op, cell, dtype, rounds, not given.no_compile)
        for op in given.op or ("attention", "key_patch_effects", "attention_vjp_effects"):
            for positions, backend in ((1024, "reference"), (1024, "auto"), (4096, "auto")):
                bench_memory(file, op, positions, dtype, backend)


class Cell(NamedTuple):
    """Sizes of a cell of the table."""

    positions: int
    head_dim: int
    cotangents: int
    kv_heads: int = HEADS


def cells(lengths: Sequence[int], quick: bool) -> Iterator[Cell]:
    """Every cell; on a GPU with grouped heads beside the others."""
    counts = (1, 3, 7, 12) if GPU else (1, 12, 30)
    for positions in lengths:
        for head_dim in (64,) if quick else (64, 128):
            for cotangents in (1, 12) if quick and GPU else (12,) if quick else counts:
                if positions > 1024 and not GPU and (head_dim, cotangents) != (64, 12):
                    continue  # minutes a call; the costs grow as the products do
                yield Cell(positions, head_dim, cotangents)
                if GPU and cotangents == 12:
                    yield Cell(positions, head_dim, cotangents, HEADS // 4)


if __name__ == "__main__":
    main()
