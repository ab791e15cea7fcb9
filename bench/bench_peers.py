"""Plain attribution patching and exact patching by TransformerLens, nnsight, bare hooks and atp_fast (make bench-peers).

The same model with random weights, the same prompts (they differ from their first token on, so that no prefix is
shared), the nodes q, k, v, z; AtP* of these and of every neuron by atp_fast as well. Each library runs in a virtual
environment of its own under .cache/peers (made on first use) and in a process of its own; processes take turns, one
run each per round. Scores are compared before anything is timed. Rows go to bench/results/peers.csv:
  wall_seconds, cpu_seconds, foreign_cores        of one run
  extra_peak_bytes                                resident memory of the first run above the loaded and wrapped model
  times_faster_than X, times_less_cpu_than X      atp_fast against another's way, round by round
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Timing, alone, check_environment, write_ratios
from random_models import CONFIGS, GPT2_124M, NEOX_160M
from rows import RESULTS, ROOT, RowFile

ENVIRONMENTS = ROOT / ".cache" / "peers"
VERSIONS = {"transformer-lens": "4.3.0", "nnsight": "0.8.1"}
TORCH, TRANSFORMERS = "torch==2.13.0", "transformers==5.23.0"
WORKER = Path(__file__).resolve().parent / "peers" / "worker.py"
AGREEMENT = 1e-4
"""Largest difference of scores, by the largest score of the kind."""


class Way(NamedTuple):
    """One library's way of doing one task."""

    library: str
    name: str


WAYS = {
    "attribute": [
        Way("hooks", "atp"),
        Way("transformer-lens", "atp, demo"),
        Way("transformer-lens", "atp, demo with q k v z cached alone"),
        Way("transformer-lens", "atp, tool (z, mlp_out and embeddings alone)"),
        Way("nnsight", "atp"),
        Way("atp_fast", "atp"),
        Way("atp_fast", "atp*, neurons too"),
        Way("atp_fast", "atp*, neurons too, products bf16"),
        Way("atp_fast in transformer-lens", "atp, tool's names"),
    ],
    "patch_heads": [
        Way("hooks", "patch heads"),
        Way("transformer-lens", "patch heads"),
        Way("nnsight", "patch heads"),
        Way("nnsight", "patch heads, invokes"),
        Way("atp_fast", "patch heads"),
        Way("atp_fast in transformer-lens", "patch heads, library's names"),
    ],
}


def interpreter(library: str) -> Path:
    """The Python that has a library installed; its environment is made where there is none."""
    library = library.removeprefix("atp_fast in ")
    if library not in VERSIONS:
        return Path(sys.executable)
    folder = ENVIRONMENTS / library
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = f"{library}=={VERSIONS[library]} {TORCH} {TRANSFORMERS}"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {wanted} in {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q"]
        # torch first and by itself, so that options such as a CPU index are its own
        options = os.environ.get("TORCH_PIP_OPTIONS", "").split()
        subprocess.run([*pip, *options, TORCH], check=True)
        subprocess.run([*pip, f"{library}=={VERSIONS[library]}", TRANSFORMERS], check=True)
        subprocess.run([*pip, "setuptools", "pybind11"], check=True)
        subprocess.run([*pip, "--no-build-isolation", "-e", ROOT], check=True)
        stamp.write_text(wanted)
    return python


class Worker:
    """A process that runs one way whenever it is told to."""

    def __init__(self, way: Way, model: str, positions: int, pairs: int) -> None:
        self.way = way
        command = [interpreter(way.library), WORKER, *way, model, str(positions), str(pairs)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.timing = Timing()

    def ready(self) -> None:
        """Waits until the model is built; `version` is known from then on."""
        self.version: str = self._answer()["version"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.way} ended with status {self._process.wait()}, see above")
        return json.loads(line)

    def ask(self, command: str) -> Any:
        """Its answer to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def check_agreement(scores: dict[Way, dict[str, torch.Tensor]]) -> None:
    """Raises RuntimeError where a way's scores are not those of bare hooks."""
    way, expected = next((w, s) for w, s in scores.items() if w.library == "hooks")
    for other, found in scores.items():
        bound = 3e-2 if "bf16" in other.name else AGREEMENT
        for kind, values in found.items():
            error = (values - expected[kind]).abs().max() / expected[kind].abs().max()
            if not error < bound:
                raise RuntimeError(f"{other} differs from {way} in {kind} by {error:.2g}")


def bench(op: str, ways: list[Way], model: str, positions: int, pairs: int, options: Any) -> None:
    """All rows of one task on one model and shape."""
    workers: list[Worker] = []
    file = RowFile(options.out)
    try:
        peaks, scores = {}, {}
        workers += [Worker(way, model, positions, pairs) for way in ways]
        for worker in workers:
            worker.ready()
        with tempfile.TemporaryDirectory() as folder, alone(options.lock):
            for way, worker in zip(ways, workers, strict=True):
                path = Path(folder) / "scores.pt"
                peaks[way] = worker.ask(f"first {path}")["extra_peak_bytes"]
                scores[way] = torch.load(path, weights_only=True)
        check_agreement(scores)
        for _ in range(options.rounds):
            with alone(options.lock):
                for worker in workers:
                    worker.timing.add(**worker.ask("run"))
    finally:
        for worker in workers:
            worker.close()
    shape = {"model": model, "T": positions, "B": pairs}
    for worker in workers:
        narrow = "bf16" in worker.way.name
        columns = {
            "op": op,
            "provider": worker.version,
            "mode": worker.way.name,
            "shape": shape,
            "dtype": "float32, products bf16" if narrow else "float32",
        }
        worker.timing.write(file, **columns)
        file.add([peaks[worker.way]], metric="extra_peak_bytes", **columns)
        if not worker.way.library.startswith("atp_fast"):
            continue
        for other in workers:
            if not other.way.library.startswith("atp_fast"):
                name = f"{other.way.library}: {other.way.name}"
                write_ratios(file, other.timing, worker.timing, of=name, **columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=list(WAYS), action="append")
    parser.add_argument("--model", choices=list(CONFIGS), action="append")
    parser.add_argument("--T", type=int, action="append", help="prompt length, may be repeated")
    parser.add_argument("--B", type=int, action="append", help="pairs, may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--skip", action="append", default=[], help='a way, as "nnsight: patch heads"'
    )
    parser.add_argument("--install", action="store_true", help="make the environments, and no more")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.csv")
    parser.add_argument("--lock", type=Path, help="file to lock while timing, on a shared machine")
    options = parser.parse_args()
    check_environment()
    for library in VERSIONS:
        interpreter(library)
    if options.install:
        return
    for op in options.op or list(WAYS):
        ways = [way for way in WAYS[op] if ": ".join(way) not in options.skip]
        attribution = op == "attribute"
        for model in options.model or [GPT2_124M, NEOX_160M]:
            for positions in options.T or ([32, 256] if attribution else [32]):
                for pairs in options.B or ([1, 8] if attribution else [1]):
                    # the tool's metric is not told which pair it sees
                    chosen = [way for way in ways if pairs == 1 or way.name != "atp, tool's names"]
                    bench(op, chosen, model, positions, pairs, options)


if __name__ == "__main__":
    main()
