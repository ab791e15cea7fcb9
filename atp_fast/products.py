"""How the sweep's matrix products are computed: the faster float32 path of the CPU, and bfloat16 for cotangents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRECISIONS = (None, "bf16")


def check_precision(precision: str | None) -> str | None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None or 'bf16', got {precision!r}")
    return precision


@functools.cache
def cpu_words() -> set[str]:
    """The words by which the system describes the CPU, its vendor and instructions among them; none where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return set(file.read().split())
    except OSError:
        return set()


@functools.cache
def _onednn_float32_is_faster() -> bool:
    """Whether oneDNN's products should stand in for the default ones: on AMD, if they really are float32.

    The only switch to oneDNN's products is to allow it bfloat16 inside; CPUs with bfloat16 matrix units (AMX) take it
    at its word. So the error is looked at: bfloat16 would be off by 1e-3, float32 by 1e-7.
    """
    if "AuthenticAMD" not in cpu_words():
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):  # type: ignore[no-untyped-call]
        return False  # the switch came with torch 2.9
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    with _onednn():
        product = a @ b
    exact = a.double() @ b.double()
    return float((product - exact).abs().max() / exact.abs().max()) < 1e-5


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        yield
    finally:
        settings.fp32_precision = before


def fast_products(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which float32 products on this device take the fastest path that is still float32."""
    if device.type == "cpu" and _onednn_float32_is_faster():
        return _onednn()
    return contextlib.nullcontext()


@functools.cache
def _multiplies_bfloat16(device_type: str) -> bool:
    """Whether products of bfloat16 are the device's own; on a CPU without, torch takes several times float32's time."""
    return device_type != "cpu" or bool(cpu_words() & {"avx512_bf16", "amx_bf16", "bf16"})


class _NarrowProduct(torch.autograd.Function):
    """x @ weight (+ bias), whose backward product is of bfloat16 numbers with float32 accumulation.

    Where the device has no such product, the rounded numbers of a float32 model are multiplied as float32, which holds
    them exactly.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, narrow: Tensor, bias: Tensor | None) -> Tensor:
        ctx.narrow = narrow
        return (
            x @ weight
            if bias is None
            else torch.addmm(bias, x.flatten(0, -2), weight).reshape(*x.shape[:-1], -1)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rounded, narrow = grad.to(torch.bfloat16), ctx.narrow.t()
        if grad.dtype.itemsize > 2 and not _multiplies_bfloat16(grad.device.type):
            rounded, narrow = rounded.to(grad.dtype), narrow.to(grad.dtype)
        return (rounded @ narrow).to(grad.dtype), None, None, None


class NarrowCotangents(TorchFunctionMode):
    """Inside, linear layers are recorded so that their cotangents' products run in bfloat16.

    The forward values do not change. Weights are rounded once per recorded layer; products that are no
    torch.nn.functional.linear or addmm with a fixed matrix stay as they are.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            x, weight, bias = _linear(*args, **kwargs)
            if not weight.requires_grad:
                return _NarrowProduct.apply(x, weight.t(), weight.to(torch.bfloat16).t(), bias)  # type: ignore[no-untyped-call]
        if function is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if not weight.requires_grad:
                return _NarrowProduct.apply(x, weight, weight.to(torch.bfloat16), bias)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of torch.nn.functional.linear, in order."""
    return input, weight, bias
