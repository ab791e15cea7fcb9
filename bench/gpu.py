"""Everything that needs a GPU, in eight minutes, the most important first (make gpu).

The engine's and the kernels' tests, then the engine's and the kernels' rows. Each step's output goes to runs/gpu/STEP.log, what
became of it to runs/gpu/summary.json, with device, date and commit; rows go where the benchmarks put them. A step that takes
longer than its share is cut, so that one that hangs does not cost the others. Exit code 1 where a step failed or was cut.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rows import ROOT, provenance

SECONDS = 480


class Step(NamedTuple):
    """A command, and the seconds it may take."""

    name: str
    command: Sequence[str]
    limit: float


def steps() -> list[Step]:
    """In the order of what a cut would lose."""
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    bench = [sys.executable, "bench/bench_engine.py", "--no-memory", "--rounds", "3"]
    kernels = [sys.executable, "bench/bench_kernels.py", "--no-gate", "--no-compile"]
    return [
        Step("engine-tests", [*test, "tests/test_cuda.py"], 120),
        Step("new-op-tests", [*test, "tests/test_add_effects.py", "tests/test_norm.py"], 60),
        Step("op-tests-bf16", [*test, "tests/test_ops_triton.py", "-k", "bf16"], 90),
        Step("engine-rows", [*bench, "--T", "512", "--methods", "atp", "atp*"], 120),
        Step("kernel-rows", [*kernels, "--dtype", "bfloat16", "--T", "1024"], 90),
        Step("op-tests", [*test, "tests/test_ops_triton.py", "-k", "not bf16"], 120),
        Step("kernel-rows-long", [*kernels, "--dtype", "bfloat16", "--T", "4096"], 120),
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
    folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, object]] = []
    for step in chosen:
        found.append(run(step, folder / f"{step.name}.log", end - time.time()))
        print(*found[-1].values(), flush=True)
        summary = {**provenance(), "steps": found}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return found


def main() -> None:
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
