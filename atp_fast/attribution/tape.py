"""One layer under autograd, cut at its attention, and vector-Jacobian products of many cotangents through it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from atp_fast.attribution.adjoint import Adjoint
from atp_fast.attribution.precision import NarrowCotangents
from atp_fast.attribution.twins import Given, Twins
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
        statistics: bool = False,
        twins: Twins | None = None,
    ) -> None:
        """precision: "bf16" to take cotangents through the layer's linear maps in bfloat16; statistics: attention notes
        those of the key fix; twins: the layer's run on this and another prompt in one batch, whose results are taken."""
        self.x = x.detach().requires_grad_()
        self.values: Values = {"resid_pre": self.x}
        visit = keeper(self.values, (*kinds, *ATTENTION_KINDS))
        self.run = LayerRun(
            plug.backend, visit, prefix, tuple(kinds), statistics=statistics, cut=True
        )
        mode: AbstractContextManager[object] = nullcontext()
        if twins is not None:
            self.run.given, mode = twins.attention(len(x)), Given(twins.noted)
        elif precision == "bf16":
            mode = NarrowCotangents()
        with torch.enable_grad(), mode:
            self.out = plug.run_layer(number, self.x, arguments, self.run)

    def from_output(self, cotangents: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the layer's output by `wanted`, the attention's output taken as given."""
        return Adjoint([self.out], wanted)([cotangents])

    def from_attention(self, grads: dict[str, Tensor], ahead: Tensor) -> Tensor:
        """Gradients of q, k, v at the positions that are run, by the layer's input, added to `ahead`, which may be
        overwritten."""
        values = [self.values[kind] for kind in grads]
        return Adjoint(values, [self.x])(list(grads.values()), [ahead])[0]


def check_walk(plug: Plug) -> None:
    """NotImplementedError where cotangents that walk a layer's graph end in other gradients than autograd's own pass.

    Every kind of layer is tried once, on a few tokens.
    """
    tried = set(plug.first_of_each_kind)
    generator = torch.Generator().manual_seed(0)
    with plug.plugged():
        x, arguments = plug.enter(plug.short_prompt())
        for number in range(max(tried) + 1):
            if number not in tried:
                with torch.no_grad():
                    x = plug.run_layer(number, x, arguments[number], LayerRun(plug.backend))
                continue
            tape = LayerTape(plug, number, plug.moved(x, number), arguments[number], None, ())
            run = tape.run
            _check_alike(plug, tape.out.detach(), f"outputs of layer {number}")
            _compare(plug, number, [tape.out], [*_present(run.z), tape.x], generator)
            # heads of its own have cotangents of their own
            heads = torch.Generator().manual_seed(1 + plug.shares.part("q"))
            _compare(plug, number, _present(run.q, run.k, run.v), [tape.x], heads)
            x = tape.out.detach()


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _compare(
    plug: Plug,
    number: int,
    outputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    generator: torch.Generator,
) -> None:
    outputs = [x for x in outputs if x.requires_grad]
    if not outputs:
        return
    cotangents = [torch.randn((2, *x.shape), generator=generator).to(x) for x in outputs]
    first, worst = [c[0] for c in cotangents], 0.0
    own = torch.autograd.grad(
        outputs, wanted, first, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for ours, right in zip(Adjoint(outputs, wanted)(cotangents), own, strict=True):
        error = plug.error(ours[0], right)
        if bool(right.any()) and not error <= plug.tolerance(right):
            worst = max(worst, error, key=lambda x: (x != x, x))
    if (worst := plug.shares.largest(worst)) != 0:
        raise NotImplementedError(
            f"{plug.name} is not served: cotangents through layer {number} differ from autograd's by {worst:.1e} of the largest"
        )
    _check_alike(plug, own[-1], f"gradients by layer {number}'s input")


def _check_alike(plug: Plug, x: Tensor, what: str) -> None:
    """Processes that share the model must go on with the same, or part of a sum is missing."""
    first, *others = [x] if plug.shares.group is None else plug.shares.group.parts(x)
    if any(not plug.error(other, first) <= plug.tolerance(first) for other in others):
        raise NotImplementedError(
            f"{plug.name} is not served: processes that share it get different {what}: its tensor-parallel plan "
            "splits a part of the layer that another leaves whole"
        )
