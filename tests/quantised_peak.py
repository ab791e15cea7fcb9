"""Peak memory of calls on a model in fp8, beyond the model; prints one JSON object. Run in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import atp_fast.engine
from atp_fast import Engine
from atp_fast.attribution.memory import plan_sweep
from atp_fast.nodes import Node
from memory_peaks import make_pairs

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from measure import extra_peak, reset_peak


def build(hidden: int) -> LlamaForCausalLM:
    """Never whole in floats."""
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=4 * hidden,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            with torch.device("meta"):
                layer = FP8Linear(module.in_features, module.out_features, (128, 128))
            layer.weight = nn.Parameter(
                torch.randn(layer.weight.shape).to(torch.float8_e4m3fn), requires_grad=False
            )
            scale = torch.full(layer.weight_scale_inv.shape, 0.02)
            layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
            model.set_submodule(path, layer)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                made = torch.ones(value.shape) if value.ndim == 1 else torch.randn(value.shape)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(shape)
    return model.eval()


def measure(hidden: int) -> dict[str, int]:
    model, found = build(hidden), {}
    layer = model.model.layers[0]
    found["layer"] = 4 * sum(m.weight.numel() for m in layer.modules() if hasattr(m, "weight"))
    before = reset_peak()
    engine = Engine(model, memory_budget="1GiB")
    found["open"] = extra_peak(before)

    def spied(*args: Any, **options: Any) -> Any:
        plan = plan_sweep(*args, **options)
        found["taped_from"] = plan.taped_from
        return plan

    atp_fast.engine.plan_sweep = spied
    pairs = make_pairs(1, 8, 0)
    before = reset_peak()
    engine.attribute(pairs, progress=False)
    found["sweep"] = extra_peak(before)
    before = reset_peak()
    engine.patch(pairs, [Node("z", 0, 3, 1), Node("neuron", 4, 5, 2)], progress=False)
    found["patch"] = extra_peak(before)
    return found


if __name__ == "__main__":
    measure(64)  # what libraries set up on first use is not counted
    print(json.dumps(measure(512)))
