"""make gpu: steps in order, each within its share of the time, whatever the others do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import gpu
from rows import ROOT

SLEEP = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]


def test_a_step_that_hangs_costs_only_its_share(tmp_path: Path) -> None:
    chosen = [
        gpu.Step("good", ["true"], 30),
        gpu.Step("bad", ["false"], 30),
        gpu.Step("hangs", SLEEP, 6),
        gpu.Step("last", ["echo", "here"], 30),
    ]
    began = time.monotonic()
    found = gpu.run_all(chosen, tmp_path, time.time() + 100)
    assert time.monotonic() - began < 40
    results = [(step["step"], step["result"]) for step in found]
    assert results == [("good", "passed"), ("bad", "failed"), ("hangs", "cut"), ("last", "passed")]
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == found
    assert summary["commit"]


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    found = gpu.run_all([gpu.Step("late", ["true"], 30)], tmp_path, time.time())
    assert [step["result"] for step in found] == ["not begun"]
    assert not (tmp_path / "late.log").exists()


def test_its_commands_exist() -> None:
    """Every file, and every option of the benchmarks."""
    for step in gpu.steps():
        files = [Path(ROOT, part) for part in step.command[1:] if part.endswith(".py")]
        assert files
        assert all(file.exists() for file in files), step
        if "bench" in step.command[1]:
            command = [*step.command[:2], "--help"]
            known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
            assert {part for part in step.command if part.startswith("--")} <= set(
                known.replace("[", " ").replace("]", " ").replace(",", " ").split()
            )


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        return
    done = subprocess.run(
        [sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "make gpu needs a CUDA device, torch sees none" in done.stderr
