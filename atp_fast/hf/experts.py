"""transformers' fused experts, taken over: the inputs of their down projections are the neurons of a mixture.

A mixture's neurons are numbered expert by expert, expert * width + j. One of an expert that its router did not choose for a
token is 0 there: nothing reads it. transformers' layouts (transposed or not, with biases, gated in their own ways, with a
norm behind) are those of `use_experts_implementation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from atp_fast.hf.attention import NAME, LayerRun, Mixture, running
from atp_fast.hf.linears import mapped


def _experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts function: hidden states (tokens, hidden), the chosen experts and their weights, (tokens, k)."""
    run = running.get()
    if run is None:
        raise RuntimeError(f"experts {NAME!r} work inside atp_fast.Engine only")
    if module._is_expert_parallel:
        raise NotImplementedError(
            f"{type(module).__name__} is spread over processes, which is not served"
        )
    tokens, chosen = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(expert, minlength=module.num_experts).tolist()
    rows = order // chosen
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = _projected(module, up, hidden_states.index_select(0, rows), counts, run.backend)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    run.mixtures.append(Mixture(module, module.num_experts * x.shape[-1], tokens))
    if "neuron" in run.kinds:
        x = _seen(run, x, tokens, rows * module.num_experts + expert, module.num_experts)
    x = _projected(module, "down_proj", x, counts, run.backend)
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1).index_select(0, order)[:, None]
    # back in the tokens' order and summed there: adding rows up in place has no fixed order on a GPU
    x = x.index_select(0, order.argsort()).view(tokens, chosen, -1).sum(1)
    return x.to(hidden_states.dtype)


def _projected(module: Any, name: str, x: Tensor, counts: list[int], backend: str) -> Tensor:
    """Each expert's map of its own rows; x is sorted by expert, `counts` rows each."""
    weights, parts = getattr(module, name), []
    biases = getattr(module, f"{name}_bias") if module.has_bias else None
    for number, rows in enumerate(torch.split(x, counts)):
        if len(rows):
            weight = weights[number].T if module.is_transposed else weights[number]
            bias = None if biases is None else biases[number]
            parts.append(mapped(rows, weight, bias, backend))
    return torch.cat(parts)


def _seen(run: LayerRun, x: Tensor, tokens: int, place: Tensor, experts: int) -> Tensor:
    """x (chosen, width) as its layer's neurons, (batch, positions, experts * width), past `run.visit`, and back.

    place: token * experts + expert of every row.
    """
    width = x.shape[-1]
    neurons = x.new_zeros((tokens * experts, width)).index_copy(0, place, x)
    neurons = run.seen("neuron", neurons.view(*run.shape, experts * width))
    return neurons.reshape(-1, width).index_select(0, place)


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
