"""Vector-Jacobian products of many cotangents at once, by a walk over the graph that autograd recorded.

Every gradient has a leading axis of cotangents. Steps that layers are made of have a rule here; functions of our own bring
theirs, a static method `cotangents` beside `backward`; any other step is autograd's own, under torch.func.vmap. Sums of
gradients are formed by the products and kernels themselves where those can add.

Cotangents may be those of the first rows of the batch alone, one part of several. Where every step keeps rows
(attribution.row_steps), their gradients are those of the first part of the axis behind the cotangents'; in any other graph the
other rows' cotangents are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.attribution.row_steps import axis_of, keeps_rows, rule_of_ours
from atp_fast.ops.pending import Pending

Edge = tuple[Any, int]
"""A step of the graph and the number of one of its outputs."""
_Arrived = tuple[Tensor | Pending, bool]


class Adjoint:
    """The steps of a graph from some outputs back to some tensors, walked for one set of cotangents after another."""

    def __init__(
        self,
        outputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
        backend: str = "auto",
        parts: int = 1,
    ) -> None:
        """parts: cotangents are those of the first of so many equal parts of the batch."""
        self._backend, self._parts = backend, parts
        self._roots = [_edge(x) for x in outputs]
        self._wanted = [_edge(x) for x in wanted]
        self._zeros = [(x.shape, x.dtype, x.device) for x in wanted]
        targets: dict[Any, list[int]] = {}
        for node, number in dict.fromkeys(self._wanted):
            targets.setdefault(node, []).append(number)
        self._targets = targets
        self._steps = _order([node for node, _ in self._roots], targets)
        inner = (s for s in self._steps if s.inner and parts > 1)
        self.keeps_rows = all(keeps_rows(s.node, s.name, s.targets, parts) for s in inner)

    def __call__(
        self, cotangents: Sequence[Tensor], ahead: Sequence[Tensor | None] = ()
    ) -> list[Tensor]:
        """Gradients of sum(cotangent * output) by `wanted`, (C, *shape) each.

        cotangents: (C, *shape) per output, of the first part of the batch; ahead: what has arrived at the first of `wanted` on
        other ways. It is added, and may be overwritten.
        """
        if self.keeps_rows:
            return self._walked(cotangents, ahead, self._parts)
        whole = [_whole(c, self._parts) for c in cotangents]
        before = [a if a is None else _whole(a, self._parts) for a in ahead]
        found = self._walked(whole, before, 1)
        return [g[:, : g.shape[1] // self._parts] for g in found]

    def _walked(
        self, cotangents: Sequence[Tensor], ahead: Sequence[Tensor | None], parts: int
    ) -> list[Tensor]:
        sums, count = _Sums(), len(cotangents[0])
        with torch.no_grad():
            for edge, given in zip(self._roots, cotangents, strict=True):
                sums.add(edge, given, own=False)
            for edge, before in zip(self._wanted, ahead, strict=False):
                if before is not None:
                    sums.add(edge, before, own=True)
            found: dict[Edge, Tensor] = {}
            for step in self._steps:
                arrived = sums.take(step.node)
                for number in step.wanted:
                    if number in arrived:
                        found[step.node, number] = _kept(arrived, number)
                if step.inner and arrived and not self._gated(step, arrived, sums):
                    _walk(step, arrived, sums, parts)
        return [
            found[edge]
            if edge in found
            else torch.zeros((count, *_part(shape, parts)), dtype=dtype, device=device)
            for edge, (shape, dtype, device) in zip(self._wanted, self._zeros, strict=True)
        ]

    def _gated(self, step: _Step, arrived: dict[int, _Arrived], sums: _Sums) -> bool:
        """Take gradients through a product with an activation and the activation at once, if that is what the step is."""
        if step.name != "MulBackward0":
            return False
        saved = step.node._saved_other, step.node._saved_self  # of either factor: the other one
        for factor, (node, _) in enumerate(step.targets):
            activation = None if node is None or node in self._targets else _activation(node)
            beside = step.targets[1 - factor]
            if activation is None or beside[0] is None:
                continue
            gate, up = node._saved_self, saved[factor]
            if gate.shape != up.shape or gate.dtype != up.dtype or not 2 <= gate.ndim <= 4:
                continue
            grad = _plain(arrived[0][0])
            by_gate, by_up = ops.gate_vjp(
                _rows(gate, grad),
                _rows(up, grad),
                grad,
                activation=activation,
                backend=self._backend,
            )
            sums.add(node.next_functions[0], by_gate, True)
            sums.add(beside, by_up, True)
            return True
        return False


def _activation(node: Any) -> str | None:
    """The activation of ops.gate_vjp that a step is."""
    name = node.name()
    if name == "GeluBackward0" and node._saved_approximate == "tanh":
        return "gelu_tanh"
    return "silu" if name == "SiluBackward0" else None


def _edge(x: Tensor) -> Edge:
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    edge = torch.autograd.graph.get_gradient_edge(x)
    return edge.node, edge.output_nr


class _Step(NamedTuple):
    """A step through which gradients pass, and its name: where it leads, the numbers of its outputs that are wanted, and whether
    it leads on to others that are."""

    node: Any
    name: str
    targets: tuple[Edge, ...]
    wanted: Sequence[int]
    inner: bool


def _order(roots: Iterable[Any], targets: dict[Any, list[int]]) -> list[_Step]:
    """The steps from the roots to the targets, each behind all that feed it."""
    leads: dict[Any, bool] = {}  # whether a step reaches a target
    done: list[_Step] = []
    for root in roots:
        stack: list[tuple[Any, tuple[Edge, ...] | None]] = [(root, None)]
        while stack:
            node, behind = stack.pop()
            if behind is not None:
                inner = any(leads[n] for n, _ in behind if n is not None)
                if inner or node in targets:
                    leads[node] = True
                    wanted = targets.get(node, ())
                    done.append(_Step(node, node.name(), behind, wanted, inner))
            elif node not in leads:
                leads[node] = False
                behind = node.next_functions
                stack.append((node, behind))
                stack += [(n, None) for n, _ in behind if n is not None and n not in leads]
    done.reverse()
    return done


class _Sums:
    """Gradients that have arrived at the steps' outputs, by number, and whether their memory is nobody else's."""

    def __init__(self) -> None:
        self._at: dict[Any, dict[int, _Arrived]] = {}

    def add(self, edge: Edge, part: Tensor | Pending, own: bool) -> None:
        node, number = edge
        at = self._at.setdefault(node, {})
        if number not in at:
            at[number] = part, own
            return
        value, owned = at[number]
        if isinstance(value, Pending):
            if isinstance(part, Pending):
                value, owned = value.alone(), True
            else:  # the order of two terms does not matter
                (value, owned), part = (part, own), value
        if isinstance(part, Pending):
            at[number] = part.onto(value, owned), True
        elif owned and value.dtype == part.dtype:
            at[number] = value.add_(part), True
        else:
            at[number] = value + part, True

    def take(self, node: Any) -> dict[int, _Arrived]:
        return self._at.pop(node, {})


def _kept(arrived: dict[int, _Arrived], number: int) -> Tensor:
    """A gradient, to be handed out: nothing may write to it from here on."""
    value = _plain(arrived[number][0])
    arrived[number] = value, False
    return value


def _plain(grad: Tensor | Pending) -> Tensor:
    return grad.alone() if isinstance(grad, Pending) else grad


def _part(shape: Sequence[int], parts: int) -> tuple[int, ...]:
    """The shape of what so many parts of the batch have of a tensor in the graph."""
    return tuple(shape) if parts == 1 else (shape[0] // parts, *shape[1:])


def _rows(saved: Tensor, grad: Tensor) -> Tensor:
    """The rows of a step's tensor that a gradient of its output has; it may broadcast."""
    if saved.ndim == grad.ndim - 1 and saved.shape[0] > grad.shape[1]:
        return saved[: grad.shape[1]]
    return saved


def _spread(saved: Tensor, grad: Tensor) -> Tensor:
    """A step's tensor as its gradient's rows and cotangents have it."""
    return _rows(saved, grad).expand_as(grad)


def _walk(step: _Step, arrived: dict[int, _Arrived], sums: _Sums, parts: int) -> None:
    """Take the gradients of a step's outputs to its inputs."""
    node, name = step.node, step.name
    rule = _RULES.get(name)  # of one output
    if rule is not None and not arrived[0][0].dtype.is_complex:  # rotations may be: conjugates
        found = rule(node, *arrived[0])
        if found is not None:
            exact = name not in _BROADCAST
            for target, (part, own) in zip(step.targets, found, strict=False):
                if target[0] is not None and part is not None:
                    sums.add(target, part if exact else _fitted(part, target, parts), own)
            return
    own_rule = rule_of_ours(node)
    if own_rule is not None:
        for target, part in zip(step.targets, own_rule(node, _plain(arrived[0][0])), strict=False):
            if target[0] is not None and part is not None:
                sums.add(target, part, True)
        return
    outputs = range(len(node._input_metadata))
    plain = [_plain(arrived[i][0]) if i in arrived else None for i in outputs]
    given = [g for g in plain if g is not None]
    if name == "SplitBackward0" and len(given) == len(plain):
        sums.add(step.targets[0], torch.cat(given, _axis(node._saved_dim, given[0])), True)
        return
    for target, part in zip(step.targets, _by_autograd(node, plain, parts), strict=True):
        if target[0] is not None and part is not None:
            sums.add(target, _fitted(part, target, parts), False)


def _fitted(part: Tensor | Pending, target: Edge, parts: int) -> Tensor | Pending:
    """Summed over the axes along which autograd broadcast, in the dtype of what it is the gradient of."""
    node, number = target
    meta = node._input_metadata[number]
    shape = _part(meta.shape, parts)
    if tuple(part.shape[1:]) == shape and part.dtype == meta.dtype:
        return part
    if isinstance(part, Pending):
        part = part.alone()
    extra = part.ndim - 1 - len(shape)
    if extra:
        part = part.sum(tuple(range(1, 1 + extra)))
    narrow = [i + 1 for i, n in enumerate(shape) if n == 1 and part.shape[i + 1] != 1]
    if narrow:
        part = part.sum(narrow, keepdim=True)
    return part.to(meta.dtype)


def _by_autograd(node: Any, grads: list[Tensor | None], parts: int) -> list[Tensor | None]:
    """The step's own backward pass for each cotangent, of whole batches: zeros for the rows that have no gradients."""
    present: list[bool] = []
    if parts > 1:
        grads = [g if g is None else _whole(g, parts) for g in grads]

    def backward(*given: Tensor) -> tuple[Tensor, ...]:
        parts = iter(given)
        filled = [None if g is None else next(parts) for g in grads]
        python = hasattr(node, "apply")
        found = node.apply(*filled) if python else node(*filled)
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        if python:  # one result for each argument, where the graph has only the tensors
            needed = (g for g, need in zip(found, node.needs_input_grad, strict=False) if need)
            found = [None if n is None else next(needed) for n, _ in node.next_functions]
        present[:] = [g is not None for g in found]
        return tuple(g for g in found if g is not None)

    given = [g for g in grads if g is not None]
    if len(given[0]) == 1:  # vmap's dispatch would cost as much as a small step
        results = [g[None] for g in backward(*(g[0] for g in given))]
    else:
        results = list(torch.func.vmap(backward)(*given))
    rest = iter(r if parts == 1 else r[:, : r.shape[1] // parts] for r in results)
    return [next(rest) if there else None for there in present]


def _whole(grad: Tensor, parts: int) -> Tensor:
    """A gradient of the first part of the batch as one of all, whose other rows are zero."""
    count, rows = grad.shape[:2]
    return torch.cat([grad, grad.new_zeros((count, (parts - 1) * rows, *grad.shape[2:]))], 1)


# ---- rules: (step, gradient of its only output, whether that is nobody else's) -> per input (gradient, the same)

_Part = tuple[Tensor | Pending | None, bool]
_Rule = Callable[[Any, Any, bool], "list[_Part] | None"]


def _axis(saved: int, grad: Tensor) -> int:
    """An axis of the step's output as one of its gradient, which has one more ahead."""
    axis = axis_of(saved)
    return axis + 1 if axis >= 0 else axis + grad.ndim


def _add(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part] | None:
    if node._saved_alpha != 1:
        return None
    alone = sum(n is not None for n, _ in node.next_functions) == 1
    if not alone and isinstance(grad, Pending):
        grad = grad.alone()
    return [(grad, own and alone)] * 2


def _multiply(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    wide = _plain(grad)
    first, second = (n is not None for n, _ in node.next_functions)
    return [
        (wide * _rows(node._saved_other, wide) if first else None, True),
        (wide * _rows(node._saved_self, wide) if second else None, True),
    ]


def _reshape(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    target, number = node.next_functions[0]
    whole = target._input_metadata[number].shape
    rows = math.prod(grad.shape[1:]) // max(1, math.prod(whole[1:]))
    shape = (grad.shape[0], rows, *whole[1:])
    if isinstance(grad, Pending) and grad.shape[-1] == shape[-1]:
        return [(grad.reshaped(shape), True)]
    plain = _plain(grad)
    return [(plain.reshape(shape), own)]


def _transpose(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    plain = _plain(grad)
    axes = _axis(node._saved_dim0, plain), _axis(node._saved_dim1, plain)
    return [(plain.transpose(*axes), own)]


def _pass(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    return [(grad, own)]


def _entered(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    """What the processes that share a model computed a part of, each: one sum for all cotangents."""
    if isinstance(grad, Pending):
        grad, own = grad.alone(), True
    return [(node.group.sum(grad, own), True)]


def _mm(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part] | None:
    if node.next_functions[1][0] is not None:
        return None
    plain = _plain(grad)
    return [(Pending.product(plain, node._saved_mat2.t()), True)]


def _addmm(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part] | None:
    bias, _, weight = (n for n, _ in node.next_functions)
    if bias is not None or weight is not None or node._saved_alpha != 1:
        return None
    plain = _plain(grad)
    return [(None, True), (Pending.product(plain, node._saved_mat2.t()), True)]


def _gelu(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    plain = _plain(grad)
    x, approximate = _spread(node._saved_self, plain), node._saved_approximate
    return [(torch.ops.aten.gelu_backward(plain, x, approximate=approximate), True)]


def _silu(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    plain = _plain(grad)
    return [(torch.ops.aten.silu_backward(plain, _spread(node._saved_self, plain)), True)]


def _relu(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    plain = _plain(grad)
    result = _spread(node._saved_result, plain)
    return [(torch.ops.aten.threshold_backward(plain, result, 0), True)]


def _tanh(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    plain = _plain(grad)
    return [(torch.ops.aten.tanh_backward(plain, _spread(node._saved_result, plain)), True)]


def _power(node: Any, grad: Tensor | Pending, own: bool) -> list[_Part]:
    plain = _plain(grad)
    x, exponent = _rows(node._saved_self, plain), node._saved_exponent
    return [(plain * (exponent * x.pow(exponent - 1)), True)]


# steps whose inputs may have another shape or dtype than their output
_BROADCAST = frozenset(("AddBackward0", "MulBackward0", "ToCopyBackward0"))
_RULES: dict[str, _Rule] = {
    "AddBackward0": _add,
    "MulBackward0": _multiply,
    "ViewBackward0": _reshape,
    "UnsafeViewBackward0": _reshape,
    "ReshapeAliasBackward0": _reshape,
    "UnsqueezeBackward0": _reshape,
    "TransposeBackward0": _transpose,
    "CloneBackward0": _pass,
    "AliasBackward0": _pass,
    "ToCopyBackward0": _pass,
    "_EnteredBackward": _entered,
    "_LeftBackward": _pass,
    "MmBackward0": _mm,
    "AddmmBackward0": _addmm,
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "ReluBackward0": _relu,
    "TanhBackward0": _tanh,
    "PowBackward0": _power,
}
