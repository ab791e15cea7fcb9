"""One layer under autograd, cut at its attention, and vector-Jacobian products of many cotangents through it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from atp_fast.attribution.precision import NarrowCotangents
from atp_fast.hf import LayerArguments, LayerRun, Plug, Prefix, Visit
from atp_fast.nodes import ATTENTION_KINDS

Values = dict[str, Tensor]


def keeper(values: Values, kinds: Sequence[str]) -> Visit:
    """A visit function that notes the values of some kinds and changes nothing."""

    def keep(kind: str, value: Tensor) -> Tensor:
        if kind in kinds:
            values[kind] = value
        return value

    return keep


class LayerTape:
    """One layer run on its clean input under autograd.

    values: node values on the graph, as `runs.corrupted_values` gives them off it. The attention's output z is a fresh leaf, so
    the layer falls into two graphs, from its input to q, k, v and from z and its input to its output.
    """

    def __init__(
        self,
        plug: Plug,
        number: int,
        x: Tensor,
        arguments: LayerArguments,
        prefix: Prefix | None,
        kinds: Sequence[str],
        precision: str | None = None,
    ) -> None:
        """precision: "bf16" to take cotangents through the layer's linear maps in bfloat16."""
        self.x = x.detach().requires_grad_()
        self.values: Values = {"resid_pre": self.x}
        visit = keeper(self.values, (*kinds, *ATTENTION_KINDS))
        self.run = LayerRun(plug.backend, visit, prefix, tuple(kinds), cut=True)
        with torch.enable_grad(), NarrowCotangents() if precision == "bf16" else nullcontext():
            self.out = plug.run_layer(number, self.x, arguments, self.run)

    def from_output(self, cotangents: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the layer's output by `wanted`, the attention's output taken as given."""
        return batched_grad([self.out], wanted, [cotangents])

    def from_attention(self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> Tensor:
        """Gradients of q, k, v (with any prefix's keys and values ahead of their own) by the layer's input."""
        run = self.run
        assert run.q is not None and run.k is not None and run.v is not None
        return batched_grad([run.q, run.k, run.v], [self.x], [grad_q, grad_k, grad_v])[0]


def batched_grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """torch.autograd.grad for a leading axis of cotangents, keeping the graph; unused inputs get zeros."""

    def grad(*given: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, inputs, given, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    if cotangents[0].shape[0] == 1:  # vmap's dispatch would cost as much as a small layer
        return [g[None] for g in grad(*(c[0] for c in cotangents))]
    return list(torch.func.vmap(grad)(*cotangents))
