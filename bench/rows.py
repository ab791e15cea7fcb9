"""The rows every benchmark writes: one schema, with where and when each number was measured."""

from __future__ import annotations

import csv
import datetime
import functools
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers
import triton

from atp_fast._version import __version__
from atp_fast.files import write_csv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One number of one benchmark.

    op: what was done; provider: who did it; mode: in which way; shape: "model=..., T=..., B=..."; dtype: of the model, and
    of the products where they differ; metric: what `median`, `p20` and `p80` over `rounds` measure, with its unit in its
    name; note: anything a reader must know, such as why a number is missing.
    """

    op: str
    provider: str
    mode: str
    shape: str
    dtype: str
    metric: str
    median: float | None
    p20: float | None
    p80: float | None
    rounds: int
    device: str
    threads: int
    commit: str
    dirty: bool
    torch: str
    triton: str
    transformers: str
    date: str
    note: str = ""

    def key(self) -> tuple[str, ...]:
        """What a later measurement of the same thing shares with this one."""
        return (self.op, self.provider, self.mode, self.shape, self.dtype, self.metric, self.device)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, interpolated."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), cuts[0], cuts[3]


def device_name() -> str:
    """The machine: the GPU's name, or the CPU's with its vector instructions and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    # virtual machines give processors of several generations one name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}) x{os.cpu_count()}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@functools.cache
def _code() -> tuple[str, bool]:
    """The commit, and whether code that a benchmark runs differs from it; as it was when first asked.

    Where the sources came without their history: ATP_FAST_COMMIT, or the version.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("ATP_FAST_COMMIT", f"version {__version__}"), False
    changed = _git("status", "--porcelain", "--", "atp_fast", "csrc", "kernels", "bench/*.py")
    return _git("rev-parse", "--short=12", "HEAD"), bool(changed)


def provenance() -> dict[str, str | int | bool]:
    """The columns that say where, when and with what a number was measured."""
    commit, dirty = _code()
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class RowFile:
    """A CSV file of rows; a number that is measured again takes the place of the older one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, str]]:
        """All rows as text, in the file's order; none where there is no file yet."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def add(
        self,
        values: Sequence[float],
        *,
        op: str,
        provider: str,
        mode: str,
        shape: Mapping[str, object],
        dtype: str,
        metric: str,
        note: str = "",
    ) -> None:
        """Write median, p20 and p80 of `values`; no values leave the numbers empty, and `note` says why."""
        median, p20, p80 = quantiles(values) if values else (None, None, None)
        row = Row(
            op=op,
            provider=provider,
            mode=mode,
            shape=", ".join(f"{name}={value}" for name, value in shape.items()),
            dtype=dtype,
            metric=metric,
            median=median,
            p20=p20,
            p80=p80,
            rounds=len(values),
            note=note,
            **provenance(),  # type: ignore[arg-type]
        )
        names = [field.name for field in fields(Row)]
        new = {k: _text(v) for k, v in asdict(row).items()}
        kept = [old for old in self.read() if _key(old) != row.key()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, names, ([line[name] for name in names] for line in (*kept, new)))
        shown = "-" if median is None else f"{median:.4g} [{p20:.4g}, {p80:.4g}]"
        print(
            f"{row.op} | {row.provider} | {row.mode} | {row.shape} | {row.dtype} | {metric}: {shown}"
            + (f" ({note})" if note else ""),
            flush=True,
        )


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        row[name] for name in ("op", "provider", "mode", "shape", "dtype", "metric", "device")
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shape_of(row: Mapping[str, str]) -> dict[str, str]:
    """The shape column taken apart."""
    return dict(part.split("=", 1) for part in row["shape"].split(", ") if part)
