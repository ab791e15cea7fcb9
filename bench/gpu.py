"""Everything that needs a GPU, in eight minutes, the most important first (make gpu).

The engine's tests and rows, eager and replayed, then the kernels'. Each step's output goes to runs/gpu/STEP.log, what became
of it to runs/gpu/summary.json, with device, date and commit; rows go where the benchmarks put them. A step that takes
longer than its share is cut, so that one that hangs does not cost the others. Exit code 1 where a step failed or was cut.
Needs torch, triton, transformers and pytest-xdist; atp_fast is installed from these sources where it is not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 480


class Step(NamedTuple):
    """A command, and the seconds it may take."""

    name: str
    command: Sequence[str]
    limit: float


def steps() -> list[Step]:
    """In the order of what a cut would lose."""
    workers = str(min(12, os.cpu_count() or 1))
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers]
    ops = [*test, "tests/test_ops_triton.py", "-k"]
    engine = [sys.executable, "bench/bench_engine.py", "--no-gate", "--no-memory", "--rounds", "3"]
    kernels = [sys.executable, "bench/bench_kernels.py", "--no-gate", "--no-compile"]
    return [
        Step("engine-tests", [*test, "tests/test_cuda.py", "-k", "not replay"], 100),
        # a process per method: the rows of one are written before the other begins
        Step("engine-rows", [*engine, "--T", "512", "--methods", "atp*"], 100),
        Step("engine-rows-atp", [*engine, "--T", "512", "--methods", "atp"], 60),
        Step("replay-tests", [*test, "tests/test_cuda.py", "-k", "replay"], 90),
        Step("kernel-rows", [*kernels, "--dtype", "bfloat16", "--quick"], 100),
        Step(
            "new-op-tests",
            [*test, "tests/test_add_effects.py", "tests/test_norm.py", "tests/test_gate.py"],
            60,
        ),
        Step("op-tests-bf16", [*ops, "bf16 and not interpreter"], 100),
        Step("op-tests", [*ops, "not bf16 and not interpreter"], 120),
        Step("all-kernel-rows", [*kernels, "--dtype", "bfloat16"], 240),
    ]


def run(step: Step, log: Path, left: float) -> dict[str, object]:
    """What became of a step: "passed", "failed", "cut" or "not begun", and its seconds."""
    if left < 5:
        return {"step": step.name, "result": "not begun", "seconds": 0.0}
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            result = "failed" if process.wait(min(step.limit, left)) else "passed"
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = "cut"
    return {
        "step": step.name,
        "result": result,
        "seconds": round(time.monotonic() - began, 1),
    }


def run_all(chosen: Sequence[Step], folder: Path, end: float) -> list[dict[str, object]]:
    """All steps one after the other until time.time() is `end`; the summary is written after each."""
    from rows import provenance  # imports atp_fast

    folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, object]] = []
    for step in chosen:
        found.append(run(step, folder / f"{step.name}.log", end - time.time()))
        print(*found[-1].values(), flush=True)
        summary = {**provenance(), "steps": found}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return found


def install() -> None:
    """From these sources, with what is there."""
    if any(importlib.util.find_spec(name) is None for name in ("atp_fast", "atp_fast._C")):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "-e", "."], cwd=ROOT, check=True)


def main() -> None:
    install()
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--began", type=float, default=time.time(), help="when the time began")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device, torch sees none")
    found = run_all(steps(), ROOT / "runs" / "gpu", given.began + given.seconds)
    sys.exit(any(step["result"] != "passed" for step in found))


if __name__ == "__main__":
    main()
