"""norm and rotate as differentiable functions, with adjoints of many cotangents for attribution.adjoint.

Cotangents may be those of the first rows of the batch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.ops.pending import Pending
from atp_fast.ops.reference import Norm


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, how: Norm, backend: str) -> Tensor:
    """`ops.norm`, differentiable by x."""
    if x.ndim == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        # heads side by side in memory: so are the gradients then
        return norm(x.transpose(1, 2), weight, bias, how, backend).transpose(1, 2)
    if x.requires_grad and torch.is_grad_enabled():
        return _Norm.apply(x, weight, bias, how, backend)  # type: ignore[no-untyped-call,no-any-return]
    return ops.norm(x, weight, bias, how=how, backend=backend)[0]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: Norm,
        backend: str,
    ) -> Tensor:
        y, mean, rstd = ops.norm(x, weight, bias, how=how, backend=backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.how, ctx.backend = how, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (pending,) = _Norm.cotangents(ctx, grad[None])
        return pending.alone()[0], None, None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Pending]:
        x, weight, mean, rstd = ctx.saved_tensors
        rows = grad.shape[1]
        x, rstd, mean = x[:rows], rstd[:rows], None if mean is None else mean[:rows]

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
    """`ops.rotate`, differentiable by x."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin, backend)  # type: ignore[no-untyped-call,no-any-return]
    return ops.rotate(x, cos, sin, backend=backend)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
        ctx.cos, ctx.sin, ctx.backend = cos, sin, backend  # every layer's: no memory of this one's
        return ops.rotate(x, cos, sin, backend=backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rotate.cotangents(ctx, grad[None])[0][0], None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Tensor]:
        cos, sin = (x[: grad.shape[1]] for x in (ctx.cos, ctx.sin))
        return [ops.rotate(grad, cos, sin, adjoint=True, backend=ctx.backend)]
