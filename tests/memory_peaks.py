"""Peak memory of sweeps and of exact patching, measured in a process of its own: prints one JSON list.

Arguments: a model of MODELS, then one JSON object per call. The first call is made once before it is measured, so that
what libraries set up on first use is not counted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import atp_fast.engine
import atp_fast.patching.sessions
from atp_fast import Engine, PromptPairs
from atp_fast.attribution.memory import estimate_sweep, patched_rows, plan_sweep
from atp_fast.nodes import ATTENTION_KINDS, KINDS

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from measure import extra_peak, reset_peak

from offloaded import offload

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": {**_COMMON, "intermediate_size": 2048},
    "llama": {**_COMMON, "intermediate_size": 1408, "num_key_value_heads": 2},
    "offloaded": {
        **_COMMON,
        "model_type": "llama",
        "num_hidden_layers": 4,
        "intermediate_size": 1408,
        "num_key_value_heads": 2,
    },
    "ten_layers": {
        **_COMMON,
        "model_type": "gpt_neox",
        "hidden_size": 256,
        "num_hidden_layers": 10,
        "intermediate_size": 1024,
    },
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"model_type": name, **MODELS[name]}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    if name == "offloaded":
        offload(model, Path(os.environ["OFFLOAD_FOLDER"]))
    return model.eval()


def make_pairs(count: int, positions: int, shared: int) -> PromptPairs:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 63, (count, positions), generator=generator)
    corrupted = (clean + 1) % 63
    corrupted[:, :shared] = clean[:, :shared]
    zeros = torch.zeros(count, dtype=torch.int64)
    return PromptPairs(clean, corrupted, zeros, zeros + 1)


def every_position(logits: Tensor, pairs: PromptPairs) -> Tensor:
    return logits.logsumexp(-1).sum(1)


def sweep_peak(model: PreTrainedModel, case: dict[str, Any]) -> dict[str, Any]:
    """Of Engine.attribute: peak bytes beyond the model and the scores, the estimate, and the plan."""
    engine = Engine(model, precision=case.get("precision"), memory_budget=case["budget"])
    pairs = make_pairs(case["pairs"], case["positions"], case.get("shared", 0))
    kinds = ATTENTION_KINDS if case.get("attention") else (*ATTENTION_KINDS, "neuron")
    if "features" in case:
        into = torch.randn(model.config.hidden_size, case["features"])
        kinds += engine.add_dictionary(
            2, "mlp_out", lambda x: (x @ into).relu(), lambda f: f @ into.T
        )
    found: dict[str, Any] = {}

    def spied(plug: Any, budget: Any, size: Any, **options: Any) -> Any:
        plan = plan_sweep(plug, budget, size, **options)
        found.update(plan=list(plan), estimate=estimate_sweep(plug, plan, size))
        return plan

    atp_fast.engine.plan_sweep = spied
    metric = every_position if case.get("every_position") else "nll"
    said = None if "features" in case else engine.estimate(pairs, metric, case["method"], kinds)
    before = reset_peak()
    result = engine.attribute(pairs, metric, case["method"], kinds, progress=False)
    found["peak"] = extra_peak(before)
    tables = (*result.contribution.values(), *result.effect.values())
    found["peak"] -= sum(t.nbytes for t in tables)
    if said is not None:
        assert said.devices["cpu"].result == sum(t.nbytes for t in tables)
        work = said.devices["cpu"].work
        assert (
            found.setdefault("estimate", work) == work
        )  # plans of streamed weights are not spied on
    return found


def patch_peak(model: PreTrainedModel, case: dict[str, Any]) -> dict[str, Any]:
    """Of Engine.patch on random nodes: peak bytes beyond the model, and the rows of each batch."""
    engine = Engine(model, memory_budget=case["budget"])
    pairs = make_pairs(case["pairs"], case["positions"], case.get("shared", 0))
    space, random = engine.plug.space(case["positions"], KINDS), Random(0)
    nodes = [space.node(random.randrange(len(space))) for _ in range(case["nodes"])]
    rows: list[int] = []
    multiplied: set[int] = set()

    def counted(module: Any, args: Any) -> None:
        multiplied.add(args[0].shape[:-1].numel())

    hooks = [m.register_forward_pre_hook(counted) for m in model.modules() if type(m) is nn.Linear]

    def spied(*arguments: Any) -> int:
        rows.append(patched_rows(*arguments))
        return rows[-1]

    atp_fast.patching.sessions.patched_rows = spied
    metric = every_position if case.get("every_position") else "nll"
    estimate = engine.estimate_patch(pairs, nodes, metric).devices["cpu"].work
    rows.clear()
    before = reset_peak()
    engine.patch(pairs, nodes, metric, progress=False)
    found = {
        "peak": extra_peak(before),
        "estimate": estimate,
        "rows": rows,
        "row_counts": len(multiplied),
    }
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    model = build(sys.argv[1])
    cases = [json.loads(text) for text in sys.argv[2:]]
    print(
        json.dumps([patch_peak(model, c) if "nodes" in c else sweep_peak(model, c) for c in cases])
    )


if __name__ == "__main__":
    main()
