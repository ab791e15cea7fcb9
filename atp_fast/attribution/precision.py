"""Cotangents in bfloat16: a layer's linear maps multiply rounded gradients, its forward values stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from atp_fast.ops.linear import (
    Make,
    cpu_words,
    linear,
    made_linear,
    own_product,
    torch_product,
    weight_of,
)
from atp_fast.ops.pending import Pending

PRECISIONS = (None, "bf16")


def check_precision(precision: str | None) -> str | None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None or 'bf16', got {precision!r}")
    return precision


@functools.cache
def _multiplies_bfloat16(device_type: str) -> bool:
    """Whether products of bfloat16 are the device's own; on a CPU without, torch takes several times float32's time."""
    return device_type != "cpu" or bool(cpu_words() & {"avx512_bf16", "amx_bf16", "bf16"})


class _NarrowProduct(torch.autograd.Function):
    """x @ weight (+ bias), whose backward product is of bfloat16 numbers with float32 accumulation.

    Where the device has no such product, the rounded numbers of a float32 model are multiplied as float32, which holds
    them exactly. narrow: gives the weight in bfloat16; own: by `linear`'s product, which is float32's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        narrow: Callable[[], Tensor],
        bias: Tensor | None,
        own: bool,
    ) -> Tensor:
        ctx.narrow, ctx.own, ctx.depth = narrow, own, x.shape[-1]
        return (own_product if own else torch_product)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (product,) = _NarrowProduct.cotangents(ctx, grad[None])
        alone = product.alone() if isinstance(product, Pending) else product
        return alone[0], None, None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Pending | Tensor]:
        rounded, narrow = grad.to(torch.bfloat16), ctx.narrow
        if grad.dtype.itemsize > 2 and not _multiplies_bfloat16(grad.device.type):
            multiply = own_product if ctx.own else None
            wide = rounded.to(grad.dtype)
            return [
                Pending.made_product(wide, lambda: narrow().t().to(grad.dtype), ctx.depth, multiply)
            ]
        product = Pending.made_product(rounded, lambda: narrow().t(), ctx.depth)
        return [product if grad.dtype == torch.bfloat16 else product.alone().to(grad.dtype)]


class NarrowCotangents(TorchFunctionMode):
    """Inside, linear layers are recorded so that their cotangents' products run in bfloat16.

    The forward values do not change. Weights are rounded once per recorded layer, those that are made when they are needed
    each time; products that are no `linear`, `made_linear`, torch.nn.functional.linear or addmm with a fixed matrix stay as
    they are.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is made_linear:
            x, make, bias, own = args
            made = functools.partial(_rounded, make, x.dtype)
            return _NarrowProduct.apply(x, weight_of(make, x.dtype).t(), made, bias, own)  # type: ignore[no-untyped-call]
        call = None
        if function is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            call = x, weight.t(), bias
        elif function is torch.addmm and len(args) == 3 and not kwargs:
            call = args[1], args[2], args[0]
        elif function is linear:
            call = args
        if call is None or call[1].requires_grad:
            return function(*args, **kwargs)
        x, weight, bias = call
        narrow = weight.to(torch.bfloat16)
        return _NarrowProduct.apply(x, weight, lambda: narrow, bias, function is linear)  # type: ignore[no-untyped-call]


def _rounded(make: Make, dtype: torch.dtype) -> Tensor:
    """The weight made in its layer's dtype, rounded, (depth, columns)."""
    return weight_of(make, dtype).to(torch.bfloat16).t()


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of torch.nn.functional.linear, in order."""
    return input, weight, bias
