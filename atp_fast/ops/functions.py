"""norm and rotate as differentiable functions, with adjoints of many cotangents for attribution.adjoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from atp_fast import ops
from atp_fast.ops.pending import Pending
from atp_fast.ops.reference import Norm


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, how: Norm, backend: str) -> Tensor:
    """`ops.norm`, differentiable by x. As with torch's functions, a TorchFunctionMode sees the call."""
    if x.ndim == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        # heads side by side in memory: so are the gradients then
        return norm(x.transpose(1, 2), weight, bias, how, backend).transpose(1, 2)
    if has_torch_function((x,)):
        return handle_torch_function(norm, (x,), x, weight, bias, how, backend)
    if x.requires_grad and torch.is_grad_enabled():
        return _Norm.apply(x, weight, bias, how, backend, None)  # type: ignore[no-untyped-call,no-any-return]
    return ops.norm(x, weight, bias, how=how, backend=backend)[0]


Normed = tuple[Tensor, Tensor | None, Tensor]


def given_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Norm, backend: str, *, given: Normed
) -> Tensor:
    """`norm`, whose result (y, mean, rstd) is known."""
    return _Norm.apply(x, weight, bias, how, backend, given)  # type: ignore[no-untyped-call,no-any-return]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: Norm,
        backend: str,
        given: Normed | None,
    ) -> Tensor:
        y, mean, rstd = given or ops.norm(x, weight, bias, how=how, backend=backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.how, ctx.backend = how, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (pending,) = _Norm.cotangents(ctx, grad[None])
        return pending.alone()[0], None, None, None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Pending]:
        x, weight, mean, rstd = ctx.saved_tensors

        def compute(before: Tensor | None, own: bool) -> Tensor:
            return ops.norm_vjp(
                x,
                weight,
                mean=mean,
                rstd=rstd,
                grad=grad,
                how=ctx.how,
                before=None if before is None else before.view(grad.shape),
                backend=ctx.backend,
            ).reshape(-1, x.shape[-1])

        return [Pending(tuple(grad.shape), x.dtype, compute)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    """`ops.rotate`, differentiable by x. As with torch's functions, a TorchFunctionMode sees the call."""
    if has_torch_function((x,)):
        return handle_torch_function(rotate, (x,), x, cos, sin, backend)
    if x.requires_grad and torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin, backend, None)  # type: ignore[no-untyped-call,no-any-return]
    return ops.rotate(x, cos, sin, backend=backend)


def given_rotation(value: Tensor, x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    """`rotate`, whose result is known."""
    return _Rotate.apply(x, cos, sin, backend, value)  # type: ignore[no-untyped-call,no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, backend: str, given: Tensor | None
    ) -> Tensor:
        ctx.cos, ctx.sin, ctx.backend = cos, sin, backend  # every layer's: no memory of this one's
        return ops.rotate(x, cos, sin, backend=backend) if given is None else given

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Rotate.cotangents(ctx, grad[None])[0][0], None, None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Tensor]:
        return [ops.rotate(grad, ctx.cos, ctx.sin, adjoint=True, backend=ctx.backend)]
