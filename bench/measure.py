"""How the benchmarks measure: interleaved rounds, CPU seconds beside wall seconds, foreign load, peak memory, product rates."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # workers of other libraries time themselves without writing rows
    from rows import RowFile


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels and the engine are timed; what is compared with other libraries runs on the CPU."""


@dataclass
class Timing:
    """One entry per timed call: wall seconds, CPU seconds of this process, cores that other processes kept busy."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float, foreign: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.foreign.append(foreign)

    def write(self, file: RowFile, *, note: str = "", **columns: Any) -> None:
        """Rows "wall_seconds", "cpu_seconds" and "foreign_cores"."""
        for metric, values in (
            ("wall_seconds", self.wall),
            ("cpu_seconds", self.cpu),
            ("foreign_cores", self.foreign),
        ):
            file.add(values, metric=metric, note=note, **columns)


def check_environment() -> None:
    """Ends the program unless OpenMP's threads sleep while they wait: spinning ones spoil a busy machine's numbers."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        sys.exit("set OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0, or run through make, which does")


def _busy_seconds() -> float:
    """Seconds all cores together have spent working since boot."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return sum(ticks[i] for i in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")


def timed(fn: Callable[[], object], repeats: int = 1) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and foreign cores of one call, the mean of `repeats` on end."""
    gc.collect()
    synchronize()
    busy, wall, cpu = _busy_seconds(), time.perf_counter(), time.process_time()
    for _ in range(repeats):
        fn()
    synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / repeats, cpu / repeats, max(0.0, _busy_seconds() - busy - cpu) / wall


def device_seconds(fn: Callable[[], object]) -> list[float]:
    """Seconds that the GPU works on one call, from cold caches: what Python needs to start it is hidden behind their clearing."""
    from triton.testing import do_bench

    return [ms / 1e3 for ms in do_bench(fn, warmup=5, rep=50, return_mode="all")]


def host_seconds(fn: Callable[[], object], rounds: int, repeats: int = 10) -> list[float]:
    """Seconds that Python needs to start one call, the mean of `repeats`, round by round; nothing waits for the GPU."""
    found = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            fn()
        found.append((time.perf_counter() - began) / repeats)
    synchronize()
    return found


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold an advisory lock file, which others that time things on this machine respect."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def interleaved(
    providers: Mapping[Any, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    lock: Path | None = None,
    repeats: int = 1,
) -> dict[Any, Timing]:
    """Time every provider once per round, so that a slow spell of the machine falls on all of them.

    repeats: calls on end, of which the mean is taken, where one is too short for the clock or waits for its launch.
    """
    # workers of other libraries, which import this module, have no atp_fast
    from atp_fast.ops.trial import in_turns

    found = in_turns(
        providers, rounds, lambda fn: timed(fn, repeats), warmup=warmup, around=lambda: alone(lock)
    )
    return {name: Timing(*map(list, zip(*rows, strict=True))) for name, rows in found.items()}


def write_ratios(file: RowFile, base: Timing, timing: Timing, *, of: str, **columns: Any) -> None:
    """How much faster `timing` is than `base`, round by round: rows "times_faster_than <of>" (wall seconds) and
    "times_less_cpu_than <of>" (CPU seconds, which another process's load disturbs less)."""
    for metric, theirs, mine in (
        ("times_faster_than", base.wall, timing.wall),
        ("times_less_cpu_than", base.cpu, timing.cpu),
    ):
        ratios = [b / t for b, t in zip(theirs, mine, strict=True)]
        file.add(ratios, metric=f"{metric} {of}", **columns)


# ---- memory


def reset_peak(device: str = "cpu") -> int:
    """Give freed memory back, set the peak to the present, and return that: resident bytes, or the GPU's allocated ones."""
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmHWM")


def release() -> None:
    """Give memory that is free back to the system, so that others that wait in turn have it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def extra_peak(before: int, device: str = "cpu") -> int:
    """Bytes by which the peak has exceeded `before` (what `reset_peak` returned)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def in_subprocess(arguments: Sequence[str], lock: Path | None = None) -> Any:
    """Run a benchmark's script again with these arguments; what its last line of output says, read as JSON."""
    with alone(lock):
        done = subprocess.run(
            [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])


# ---- the rate of matrix products


PRODUCT = (8192, 8192, 8192) if DEVICE == "cuda" else (3072, 768, 3072)
"""Rows, inner size and columns of the product that sets the best rate."""


def product_paths(
    rows: int = PRODUCT[0], inner: int = PRODUCT[1], columns: int = PRODUCT[2]
) -> dict[str, tuple[Callable[[], object], int]]:
    """Ways to multiply (rows, inner) by (inner, columns) on DEVICE: name -> (a call, operations).

    "float32 default", "float32 atp_fast cpp" where the engine takes it, and "bfloat16".
    """
    # workers of other libraries, which import this module, have no atp_fast
    from atp_fast.ops.linear import linear, own_products_are_faster

    a, b = (torch.randn(shape, device=DEVICE) for shape in ((rows, inner), (columns, inner)))
    narrow_a, narrow_b = a.bfloat16(), b.bfloat16()
    operations = 2 * rows * inner * columns
    paths: dict[str, tuple[Callable[[], object], int]] = {
        "float32 default": (lambda: a @ b.T, operations),
        "bfloat16": (lambda: narrow_a @ narrow_b.T, operations),
    }
    if DEVICE == "cpu" and own_products_are_faster():
        paths["float32 atp_fast cpp"] = (lambda: linear(a, b.T), operations)
    return paths
