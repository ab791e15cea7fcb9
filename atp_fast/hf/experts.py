"""transformers' fused experts, taken over: the inputs of their down projections are the neurons of a mixture.

A mixture's neurons are numbered expert by expert, expert * width + j. One of an expert that its router did not choose for a
token is 0 there: nothing reads it. transformers' layouts (transposed or not, with biases, gated in their own ways, with a
norm behind) are those of `use_experts_implementation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from atp_fast.hf.attention import NAME, LayerRun, Mixture, running
from atp_fast.hf.linears import made, mapped
from atp_fast.ops.linear import Make


class Experts(NamedTuple):
    """Fused experts: the module, their number, the name of the projection to the neurons and what follows it.

    make: of a projection's name and an expert's number, what makes the weight (outputs, inputs) where it is quantised.
    """

    module: Any
    number: int
    up: str
    gate: Callable[[Tensor], Tensor]
    has_bias: bool = False
    transposed: bool = False
    norm: Callable[[Tensor], Tensor] | None = None
    make: Callable[[str, int], Make] | None = None

    @classmethod
    def of(cls, module: Any) -> Experts:
        """As `use_experts_implementation` describes them. NotImplementedError where they are spread over processes."""
        if module._is_expert_parallel:
            raise NotImplementedError(
                f"{type(module).__name__} is spread over processes, which is not served"
            )
        return cls(
            module,
            module.num_experts,
            up="gate_up_proj" if module.has_gate else "up_proj",
            gate=module._apply_gate if module.has_gate else module.act_fn,
            has_bias=module.has_bias,
            transposed=module.is_transposed,
            norm=module.post_expert_norm if module.has_post_expert_norm else None,
        )


def _experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts function: hidden states (tokens, hidden), the chosen experts and their weights, (tokens, k)."""
    experts = Experts.of(module)
    return run_experts(experts, running_layer(), hidden_states, top_k_index, top_k_weights)


def running_layer() -> LayerRun:
    run = running.get()
    if run is None:
        raise RuntimeError(f"experts {NAME!r} work inside atp_fast.Engine only")
    return run


def run_experts(
    experts: Experts,
    run: LayerRun,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The sum over each token's chosen experts, (tokens, hidden); neurons pass through the run's visit."""
    tokens, chosen = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(expert, minlength=experts.number).tolist()
    rows = order // chosen
    x = _projected(experts, experts.up, hidden_states.index_select(0, rows), counts, run.backend)
    x = experts.gate(x)
    run.mixtures.append(Mixture(experts.module, experts.number * x.shape[-1], tokens))
    if "neuron" in run.kinds:
        x = _seen(run, x, tokens, rows * experts.number + expert, experts.number)
    x = _projected(experts, "down_proj", x, counts, run.backend)
    if experts.norm is not None:
        x = experts.norm(x)
    x = x * top_k_weights.reshape(-1).index_select(0, order)[:, None]
    # back in the tokens' order and summed there: adding rows up in place has no fixed order on a GPU
    x = x.index_select(0, order.argsort()).view(tokens, chosen, -1).sum(1)
    return x.to(hidden_states.dtype)


def _projected(experts: Experts, name: str, x: Tensor, counts: list[int], backend: str) -> Tensor:
    """Each expert's map of its own rows; x is sorted by expert, `counts` rows each."""
    module, parts = experts.module, []
    weights = getattr(module, name) if experts.make is None else None
    biases = getattr(module, f"{name}_bias") if experts.has_bias else None
    for number, rows in enumerate(torch.split(x, counts)):
        if len(rows):
            bias = None if biases is None else biases[number]
            if weights is None:
                assert experts.make is not None
                parts.append(made(rows, experts.make(name, number), bias, backend))
            else:
                weight = weights[number].T if experts.transposed else weights[number]
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
