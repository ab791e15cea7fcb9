"""AtP, AtP+QK and AtP* by the engine, against the literal reference, in one process (make bench-engine).

One pair of random prompts whose first tokens differ, so that no prefix is shared; the nodes q, k, v, z and neuron. The
scores are compared before anything is timed. Both sides run with their defaults. Rows go to bench/results/engine.csv:
  wall_seconds, cpu_seconds, foreign_cores     of one call, every provider once per round
  times_faster_than literal, times_less_cpu_than literal   per round, against the literal reference in float32
  share_of_bound                               the time that the products alone would take at the best rate, by ours
  extra_peak_bytes                             resident memory above the loaded model, in a process of its own
  operations_per_second                        of matrix products, measured in the same rounds
Where there is a GPU, the model is a Llama of 1.2 billion weights in bfloat16, the literal reference runs in its dtype,
memory is the GPU's, and the engine sweeps both eagerly and by what it recorded ("replayed").
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cases import build, operations, random_pairs
from measure import (
    DEVICE,
    PRODUCT,
    Timing,
    alone,
    check_environment,
    extra_peak,
    in_subprocess,
    interleaved,
    product_paths,
    reset_peak,
    write_ratios,
)
from random_models import GPT2_124M, LLAMA_1B, NEOX_160M
from rows import RESULTS, RowFile
from transformers import PreTrainedModel

from atp_fast.attribution.literal import literal_attribution
from atp_fast.attribution.question import METHODS
from atp_fast.engine import Engine
from atp_fast.models import DEMO_MODEL

TIMED_METHODS = ("atp", "atp+qk", "atp*")
GPU = DEVICE == "cuda"
REPEATS = 3 if GPU else 1
SMALL_BUDGET = "150MiB"
"""Given to AtP* on long prompts beside the default: less memory, more time."""
RECORDED = 3
"""Calls until a sweep is recorded and compared."""
AGREEMENT = 1e-3
"""Largest difference of float32 scores, by the largest score of the kind."""


class Provider(NamedTuple):
    """Who scores the nodes: the literal reference, or the engine with a backend and a precision."""

    name: str
    backend: str
    method: str
    precision: str | None = None
    memory_budget: str | None = None
    replay: bool = False

    def columns(self, dtype: str) -> dict[str, str]:
        """The row columns that tell it from others."""
        name = self.name if self.name == "literal" else f"atp_fast {self.backend}"
        mode = (
            f"{self.method}, memory_budget={self.memory_budget}"
            if self.memory_budget
            else self.method
        )
        mode += ", replayed" if self.replay else ""
        products = f", products {self.precision}" if self.precision else ""
        return {"provider": name, "mode": mode, "dtype": dtype + products}


def setup(model: PreTrainedModel, provider: Provider, positions: int) -> Callable[[], object]:
    """A call that scores every node of one pair and returns contributions by kind; inputs are made here."""
    pairs = random_pairs(model, 1, positions)
    if provider.name == "literal":
        return lambda: literal_attribution(model, pairs, "logit_diff", provider.method)[0]
    engine = Engine(
        model,
        backend=provider.backend,
        precision=provider.precision,
        memory_budget=provider.memory_budget,
        replay=provider.replay,
    )

    def call() -> object:
        found = engine.attribute(pairs, "logit_diff", provider.method, progress=False)
        return found.contribution

    if provider.replay:
        for _ in range(RECORDED):
            call()
    return call


def check_agreement(model: PreTrainedModel, positions: int, backend: str) -> None:
    """Raises RuntimeError where, on the model in float32, the engine and the literal reference differ by more than
    rounding; the model is in float32 afterwards."""
    model.float()
    for method in TIMED_METHODS:
        ours = setup(model, Provider("atp_fast", backend, method), positions)()
        theirs = setup(model, Provider("literal", "", method), positions)()
        for kind, expected in theirs.items():  # type: ignore[attr-defined]
            error = (ours[kind] - expected).abs().max() / expected.abs().max()  # type: ignore[index]
            if not error < AGREEMENT:
                raise RuntimeError(
                    f"{method} of {kind} at T={positions}: relative error {error:.2g}"
                )


def bench(model_name: str, positions: int, options: argparse.Namespace) -> None:
    """All rows of one model and prompt length."""
    model, file = build(model_name, DEVICE), RowFile(options.out)
    shape = {"model": model_name, "T": positions, "B": 1}
    own = model.dtype
    dtype = str(own).removeprefix("torch.")
    if options.gate:
        with alone(options.lock):
            check_agreement(model, min(positions, 64), options.backend)
        model.to(own)
    ours = [
        Provider("atp_fast", options.backend, method, precision)
        for method in options.methods
        for precision in options.precisions
        if precision is None or method == "atp*"  # one cotangent has little to gain
    ]
    if positions >= 512 and "atp*" in options.methods and not GPU:
        ours.append(Provider("atp_fast", options.backend, "atp*", memory_budget=SMALL_BUDGET))
    if GPU:
        ours += [Provider("atp_fast", options.backend, m, replay=True) for m in options.methods]
    literal = [Provider("literal", "", method) for method in options.methods]
    providers = [*([] if positions > options.literal_up_to else literal), *ours]
    paths = product_paths()
    calls: dict[object, Callable[[], object]] = {p: setup(model, p, positions) for p in providers}
    if GPU:
        for provider in list(providers):
            try:
                calls[provider]()
            except torch.OutOfMemoryError as error:
                note = f"out of memory: {str(error).splitlines()[0].split('. Including')[0]}"
                columns = {"op": "attribute", "shape": shape, **provider.columns(dtype)}
                file.add([], metric="wall_seconds", note=note, **columns)
                providers.remove(provider)
                del calls[provider]
    calls |= {name: call for name, (call, _) in paths.items()}
    timings = interleaved(calls, options.rounds, options.warmup, options.lock, REPEATS)

    rates = {name: [paths[name][1] / s for s in timings[name].wall] for name in paths}
    for name, values in rates.items():
        file.add(
            values,
            op="product",
            provider="atp_fast" if "atp_fast" in name else "torch",
            mode=name,
            shape={
                **dict(zip(("rows", "inner", "columns"), PRODUCT, strict=True)),
                "beside": f"{model_name} T{positions}",
            },
            dtype=name.split()[0],
            metric="operations_per_second",
        )
    best = {None: max(max(v) for name, v in rates.items() if name.startswith(dtype))}
    best["bf16"] = max(best[None], max(rates["bfloat16"]))
    for provider in providers:
        columns = {"op": "attribute", "shape": shape, **provider.columns(dtype)}
        timing: Timing = timings[provider]
        timing.write(file, **columns)
        if provider.name == "literal":
            continue
        base = Provider("literal", "", provider.method)
        if base in timings:
            write_ratios(file, timings[base], timing, of="literal", **columns)
        least = operations(model, positions, METHODS[provider.method].graddrop)
        file.add(
            [least / best[provider.precision] / wall for wall in timing.wall],
            metric="share_of_bound",
            note=f"{least:.4g} operations at {best[provider.precision]:.4g} per second",
            **columns,
        )
    if positions > options.literal_up_to:
        for provider in literal:
            file.add(
                [],
                metric="wall_seconds",
                note=f"not run: longer than {options.literal_up_to} tokens",
                **{"op": "attribute", "shape": shape, **provider.columns(dtype)},
            )
    if options.memory:
        for provider in providers:
            if GPU:  # its allocator knows; resident memory is told in a process of its own alone
                before = reset_peak(DEVICE)
                calls[provider]()
                found = extra_peak(before, DEVICE)
            else:
                case = json.dumps([model_name, positions, provider])
                found = in_subprocess([__file__, "--peak-of", case], options.lock)
            columns = {"op": "attribute", "shape": shape, **provider.columns(dtype)}
            file.add([found], metric="extra_peak_bytes", **columns)


def print_peak(case: str) -> None:
    """In a process of its own: the extra peak of one call, as the last line."""
    model_name, positions, provider = json.loads(case)
    model = build(model_name, DEVICE)
    for weight in model.parameters():
        weight.sum()  # those of a file are not in memory before somebody reads them
    before = reset_peak(DEVICE)
    setup(model, Provider(*provider), positions)()
    print(extra_peak(before, DEVICE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=[NEOX_160M, DEMO_MODEL, GPT2_124M, LLAMA_1B], action="append"
    )
    parser.add_argument("--T", type=int, action="append", help="prompt length, may be repeated")
    parser.add_argument("--methods", nargs="+", choices=TIMED_METHODS, default=TIMED_METHODS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--precision", choices=["float32", "bf16"], action="append")
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--literal-up-to",
        type=int,
        default=2048 if GPU else 1024,
        help="longest prompt of the reference",
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument(
        "--no-gate",
        dest="gate",
        action="store_false",
        help="do not compare the scores before timing, which compiles every kernel in float32 too",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one model, T=32, two rounds, no memory"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.csv")
    parser.add_argument("--lock", type=Path, help="file to lock while timing, on a shared machine")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_environment()
    if options.peak_of:
        print_peak(options.peak_of)
        return
    asked = options.precision or (["float32"] if GPU else ["float32", "bf16"])
    options.precisions = [None if p == "float32" else p for p in asked]
    models = options.model or ([LLAMA_1B] if GPU else [NEOX_160M, DEMO_MODEL])
    lengths = options.T or ([32, 128, 512, 2048] if GPU else [32, 128, 512, 1024])
    if options.quick:
        models, lengths = options.model or [NEOX_160M], options.T or [32]
        options.rounds, options.memory = 2, False
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for model in models:
        for length in lengths:
            bench(model, length, options)


if __name__ == "__main__":
    main()
