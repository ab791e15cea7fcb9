"""How the sweep's matrix products are computed: the fastest float32 path of the CPU, and bfloat16 for cotangents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from atp_fast.ops import backends

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
def own_products_are_faster() -> bool:
    """On AMD CPUs without AVX-512: there the C++ backend's are 0.94 to 2.7 times as fast as torch's (products.csv)."""
    words = cpu_words()
    return "AuthenticAMD" in words and "avx2" in words and "avx512f" not in words


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., depth) @ weight (depth, columns) + bias by the C++ backend, differentiable by x, also under torch.func.vmap.

    float32 on the CPU; weight, one of whose strides is 1, and bias need no gradients. As with torch's functions, a
    TorchFunctionMode sees the call.
    """
    if has_torch_function((x,)):
        return handle_torch_function(linear, (x,), x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call,no-any-return]
    return _own_product(x, weight, bias)


def _own_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, depth = x.shape[:-1].numel(), x.shape[-1]
    if rows <= 8 and depth >= 8192:  # a metric's gradient by the logits: few tokens may have one
        used = x.reshape(rows, depth).any(0).nonzero().flatten()
        if len(used) <= depth // 8:
            return _torch_product(x[..., used], weight[used], bias)
    if rows == 1:  # torch reads the weights no slower
        return _torch_product(x, weight, bias)
    return backends.load("cpp").linear(x, weight, bias)  # type: ignore[no-any-return]


def _torch_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x.flatten(0, -2), weight).reshape(*x.shape[:-1], -1)


def _linear_product(x: Tensor, weight: Tensor) -> Tensor:
    """_own_product as an operator of torch: vmap over cotangents hands in tensors without addresses."""
    _operators()
    return torch.ops.atp_fast.linear_product(x, weight)  # type: ignore[no-any-return]


@functools.cache
def _operators() -> torch.library.Library:
    """Defines the operator, which lives as long as what this returns."""
    library = torch.library.Library("atp_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("linear_product(Tensor x, Tensor weight) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("linear_product", _own_product, "CPU")  # type: ignore[no-untyped-call]

    def over_rows(info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Tensor) -> Any:
        assert dims[0] is not None and dims[1] is None
        return _own_product(x.movedim(dims[0], 0), weight), 0

    torch.library.register_vmap("atp_fast::linear_product", over_rows, lib=library)
    return library


class _Linear(torch.autograd.Function):
    """_own_product with a backward pass by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _own_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _linear_product(grad, ctx.weight.t()), None, None


@functools.cache
def _multiplies_bfloat16(device_type: str) -> bool:
    """Whether products of bfloat16 are the device's own; on a CPU without, torch takes several times float32's time."""
    return device_type != "cpu" or bool(cpu_words() & {"avx512_bf16", "amx_bf16", "bf16"})


class _NarrowProduct(torch.autograd.Function):
    """x @ weight (+ bias), whose backward product is of bfloat16 numbers with float32 accumulation.

    Where the device has no such product, the rounded numbers of a float32 model are multiplied as float32, which holds
    them exactly. own: by `linear`'s product, which is float32's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, narrow: Tensor, bias: Tensor | None, own: bool
    ) -> Tensor:
        ctx.narrow, ctx.own = narrow, own
        return (_own_product if own else _torch_product)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        rounded, narrow = grad.to(torch.bfloat16), ctx.narrow.t()
        if grad.dtype.itemsize == 2 or _multiplies_bfloat16(grad.device.type):
            product = (rounded @ narrow).to(grad.dtype)
        else:
            multiply = _linear_product if ctx.own else torch.matmul
            product = multiply(rounded.to(grad.dtype), narrow.to(grad.dtype))
        return product, None, None, None, None


class NarrowCotangents(TorchFunctionMode):
    """Inside, linear layers are recorded so that their cotangents' products run in bfloat16.

    The forward values do not change. Weights are rounded once per recorded layer; products that are no `linear`,
    torch.nn.functional.linear or addmm with a fixed matrix stay as they are.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
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
        return _NarrowProduct.apply(x, weight, narrow, bias, function is linear)  # type: ignore[no-untyped-call]


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of torch.nn.functional.linear, in order."""
    return input, weight, bias
