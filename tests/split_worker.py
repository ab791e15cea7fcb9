"""What tests/test_tensor_parallel.py runs in two processes that share each model: python split_worker.py FOLDER.

`answers` is asked of a whole model by the test, of a split one here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tiny_models
import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.attribution import memory
from atp_fast.attribution.replay import model_state
from atp_fast.nodes import KINDS, Node
from atp_fast.prompts.spans import Spans

# grouped heads; all in one product, with biases; norms of heads; heads that all processes compute; a mixture; latent attention;
# layers without attention
SERVED = ("llama", "gpt_neox", "qwen3", "olmo2", "mixtral", "deepseek_v2", "qwen3_next")
# name -> settings: llamas whose shape two processes cannot share
SHAPES: dict[str, dict[str, int]] = {
    "one key": {"num_key_value_heads": 1},
    "odd heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36},
    "odd neurons": {"intermediate_size": 41},
}
# name -> (model, rules of its plan that are others)
PLANS: dict[str, tuple[str, dict[str, str]]] = {
    "sequence": ("llama", {"model.layers.*.input_layernorm": "sequence_parallel"}),
    "norm": ("llama", {"model.layers.*.input_layernorm.weight": "colwise"}),
    "unsummed": ("mixtral", {"model.layers.*.mlp.experts": "local_params"}),
    "leak": ("deepseek_v2", {"model.layers.*.self_attn.kv_a_proj_with_mqa": "replicate"}),
}
METHODS = ("atp", "atp+qk", "atp+graddrop", "atp*")


def first_margin(logits: Tensor) -> Tensor:
    """A metric that sees all pairs at once."""
    return logits[:, -1, 3] * (1 + 0 * logits[0, -1, 5]) - logits[:, -1, 5]


def spans() -> PromptPairs:
    """Two pairs, one of unequal lengths, whose corrupted span "a" is longer."""
    clean = torch.tensor([[5, 6, 7, 8, 9, 10, 0, 0], [3, 4, 5, 6, 7, 8, 0, 0]])
    corrupted = torch.tensor([[5, 6, 17, 18, 7, 19, 9, 20], [3, 14, 5, 16, 7, 8, 0, 0]])
    where = [{"a": (2, 4), "end": (4, 6)}, {"a": (1, 3), "end": (3, 6)}]
    moved = [{"a": (2, 6), "end": (6, 8)}, {"a": (1, 3), "end": (3, 6)}]
    answers = torch.tensor([1, 2])
    return PromptPairs(
        *(clean, corrupted, answers, answers + 10),
        attention_mask=clean > 0,
        corrupted_attention_mask=corrupted > 0,
        spans=Spans.of(where, moved),
    )


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """The prompts one after the other while taping, as many rows are run on a CPU."""
    own = memory.saves_starts
    memory.saves_starts = lambda device, rows: False
    try:
        yield
    finally:
        memory.saves_starts = own


def tables(found: Any) -> dict[str, Tensor]:
    named = {"clean": found.clean_value, "corrupted": found.corrupted_value}
    for name in ("contribution", "effect", "per_pair"):
        named |= {f"{name} {kind}": x for kind, x in (getattr(found, name) or {}).items()}
    return named


def few_answers(model: Any) -> dict[str, dict[str, Tensor]]:
    """What every model is asked."""
    engine, pairs = Engine(model), zoo.mixed_pairs(model, "left")
    nodes = [n for i, n in enumerate(engine.plug.space(pairs.width, KINDS)) if i % 37 == 5]
    exact = engine.patch(pairs, nodes, progress=False)
    found = engine.attribute(pairs, nodes=KINDS, per_pair=True, progress=False)
    return {"atp*": tables(found), "patch": {"effect": exact.effect}}


def many_answers(model: Any, rank: int = 0) -> dict[str, dict[str, Tensor]]:
    """What one model is asked beside. Processes are given other budgets, of which the least counts."""
    found: dict[str, dict[str, Tensor]] = {}
    engine, pairs = Engine(model), zoo.mixed_pairs(model, "right")

    def ask(name: str, pairs: PromptPairs = pairs, **options: Any) -> None:
        found[name] = tables(engine.attribute(pairs, **options, progress=False))

    for method in METHODS:
        ask(method, method=method, per_pair=True)
    ask("denoising", direction="denoising", metric="nll")
    ask("kl", metric="kl")
    ask("at once", metric=first_margin)
    with apart():
        ask("apart")
    narrow = Engine(model, precision="bf16")
    found["bf16"] = narrow.attribute(pairs, progress=False).contribution
    tight = Engine(model, memory_budget=90_000 * (1 + 40 * rank))
    found["budget"] = tables(tight.attribute(pairs, progress=False))
    ask("spans", pairs=spans(), per_pair=True)
    nodes = list(engine.plug.space(pairs.width, KINDS))[::11]
    subsets = [nodes[i::7] for i in range(7)] + [[]]
    index = torch.arange(len(subsets)) % len(pairs)
    for name, chosen in (("subsets", None), ("subsets of a pair", index)):
        exact = engine.patch_subsets(pairs, subsets, pair_index=chosen, progress=False)
        found[name] = {"effect": exact.effect}
    exact = tight.patch(pairs, nodes[::9], metric=first_margin, progress=False)
    found["patch at once"] = {"effect": exact.effect}
    few: dict[str, Any] = {"forwards": 60, "probability": 0.4, "progress": False}
    bound = engine.bound_missed(pairs, nodes[:3], nodes=("z", "k"), **few)
    found["bound"] = {"bounds": torch.tensor(bound.bounds, dtype=torch.float64)}
    return found


def write(folder: Path) -> None:
    """The models, whole."""
    for name in SERVED:
        build = zoo.build if name in zoo.FAMILIES else tiny_models.build
        build(name).save_pretrained(folder / name)
    zoo.build("llama", torch.float32).save_pretrained(folder / "llama32")
    for name, settings in SHAPES.items():
        zoo.build("llama", **settings).save_pretrained(folder / name)


def estimates(model: Any) -> list[Any]:
    """What calls will take."""
    engine, pairs = Engine(model), zoo.mixed_pairs(model, "left")
    nodes = [n for i, n in enumerate(engine.plug.space(pairs.width, KINDS)) if i % 37 == 5]
    found = [engine.estimate(pairs, nodes=KINDS), engine.estimate_patch(pairs, nodes)]
    return [(x.seconds, [each.result for each in x.devices.values()]) for x in found]


def load(folder: Path, rules: dict[str, str] | None = None) -> Any:
    plan = DistributedConfig(tp_size=2, tp_plan=rules or None)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan).eval()


def state(model: Any) -> list[Any]:
    """All that a call could leave behind."""
    return [
        *((name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()),
        *((n, sorted(vars(m)), id(vars(m).get("forward"))) for n, m in model.named_modules()),
        model.config._attn_implementation,
    ]


def complaint(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def traffic(model: Any) -> dict[str, int]:
    """Sums over the processes in the forward and in the sweep of one layer, whatever the number of cotangents."""
    engine, pairs, counted = Engine(model), zoo.mixed_pairs(model, "right"), {}
    own, sums = dist.all_reduce, 0
    engine.attribute(pairs, progress=False)  # the first call measures what layers take in memory

    def count(x: Tensor, *args: Any, **named: Any) -> Any:
        nonlocal sums
        sums += 1
        return own(x, *args, **named)

    for name, method, how in (
        ("atp", "atp", contextlib.nullcontext()),
        ("atp*", "atp*", contextlib.nullcontext()),
        ("apart", "atp*", apart()),
    ):
        sums, dist.all_reduce = 0, count
        try:
            with how:
                engine.attribute(pairs, method=method, progress=False)
        finally:
            dist.all_reduce = own
        counted[name] = sums
    return counted


def trouble(folder: Path, rank: int) -> dict[str, str]:
    """Calls that must be refused alike in both processes, and what they say."""
    model = load(folder / "llama")
    engine, pairs = Engine(model), zoo.mixed_pairs(model, "right")
    before, said = state(model), {}

    def cut(logits: Tensor, pairs: PromptPairs) -> Tensor:
        raise RuntimeError("no metric")

    said["other pairs"] = complaint(lambda: engine.attribute(pairs[rank:]))
    said["other pairs of an estimate"] = complaint(lambda: engine.estimate(pairs[rank:]))
    said["other nodes of an estimate"] = complaint(
        lambda: engine.estimate_patch(pairs, [Node("z", 0, 4, rank)])
    )
    said["other method"] = complaint(lambda: engine.attribute(pairs, method=METHODS[rank]))
    said["other metric"] = complaint(lambda: engine.patching(pairs, ("z",), ("nll", "kl")[rank]))
    said["other nodes"] = complaint(lambda: engine.patch(pairs, [Node("z", 0, 4, rank)]))
    said["metric"] = complaint(lambda: engine.attribute(pairs, cut))
    sweep = sys.modules["atp_fast.attribution.sweep"]
    own = sweep._Layer.sweep

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sweep._Layer.sweep = full
    said["memory"] = complaint(lambda: engine.attribute(pairs))
    sweep._Layer.sweep = own
    said["left as it was"] = str(state(model) == before)
    model.model.layers[0].mlp.up_proj.forward = lambda x: x
    said["another forward"] = complaint(lambda: Engine(model))
    model = load(folder / "llama")
    model.config.distributed_config.fsdp_size = 2
    said["fsdp"] = complaint(lambda: Engine(model))
    plain = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    mesh = model._mesh_manager.get_mesh("tp")
    norm = plain.model.norm
    norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.data, mesh, [Replicate()]))
    assert isinstance(norm.weight, DTensor)
    said["foreign"] = complaint(lambda: Engine(plain))
    for name in SHAPES:
        said[name] = complaint(lambda name=name: Engine(load(folder / name)))
    for name, (where, rules) in PLANS.items():
        said[name] = complaint(lambda w=where, r=rules: Engine(load(folder / w, r)))
    return said


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in (*SERVED, "llama32"):
        model = load(folder / name)
        before = state(model)
        found[name] = few_answers(model)
        if name == "llama":
            found["many"] = many_answers(model, rank)
            found["traffic"] = traffic(model)
            found["estimates"] = estimates(model)
            group = Engine(model).plug.shares.group
            assert group is not None
            nan = (float("nan"), 3.0)[rank]
            found["largest"] = group.largest(-rank), group.largest(rank), group.largest(nan)
        if name == "gpt_neox":  # all of whose tensors are plain inside
            with (plug := Engine(model).plug).plugged():
                found["recorded"] = model_state(plug) is not None
        assert state(model) == before
    found["trouble"] = trouble(folder, rank)
    torch.save(found, folder / f"found_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
