"""A model's linear layers by the C++ backend's product, on the CPUs where that is faster than torch's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atp_fast.ops import backends
from atp_fast.products import cpu_words


@functools.cache
def own_products_are_faster() -> bool:
    """On AMD CPUs without AVX-512: 1.2 to 2 times there (bench/README.md), slower than oneDNN's with AVX-512."""
    words = cpu_words()
    return "AuthenticAMD" in words and "avx2" in words and "avx512f" not in words


@contextlib.contextmanager
def own_linears(model: nn.Module, device: torch.device, backend: str) -> Iterator[None]:
    """Inside, float32 linear layers whose weights need no gradient multiply by backend "cpp", if that is the backend.

    Their gradients by the input can be taken, under torch.func.vmap too. The model's own code is back at the end.
    """
    chosen = backends.backend_for(torch.empty(0, device=device), backend)
    if chosen != "cpp" or not own_products_are_faster():
        yield
        return
    _register()
    # not what another has switched, such as accelerate, whose weights may be elsewhere
    switched = [
        m for m in model.modules() if type(m) in (nn.Linear, Conv1D) and "forward" not in vars(m)
    ]
    try:
        for module in switched:
            module.forward = functools.partial(_forward, module, module.forward)
        yield
    finally:
        for module in switched:
            vars(module).pop("forward", None)


def _forward(module: Any, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    plain = all(
        t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, weight)
    ) and not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if not plain or 1 not in weight.stride():
        return own(x)
    weight = weight.t() if isinstance(module, nn.Linear) else weight
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call,no-any-return]
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., depth) @ weight (depth, columns) + bias."""
    if x.numel() == x.shape[-1]:  # one row, where torch's product reads the weights no slower
        y = x @ weight
        return y if bias is None else y.add_(bias)
    return backends.load("cpp").linear(x, weight, bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """_product, differentiable by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # an operator, since vmap over cotangents hands in a tensor without an address
        return torch.ops.atp_fast.linear_product(grad, ctx.weight.t()), None, None


@functools.cache
def _register() -> torch.library.Library:
    """Define the operator linear_product; it lives as long as what this returns."""
    library = torch.library.Library("atp_fast", "FRAGMENT")
    library.define("linear_product(Tensor x, Tensor weight) -> Tensor")
    library.impl("linear_product", _product, "CPU")

    def over_rows(info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Tensor) -> Any:
        assert dims[0] is not None and dims[1] is None
        return _product(x.movedim(dims[0], 0), weight), 0

    torch.library.register_vmap("atp_fast::linear_product", over_rows, lib=library)
    return library
