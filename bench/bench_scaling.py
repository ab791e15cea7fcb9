"""AtP* against prompt length, pairs, processes and shared prefix (make bench-scaling).

Random prompts and weights; the nodes q, k, v, z and neuron; float32. Rows go to bench/results/scaling.csv:
  length     GPT-NeoX of 4 layers, one pair of up to 8,192 tokens, no shared prefix; the literal reference where it fits
  pairs      GPT-NeoX-160M, 32 tokens, 1 to 32 pairs in one call
  processes  GPT-NeoX-160M, 32 tokens, 16 pairs in shards of 4, by 1 process and by 2 that divide its threads
  many       GPT-NeoX of 4 layers, 32 tokens, 100, 1,000 and 10,000 pairs in one call
  prefix     GPT-NeoX-160M, one pair of 1,024 tokens that differ in their last 1,024, 512, 128 or 32 only, and in
             "times_slower_than parts": the last one's seconds by those of a 32-token pair and one forward over 992 tokens
  streamed   a Llama whose layers (360 MB) lie on disk, plain AtP on pairs of 16 tokens: all in one call, which fetches each
             layer twice, and a call for each pair; "seconds_per_pair", and in "read_bytes" what was fetched. Files leave the
             page cache once they are read, as those of a model larger than memory do
Memory ("extra_peak_bytes") is resident memory above the loaded model, in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from cases import build, count_reads, random_pairs
from measure import (
    Timing,
    alone,
    check_environment,
    extra_peak,
    in_subprocess,
    interleaved,
    reset_peak,
    timed,
)
from random_models import LLAMA_90M, NEOX_160M, NEOX_SMALL
from rows import RESULTS, RowFile

from atp_fast.attribution.literal import literal_attribution
from atp_fast.distributed import attribute_sharded
from atp_fast.engine import Engine
from atp_fast.prompts.pairs import PromptPairs

built = functools.lru_cache(maxsize=1)(build)
LITERAL_UP_TO = 1024
SHARDED_PAIRS, SHARD_SIZE = 16, 4


class Case(NamedTuple):
    """One pair set on one model, scored by the engine or by the literal reference."""

    model: str
    positions: int
    pairs: int = 1
    shared: int = 0
    method: str = "atp*"
    provider: str = "atp_fast"

    def columns(self, op: str) -> dict[str, object]:
        """The row columns that tell it from others."""
        shape = {"model": self.model, "T": self.positions, "B": self.pairs, "shared": self.shared}
        return {
            "op": op,
            "provider": self.provider,
            "mode": self.method,
            "shape": shape,
            "dtype": "float32",
        }


def setup(case: Case) -> Callable[[], object]:
    """A call that scores every node; the prompts are made here."""
    model = built(case.model)
    pairs = random_pairs(model, case.pairs, case.positions, case.shared)
    if case.provider == "literal":
        return lambda: literal_attribution(model, pairs, "logit_diff", case.method)
    engine = Engine(model)
    return lambda: engine.attribute(pairs, "logit_diff", case.method, progress=False)


def measure(op: str, cases: list[Case], options: argparse.Namespace) -> dict[Case, Timing]:
    """Times of all cases, round by round, and the extra peak of each; all rows written."""
    file = RowFile(options.out)
    timings = interleaved({case: setup(case) for case in cases}, options.rounds, lock=options.lock)
    for case in cases:
        timings[case].write(file, **case.columns(op))
        if options.memory:
            arguments = [__file__, "--peak-of", json.dumps(case)]
            peak = in_subprocess(arguments, options.lock)
            file.add([peak], metric="extra_peak_bytes", **case.columns(op))
    return timings


def print_peak(case: Case) -> None:
    """In a process of its own: the extra peak of one call, as the last line."""
    call = setup(case)
    before = reset_peak()
    call()
    print(extra_peak(before))


def bench_length(options: argparse.Namespace) -> None:
    """Every length is timed by itself: the longest takes as long as all others together."""
    for positions in (128, 512) if options.quick else (128, 512, 1024, 2048, 4096, 8192):
        ours = [Case(NEOX_SMALL, positions, method=method) for method in ("atp", "atp*")]
        literal = [case._replace(provider="literal") for case in ours]
        measure("length", ours + (literal if positions <= LITERAL_UP_TO else []), options)


def bench_pairs(options: argparse.Namespace) -> None:
    """All numbers of pairs in the same rounds."""
    numbers = (1, 2) if options.quick else (1, 2, 4, 8, 16, 32)
    measure("pairs", [Case(NEOX_160M, 32, pairs) for pairs in numbers], options)


def bench_many(options: argparse.Namespace) -> None:
    """Memory that does not grow with the pairs; each number is timed by itself, once where there are many."""
    for number in (10, 20) if options.quick else (100, 1_000, 10_000):
        rounds = 1 if number > 100 else options.rounds
        once = argparse.Namespace(**{**vars(options), "rounds": rounds})
        measure("many", [Case(NEOX_SMALL, 32, number)], once)


def bench_prefix(options: argparse.Namespace) -> None:
    """A long prompt whose end differs, against its parts."""
    length, short = (128, 32) if options.quick else (1024, 32)
    whole = Case(NEOX_160M, length, shared=length - short)
    alone_ = Case(NEOX_160M, short)
    others = [Case(NEOX_160M, length, shared=s) for s in (0, length // 2, length - length // 8)]
    model = built(NEOX_160M)
    ids = random_pairs(model, 1, length).clean_ids[:, : length - short]

    def prefix_forward() -> object:
        with torch.no_grad():
            return model.base_model(ids, use_cache=True)

    cases = {case: setup(case) for case in (whole, alone_)}
    timings = interleaved(cases | {"prefix": prefix_forward}, options.rounds, lock=options.lock)
    file = RowFile(options.out)
    for case in cases:
        timings[case].write(file, **case.columns("prefix"))
    forward = {
        "op": "prefix",
        "provider": "transformers",
        "mode": "forward with cache, no logits",
        "shape": {"model": NEOX_160M, "T": ids.shape[1], "B": 1},
        "dtype": "float32",
    }
    timings["prefix"].write(file, **forward)
    parts = zip(timings[alone_].wall, timings["prefix"].wall, strict=True)
    ratios = [w / (a + p) for w, (a, p) in zip(timings[whole].wall, parts, strict=True)]
    file.add(ratios, metric="times_slower_than parts", **whole.columns("prefix"))
    measure("prefix", others, options)


def bench_streamed(options: argparse.Namespace) -> None:
    """One call for all pairs against a call for each, weights on disk."""
    import accelerate

    file = RowFile(options.out)
    with tempfile.TemporaryDirectory() as folder:
        model = build(LLAMA_90M)
        place = {"model.layers": "disk", "model": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(model, place, main_device="cpu", offload_dir=folder)
        read = count_reads(Path(folder))
        engine = Engine(model)
        engine.attribute(random_pairs(model, 1, 16), method="atp", progress=False)
        for number in (1, 2) if options.quick else (1, 4, 16):
            pairs = random_pairs(model, number, 16)

            def once(pairs: PromptPairs = pairs) -> object:
                return engine.attribute(pairs, "logit_diff", "atp", progress=False)

            def one_by_one(pairs: PromptPairs = pairs) -> object:
                return [
                    engine.attribute(pairs[i : i + 1], "logit_diff", "atp", progress=False)
                    for i in range(len(pairs))
                ]

            ways = {"one call": once, "a call for each pair": one_by_one}
            fetched = {}
            for mode, call in ways.items():
                read.clear()
                call()
                fetched[mode] = sum(read)
            timings = interleaved(ways, options.rounds, warmup=0, lock=options.lock)
            for mode, timing in timings.items():
                columns = Case(LLAMA_90M, 16, number, method="atp").columns("streamed")
                columns["mode"] = f"atp, {mode}"
                timing.write(file, **columns)
                for metric, values in (("seconds", timing.wall), ("cpu_seconds", timing.cpu)):
                    file.add([x / number for x in values], metric=f"{metric}_per_pair", **columns)
                file.add([fetched[mode]], metric="read_bytes", **columns)


def bench_processes(options: argparse.Namespace) -> None:
    """The same shards by one process and by two; every round starts new ones."""
    file = RowFile(options.out)
    timings = {processes: Timing() for processes in (1, 2)}
    for _ in range(options.rounds):
        for processes, timing in timings.items():
            with alone(options.lock):
                timing.add(*_sharded_run(processes))
    base = timings[1]
    for processes, timing in timings.items():
        columns = {
            "op": "processes",
            "provider": "atp_fast",
            "mode": "atp*",
            "shape": {
                "model": NEOX_160M,
                "T": 32,
                "B": SHARDED_PAIRS,
                "shard": SHARD_SIZE,
                "processes": processes,
            },
            "dtype": "float32",
        }
        note = f"{torch.get_num_threads() // processes} threads each"
        timing.write(file, note=note, **columns)
        ratios = [b / t for b, t in zip(base.wall, timing.wall, strict=True)]
        file.add(ratios, metric="times_faster_than one process", note=note, **columns)


def _sharded_run(processes: int) -> tuple[float, float, float]:
    """Wall seconds of the slowest process, CPU seconds of all, foreign cores."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        threads = max(1, torch.get_num_threads() // processes)
        done = subprocess.run(
            [
                *launcher,
                f"--nproc-per-node={processes}",
                *(__file__, "--shards-in", folder, "--threads", str(threads)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")][-1]
    wall = max(wall for wall, _, _ in found)
    cpu = sum(cpu for _, cpu, _ in found)
    # each process counts the others as foreign
    foreign = max(0.0, found[0][2] - (cpu - found[0][1]) / found[0][0])
    return wall, cpu, foreign


def print_sharded_run(folder: str) -> None:
    """In each of the launched processes; the first prints [wall, cpu, foreign] of all of them."""
    dist.init_process_group("gloo")
    model = build(NEOX_160M)
    engine = Engine(model)
    pairs = random_pairs(model, SHARDED_PAIRS, 32)
    engine.attribute(pairs[:SHARD_SIZE], progress=False)
    dist.barrier()
    mine = timed(
        lambda: attribute_sharded(engine, pairs, folder, shard_size=SHARD_SIZE, progress=False)
    )
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.destroy_process_group()


PARTS = {
    "length": bench_length,
    "pairs": bench_pairs,
    "many": bench_many,
    "processes": bench_processes,
    "prefix": bench_prefix,
    "streamed": bench_streamed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--quick", action="store_true", help="small cases, two rounds, no memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.csv")
    parser.add_argument("--lock", type=Path, help="file to lock while timing, on a shared machine")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--shards-in", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_environment()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(Case(*json.loads(options.peak_of)))
        return
    if options.shards_in:
        print_sharded_run(options.shards_in)
        return
    if options.quick:
        options.rounds, options.memory = 2, False
    for part in options.part or list(PARTS):
        PARTS[part](options)


if __name__ == "__main__":
    main()
