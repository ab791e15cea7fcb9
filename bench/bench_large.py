"""A model larger than a card: its plan, and the same in the small, run for real (make bench-large).

AtP* on random prompts and weights in bfloat16, all node kinds. What lies where is accelerate's own choice for one card, host
memory and disk; the ends lie on the card. Rows go to bench/results/large.csv:
  plan  Llama-3-70B's shape: bytes on the card, in host memory and on disk; peak memory, weights fetched and seconds as
        Engine.estimate says them here, on the CPU, from two real layers of that shape, of which one is fetched from disk, and a
        small vocabulary; and seconds by the product rates of GPUs in engine.csv, as far as they were measured
  run   a Llama of a hundredth of the numbers, as many layers and pairs, prompts of a tenth of the tokens (layer inputs are then a
        hundredth too), a hundredth of all memory: its plan, then the call. What is beyond the card lies on disk; it leaves the page
        cache once it is read
"planned_peak_bytes" and "extra_peak_bytes" are of the call, its result included, beyond the weights that stay in memory;
"kept_by_libraries_bytes" is by how much a call on the first batch has made the process larger, before.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
from cases import count_reads, operations, random_pairs
from measure import check_environment, extra_peak, in_subprocess, reset_peak, timed
from rows import RESULTS, RowFile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atp_fast.attribution.memory import Budget, costs
from atp_fast.attribution.question import check_method
from atp_fast.attribution.streaming import StreamPlan, plan_stream
from atp_fast.attribution.sweep import sweep_size
from atp_fast.engine import Engine
from atp_fast.metrics import resolve
from atp_fast.nodes import KINDS
from atp_fast.prompts.pairs import PromptPairs

METHOD, METRIC = "atp*", "logit_diff"


class Shape(NamedTuple):
    """A Llama, a question about it, and the memory there is: bytes of weights on the card, and of a call beside them and
    the result; of weights in host memory."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    pairs: int
    positions: int
    card: int
    budget: int
    host: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            dtype="bfloat16",
        )

    def columns(self, op: str, provider: str) -> dict[str, Any]:
        """The row columns of its numbers."""
        shape = {"model": self.name, "T": self.positions, "B": self.pairs, "budget": self.budget}
        return {
            "op": op,
            "provider": provider,
            "mode": METHOD,
            "shape": shape,
            "dtype": "bfloat16",
        }


# 80 GB: weights, a call's budget, its result (3 GB) and 5 GB to spare
LLAMA_70B = Shape(
    "llama-70b", 80, 8192, 64, 8, 28672, 128256, 9, 80, 56 * 10**9, 16 * 10**9, 64 * 10**9
)
HUNDREDTH = Shape(
    "llama-0.7b-80l", 80, 832, 8, 1, 2912, 12826, 9, 8, 56 * 10**7, 16 * 10**7, 64 * 10**7
)
TINY = Shape("llama-tiny-12l", 12, 512, 8, 1, 1792, 1283, 8, 16, 26 * 10**6, 46 * 10**6, 2 * 10**7)
SHAPES = {shape.name: shape for shape in (LLAMA_70B, HUNDREDTH, TINY)}


def on_meta(shape: Shape) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(shape.config()).to(torch.bfloat16).eval()


def placed(shape: Shape) -> dict[str, int | str]:
    """Where each part lies: 0 for the card, "cpu" or "disk"; the head on the card, which every sweep needs twice."""
    model = on_meta(shape)
    ends = model.lm_head.weight.nbytes
    room = {0: shape.card - ends, "cpu": shape.host, "disk": 10**15}
    found: dict[str, int | str] = accelerate.infer_auto_device_map(
        model, max_memory=room, no_split_module_classes=["LlamaDecoderLayer"]
    )
    return found | dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), 0)


def bytes_by_place(shape: Shape, places: dict[str, int | str]) -> dict[str, int]:
    """Of the weights on the card, in host memory and on disk."""
    model, found = on_meta(shape), {"card": 0, "host": 0, "disk": 0}
    names: dict[int | str, str] = {0: "card", "cpu": "host", "disk": "disk"}
    for name, place in places.items():
        found[names[place]] += sum(p.nbytes for p in model.get_submodule(name).parameters())
    return found


def offloaded(shape: Shape, places: dict[str, int | str], folder: Path) -> PreTrainedModel:
    """The model with random weights, the card's share in memory and all else in files of the folder, not in the page cache."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model: PreTrainedModel = LlamaForCausalLM(shape.config())
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.init_weights()
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = type(module)(model.config).inv_freq
    where = {name: "cpu" if place == 0 else "disk" for name, place in places.items()}
    accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=folder)
    for path in folder.glob("*.dat"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return model


def deepened(engine: Engine, places: list[bool]) -> None:
    """Have an engine on two layers, in memory and fetched, plan for as many as `places`: for each whether it is fetched."""
    plug = engine.plug
    plug.model.config.num_hidden_layers = len(places)
    plug.layers = [plug.layers[fetched] for fetched in places]
    plug.by_row = {key: [rows[0]] * len(places) for key, rows in plug.by_row.items()}
    plug.inspection.layers = len(places)
    plug.inspection.windows = plug.inspection.windows[:1] * len(places)
    vars(plug).pop("alike", None)


def planned(engine: Engine, shape: Shape, pairs: PromptPairs) -> dict[str, float]:
    """Metrics of the plan of a call, on this machine."""
    plug = engine.plug
    size = sweep_size(plug, pairs, resolve(METRIC, pairs), check_method(METHOD), KINDS, None)
    plan: StreamPlan = plan_stream(
        plug, Budget(shape.budget, auto=False), size, pairs=len(pairs), together=False
    )
    estimate = engine.estimate(pairs, METRIC, METHOD, KINDS)
    groups = -(-len(pairs) // plan.pairs)
    fetched = sum(map(sum, plug.fetched_bytes().values()))
    cost, rows = costs(plug, KINDS), len(pairs) * shape.positions
    work = estimate.devices["cpu"]
    return {
        "pairs_in_lockstep": plan.pairs,
        "pairs_at_once": plan.sweep.pairs,
        "cotangents_at_once": plan.sweep.chunk,
        "planned_held_bytes": plan.held.bytes if plan.held else 0,
        "planned_peak_bytes": work.work + work.result,
        "planned_read_bytes": 2 * groups * fetched,
        "layer_input_bytes": rows * cost.stored,
        "cotangent_bytes": rows * size.cotangents * cost.carried // 2,
        "planned_seconds": estimate.seconds,
        "planned_layer_seconds": estimate.seconds / shape.layers,
    }


def print_plan(shape: Shape) -> None:
    """In a process of its own: the plan from two layers, as the last line."""
    places = placed(shape)
    fetched = [places[f"model.layers.{i}"] != 0 for i in range(shape.layers)]
    two = shape._replace(layers=2, vocabulary=1024)
    where: dict[str, int | str] = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), 0
    )
    with tempfile.TemporaryDirectory() as folder:
        model = offloaded(two, where | {"model.layers.1": "disk"}, Path(folder))
        count_reads(Path(folder))
        engine = Engine(model, memory_budget=shape.budget)
        pairs = random_pairs(model, shape.pairs, shape.positions)
        deepened(engine, fetched)
        print(json.dumps(planned(engine, shape, pairs)))


def print_run(shape: Shape) -> None:
    """In a process of its own: the plan of the whole model and what the call took, as the last line."""
    with tempfile.TemporaryDirectory() as folder:
        model = offloaded(shape, placed(shape), Path(folder))
        read = count_reads(Path(folder))
        engine = Engine(model, memory_budget=shape.budget)
        pairs = random_pairs(model, shape.pairs, shape.positions)
        found = planned(engine, shape, pairs)
        # libraries keep something for every number of rows that they have multiplied: it is counted apart
        before = reset_peak()
        few = int(found["pairs_at_once"])
        for count in {few, len(pairs) % few} - {0}:
            engine.attribute(pairs[:count], METRIC, METHOD, KINDS, progress=False)
        found["kept_by_libraries_bytes"] = reset_peak() - before
        read.clear()
        before, written = reset_peak(), _written()
        wall, cpu, foreign = timed(
            lambda: engine.attribute(pairs, METRIC, METHOD, KINDS, progress=False)
        )
        found |= {
            "extra_peak_bytes": extra_peak(before),
            "read_bytes": sum(read),
            "written_bytes": _written() - written,
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "foreign_cores": foreign,
        }
        print(json.dumps(found))


def _written() -> int:
    """Bytes that this process has written to files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def write(file: RowFile, found: dict[str, float], columns: dict[str, Any]) -> None:
    for metric, value in found.items():
        file.add([value], metric=metric, **columns)


def bench_plan(options: argparse.Namespace) -> None:
    """What lies where, what moves and how long it takes; nothing of the whole model is made."""
    shape = TINY if options.quick else LLAMA_70B
    file, columns = RowFile(options.out), shape.columns("plan", "atp_fast")
    where = bytes_by_place(shape, placed(shape))
    write(file, {f"{place}_bytes": size for place, size in where.items()}, columns)
    write(file, in_subprocess([__file__, "--plan-of", shape.name], options.lock), columns)
    amount = shape.pairs * operations(on_meta(shape), shape.positions, graddrop=True)
    file.add([amount], metric="operations", **columns)
    for row in RowFile(RESULTS / "engine.csv").read():
        if row["op"] == "product" and row["dtype"] == "bfloat16" and "NVIDIA" in row["device"]:
            note = f"no measurement: operations at {row['median']} per second of {row['device']}"
            columns = shape.columns("plan", f"arithmetic, {row['device']}")
            file.add([amount / float(row["median"])], metric="bound_seconds", note=note, **columns)


def bench_run(options: argparse.Namespace) -> None:
    """The small one, planned and run."""
    shape = TINY if options.quick else HUNDREDTH
    file, columns = RowFile(options.out), shape.columns("run", "atp_fast")
    where = bytes_by_place(shape, placed(shape))
    write(file, {f"{place}_bytes": size for place, size in where.items()}, columns)
    # glibc keeps freed blocks below its threshold, which it raises as it goes
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    write(file, in_subprocess([__file__, "--run-of", shape.name], options.lock), columns)


PARTS = {"run": bench_run, "plan": bench_plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--quick", action="store_true", help="a small shape for both parts")
    parser.add_argument("--out", type=Path, default=RESULTS / "large.csv")
    parser.add_argument("--lock", type=Path, help="file to lock while timing, on a shared machine")
    parser.add_argument("--plan-of", choices=list(SHAPES), help=argparse.SUPPRESS)
    parser.add_argument("--run-of", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_environment()
    if options.plan_of:
        print_plan(SHAPES[options.plan_of])
        return
    if options.run_of:
        print_run(SHAPES[options.run_of])
        return
    for part in options.part or list(PARTS):
        PARTS[part](options)


if __name__ == "__main__":
    main()
