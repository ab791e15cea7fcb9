"""Times candidate block sizes of the Triton kernels on this GPU, the best first: what the CONFIGS tables are chosen from.

Grouped-query attention, causal: 1 x 32 heads over 8, 2,048 tokens, 12 cotangents. Every candidate is compiled first, by
several processes; one that does not compile, or does not fit, is left out. "*" marks the shipped configurations. The
fastest of each kernel are added to bench/results/tuning.csv: median milliseconds of a start, and where they were measured.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from rows import RESULTS, provenance

from atp_fast.kernels.attention import launch_attention
from atp_fast.kernels.launch import Blocks, Scoring
from atp_fast.kernels.row_dots import launch_row_dots

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from compiled import DTYPES, KERNELS, Tensors

TUNED = ("attention", "query_gradients", "key_gradients", "key_effects")
HEADS, KV_HEADS, KEYS, COTANGENTS = 32, 8, 2048, 12


def tensors(dtype: str, dim: int, keys: int = KEYS, cotangents: int = COTANGENTS) -> Tensors:
    """The arguments of a sweep's calls on the GPU."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, keys, dim, device="cuda", dtype=DTYPES[dtype])

    q, k, v = random(1, HEADS), random(1, KV_HEADS), random(1, KV_HEADS)
    grad_z = random(cotangents, 1, HEADS)
    scoring = Scoring(dim**-0.5, True, None, None, None, None)
    stats = launch_attention(q, k, v, scoring)
    (mean,) = launch_row_dots(grad_z, stats.z)
    return Tensors(q, k, v, grad_z, stats, mean, scoring)


def candidates(kernel: str, dtype: str, dim: int) -> Iterator[Blocks]:
    """The shipped configurations, and every combination that could be worth its compilation."""
    yield from KERNELS[kernel][1][(DTYPES[dtype], dim)]
    narrow = dtype != "f32"
    chunks = {"attention": (1,), "key_effects": (4, 6, 12) if narrow else (2, 4)}.get(
        kernel, (1, 2) if narrow else (1,)
    )
    for sizes in itertools.product(
        (32, 64, 128) if narrow else (32, 64),
        (64, 128) if narrow else (32, 64, 128),
        chunks,
        (4, 8),
        (2, 3) if narrow else (1, 2),
        (256,) if narrow else (256, 16),
    ):
        yield Blocks(*sizes)


def compiles(job: tuple[str, str, int, Blocks]) -> bool:
    """Whether a candidate compiles and fits, found out by starting it on few keys."""
    kernel, dtype, dim, blocks = job
    try:
        KERNELS[kernel][0](tensors(dtype, dim, keys=256, cotangents=2), blocks)
        torch.cuda.synchronize()
    except Exception:  # a compiler's failures have many types
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=TUNED, action="append")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append")
    parser.add_argument("--dim", type=int, action="append")
    parser.add_argument("--show", type=int, default=8, help="how many of each to print and keep")
    parser.add_argument("--out", type=Path, default=RESULTS / "tuning.csv")
    given = parser.parse_args()
    cases = list(
        itertools.product(
            given.kernel or TUNED, given.dtype or ("bf16", "f32"), given.dim or (64, 128)
        )
    )
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for case in cases:
            choices = list(dict.fromkeys(candidates(*case)))
            compiled = pool.map(compiles, [(*case, blocks) for blocks in choices], chunksize=1)
            start, configs = KERNELS[case[0]]
            x, shipped = tensors(*case[1:]), configs[(DTYPES[case[1]], case[2])]
            found = []
            for blocks in itertools.compress(choices, compiled):
                call = functools.partial(start, x, blocks)
                milliseconds = triton.testing.do_bench(call, warmup=5, rep=15, return_mode="median")
                found.append((milliseconds, blocks))
            found.sort(key=lambda entry: entry[0])
            print(f"{case}: {len(found)} ran, {len(choices) - len(found)} did not", flush=True)
            for place, (milliseconds, blocks) in enumerate(found):
                if place < given.show or blocks in shipped:
                    mark = "*" if blocks in shipped else " "
                    print(f"  {mark} {milliseconds:8.4f} ms  {tuple(blocks[:6])}", flush=True)
                    keep(given.out, [*case, *blocks[:6], f"{milliseconds:.4f}"])


def keep(path: Path, numbers: list[object]) -> None:
    """Add a row to the table of measured block sizes."""
    where = provenance()
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(
            [*numbers, *(where[name] for name in ("device", "torch", "triton", "date"))]
        )


if __name__ == "__main__":
    main()
