"""One layer under autograd, cut at its attention, and vector-Jacobian products of many cotangents through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.attribution.adjoint import Adjoint
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
    """One layer run on its clean input under autograd, and on the corrupted one behind it in the same batch if wanted.

    x, out, values: the layer's input, output and node values on the graph, of all rows; `clean` and `corrupted` give either
    prompt's off it. The attention's output z is a fresh leaf, so the layer falls into two graphs, from its input to q, k, v and
    from z and its input to its output. Cotangents are those of the clean rows alone.
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
        rows: int | None = None,
    ) -> None:
        """x: (rows, positions, hidden), the corrupted prompts' behind the clean ones; precision: "bf16" to take cotangents
        through the layer's linear maps in bfloat16; statistics: attention notes those of the key fix; rows: of the clean
        prompts, None where all are."""
        self.x, self._rows = x.detach().requires_grad_(), len(x) if rows is None else rows
        self._how = plug.backend, len(x) // self._rows
        self.values: Values = {"resid_pre": self.x}
        visit = keeper(self.values, (*kinds, *ATTENTION_KINDS))
        self.run = LayerRun(
            plug.backend, visit, prefix, tuple(kinds), statistics=statistics, cut=True
        )
        narrow = NarrowCotangents() if precision == "bf16" else nullcontext()
        with torch.enable_grad(), narrow:
            self.out = plug.run_layer(number, self.x, arguments, self.run)
        if prefix is not None and self._rows < len(x):
            # of the corrupted prompts nothing is left but their own values
            k, v = self.run.k, self.run.v
            assert k is not None and v is not None
            self.run.k, self.run.v = (t.detach()[: self._rows].clone() for t in (k, v))
            self.run.prefix = None

    def clean(self, kind: str) -> Tensor:
        """Node values of the clean prompts."""
        return self.values[kind].detach()[: self._rows]

    def corrupted(self) -> Values:
        """Node values of the prompts behind, as `runs.corrupted_values` gives them."""
        return {kind: value.detach()[self._rows :] for kind, value in self.values.items()}

    def attention(self) -> tuple[Tensor, Tensor, Tensor, ops.AttentionStats]:
        """q, and k, v and the statistics with the prefix ahead, of the clean prompts."""
        run = self.run
        assert (
            run.q is not None and run.k is not None and run.v is not None and run.stats is not None
        )
        q, k, v = (x.detach()[: self._rows] for x in (run.q, run.k, run.v))
        return q, k, v, run.stats.rows(self._rows)

    def from_output(self, cotangents: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the layer's output by `wanted`, the attention's output taken as given.

        That by the layer's input is no part of the cotangents, even where these pass the layer unchanged.
        """
        grads = Adjoint([self.out], wanted, *self._how)([cotangents])
        given = cotangents.untyped_storage().data_ptr()
        return [
            g.clone() if x is self.x and g.untyped_storage().data_ptr() == given else g
            for x, g in zip(wanted, grads, strict=True)
        ]

    def from_attention(self, grads: dict[str, Tensor], ahead: Tensor) -> Tensor:
        """Gradients of q, k, v at the positions that are run, by the layer's input, added to `ahead`, which may be
        overwritten."""
        values = [self.values[kind] for kind in grads]
        walk = Adjoint(values, [self.x], *self._how)
        return walk(list(grads.values()), [ahead])[0]


def check_walk(plug: Plug) -> None:
    """NotImplementedError where cotangents that walk a layer's graph end in other gradients than autograd's own pass.

    Every kind of layer is tried once, on a few tokens. It also turns out which of them may have the corrupted prompts behind
    the clean ones on their tapes: those in which either's rows stay by themselves.
    """
    alike = {numbers[0]: numbers for numbers in plug.alike}
    with plug.plugged():
        ids = plug.short_prompt()
        x, arguments = plug.enter(ids)
        four = plug.enter(ids.repeat(4, 1))[1]
        for number in range(max(alike) + 1):
            if number not in alike:
                with torch.no_grad():
                    x = plug.run_layer(number, x, arguments[number], LayerRun(plug.backend))
                continue
            x = plug.moved(x, number)
            tape = LayerTape(plug, number, x, arguments[number], None, ())
            _check_alike(plug, tape.out.detach(), f"outputs of layer {number}")
            if (worst := plug.shares.largest(_worst(plug, number, tape, 1))) != 0:
                raise NotImplementedError(
                    f"{plug.name} is not served: cotangents through layer {number} differ from autograd's by {worst:.1e} of "
                    "the largest"
                )
            layer = plug.layers[number]
            # not experts, to whom others' tokens go, and not layers of another kind than attention
            together = layer.down is not None and layer.attention is not None
            if together:
                rows = torch.cat([x, x.flip(1), x.roll(1, 1), -x])
                together = not plug.shares.largest(_apart(plug, number, rows, four[number]))
            for other in alike[number]:
                plug.layers[other].together = together
            x = tape.out.detach()


def _apart(plug: Plug, number: int, rows: Tensor, arguments: LayerArguments) -> bool:
    """Whether half of a batch on a layer's tape does not have cotangents of its own, or has others than autograd's."""
    try:
        tape = LayerTape(plug, number, rows, arguments, None, ())
        return _worst(plug, number, tape, 2) != 0
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of shapes that have no rows ahead; one prompt has gone through
        return True


def _worst(plug: Plug, number: int, tape: LayerTape, parts: int) -> float:
    """The largest error of gradients that the walk finds for the first of so many parts of the batch, as a share of the largest
    gradient; 0 within the tolerance, infinite where the parts are not kept apart."""
    run, plain = tape.run, torch.Generator().manual_seed(0)
    # heads of its own have cotangents of their own
    heads = torch.Generator().manual_seed(1 + plug.shares.part("q"))
    return max(
        _compare(plug, number, parts, [tape.out], [*_present(run.z), tape.x], plain),
        _compare(plug, number, parts, _present(run.q, run.k, run.v), [tape.x], heads),
        key=lambda x: (x != x, x),
    )


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _compare(
    plug: Plug,
    number: int,
    parts: int,
    outputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    generator: torch.Generator,
) -> float:
    """_worst of the walk from `outputs` to `wanted`."""
    outputs = [x for x in outputs if x.requires_grad]
    if not outputs:
        return 0.0
    walk, rows = Adjoint(outputs, wanted, plug.backend, parts), len(outputs[0]) // parts
    cotangents = [torch.randn((2, rows, *x.shape[1:]), generator=generator).to(x) for x in outputs]
    whole = [torch.zeros_like(x) for x in outputs]
    for zeros, cotangent in zip(whole, cotangents, strict=True):
        zeros[:rows] = cotangent[0]
    own = torch.autograd.grad(
        outputs, wanted, whole, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    worst = 0.0 if walk.keeps_rows else math.inf
    for ours, right in zip(walk(cotangents), own, strict=True):
        error = plug.error(ours[0], right[:rows])
        if bool(right.any()) and not error <= plug.tolerance(right):
            worst = max(worst, error, key=lambda x: (x != x, x))
    _check_alike(plug, own[-1], f"gradients by layer {number}'s input")
    return worst


def _check_alike(plug: Plug, x: Tensor, what: str) -> None:
    """Processes that share the model must go on with the same, or part of a sum is missing."""
    first, *others = [x] if plug.shares.group is None else plug.shares.group.parts(x)
    if any(not plug.error(other, first) <= plug.tolerance(first) for other in others):
        raise NotImplementedError(
            f"{plug.name} is not served: processes that share it get different {what}: its tensor-parallel plan "
            "splits a part of the layer that another leaves whole"
        )
