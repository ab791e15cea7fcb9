"""Everything that needs a GPU, in one command of eight minutes at most (make gpu): what matters most comes first.

    python bench/gpu.py [--limit 480] [--began UNIX_SECONDS]

Needs torch, triton and transformers; installs atp_fast from these sources where it cannot be imported. The CUDA tests' count goes
to bench/results/gpu.csv, the engine's and the kernels' rows to their own files, each as soon as it is measured: a run that is cut
short keeps what it has. Exit code 1 where a test failed or a step did not finish.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
LIMIT = 480


class Step(NamedTuple):
    """A command, and what is done when it has ended."""

    name: str
    command: Sequence[str]
    then: Callable[[], None] = lambda: None


def steps(folder: Path) -> list[Step]:
    """folder: for what one step leaves to be read."""
    python, workers = sys.executable, str(min(12, os.cpu_count() or 1))
    tests = ["tests/test_cuda.py", "tests/test_ops_triton.py", f"--junitxml={folder / 'tests.xml'}"]
    engine = [python, "bench/bench_engine.py", "--rounds", "3", "--model", "llama-1.2b", "--T", "512"]  # fmt: skip
    kernels = [python, "bench/bench_kernels.py", "--no-gate", "--no-compile", "--rounds", "3"]
    return [
        Step(
            "tests",
            [python, "-m", "pytest", "-q", "-n", workers, *tests],
            lambda: note_tests(folder / "tests.xml"),
        ),
        Step("engine", engine),
        Step("kernels", [*kernels, "--quick", "--dtype", "bfloat16"]),
        Step("all lengths", [*kernels, "--dtype", "bfloat16"]),
    ]


def installed() -> bool:
    return importlib.util.find_spec("atp_fast") is not None and (
        importlib.util.find_spec("atp_fast._C") is not None
    )


def run(step: Step, seconds: float) -> bool:
    """Run a step; whether it ended well within so many seconds."""
    print(f"== {step.name}: {seconds:.0f} s are left", flush=True)
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env={**os.environ, **QUIET}, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"== {step.name}: cut", flush=True)
        return False
    step.then()
    return done.returncode == 0


def note_tests(path: Path) -> None:
    """A row per outcome that pytest has counted."""
    from rows import RESULTS, RowFile

    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    count["passed"] = count.pop("tests") - sum(count.values())
    for what, number in count.items():
        RowFile(RESULTS / "gpu.csv").add(
            [float(number)],
            op="tests",
            provider="pytest",
            mode="cuda",
            shape={},
            dtype="all",
            metric=what,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds, installation included")
    parser.add_argument("--began", type=float, default=time.time(), help="when they began to count")
    given = parser.parse_args()
    ends = given.began + given.limit
    if not installed():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "-e", "."], cwd=ROOT, check=True)
    import torch

    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device, torch sees none")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        planned = steps(Path(folder))
        ended = [run(step, ends - time.time()) for step in planned if ends > time.time()]
    sys.exit(0 if len(ended) == len(planned) and all(ended) else 1)


if __name__ == "__main__":
    main()
