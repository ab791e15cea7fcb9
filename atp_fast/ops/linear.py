"""Linear layers by the C++ backend's product, with gradients by the input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import _disable_current_modes

from atp_fast.ops import backends
from atp_fast.ops.pending import Pending

Make = Callable[[torch.dtype], Tensor]
"""Makes a weight, (columns, depth), in the dtype it is called with."""


@functools.cache
def cpu_words() -> set[str]:
    """The words by which the system describes the CPU, its vendor and instructions among them; none where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return set(file.read().split())
    except OSError:
        return set()


@functools.cache
def own_products_are_faster() -> bool:
    """On AMD CPUs: there the C++ backend's are 0.94 to 2.7 times as fast as torch's (products.csv)."""
    return {"AuthenticAMD", "avx2"} <= cpu_words()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., depth) @ weight (depth, columns) + bias by the C++ backend, differentiable by x.

    float32 on the CPU; weight, one of whose strides is 1, and bias need no gradients. As with torch's functions, a
    TorchFunctionMode sees the call.
    """
    if has_torch_function((x,)):
        return handle_torch_function(linear, (x,), x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call,no-any-return]
    return own_product(x, weight, bias)


def own_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, depth = x.shape[:-1].numel(), x.shape[-1]
    if rows <= 8 and depth >= 8192:  # a metric's gradient by the logits: few tokens may have one
        used = x.reshape(rows, depth).any(0).nonzero().flatten()
        if len(used) <= depth // 8:
            return torch_product(x[..., used], weight[used], bias)
    if rows == 1:  # torch reads the weights no slower
        return torch_product(x, weight, bias)
    return backends.load("cpp").linear(x, weight, bias)  # type: ignore[no-any-return]


def torch_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x.flatten(0, -2), weight).reshape(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """own_product with a backward pass by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return own_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return own_product(grad, ctx.weight.t()), None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Pending]:
        return [Pending.product(grad, ctx.weight.t(), own_product)]


def made_linear(x: Tensor, make: Make, bias: Tensor | None, own: bool) -> Tensor:
    """x (..., depth) @ make(x.dtype).T + bias, differentiable by x.

    The weight lives as long as it is multiplied: it is made again for gradients, and no graph holds it. own: by
    `own_product` instead of torch's. As with torch's functions, a TorchFunctionMode sees the call.
    """
    if has_torch_function((x,)):
        return handle_torch_function(made_linear, (x,), x, make, bias, own)
    if x.requires_grad and torch.is_grad_enabled():
        return _MadeLinear.apply(x, make, bias, own)  # type: ignore[no-untyped-call,no-any-return]
    return (own_product if own else torch_product)(x, weight_of(make, x.dtype).t(), bias)


def weight_of(make: Make, dtype: torch.dtype) -> Tensor:
    """The weight made, unseen by modes such as those that count what activations take."""
    with _disable_current_modes():
        return make(dtype)


class _MadeLinear(torch.autograd.Function):
    """made_linear with a backward pass by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Make, bias: Tensor | None, own: bool) -> Tensor:
        ctx.make, ctx.own, ctx.depth = make, own, x.shape[-1]
        return (own_product if own else torch_product)(x, weight_of(make, x.dtype).t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _MadeLinear.cotangents(ctx, grad[None])[0].alone()[0], None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Pending]:
        make = functools.partial(weight_of, ctx.make, grad.dtype)
        return [Pending.made_product(grad, make, ctx.depth, own_product if ctx.own else None)]
