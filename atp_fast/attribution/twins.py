"""Both prompts through a layer in one forward, and the clean one's graph afterwards, without computing it again.

The forward of both notes what the layer's products, norms, rotations and attention give. The layer then runs on the clean
prompt alone under autograd, and each of them takes its half of what was noted: the graph holds the clean half only, and the
products are those of one batch. Sums and activations are computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from atp_fast import ops
from atp_fast.hf import LayerArguments, LayerRun, Plug
from atp_fast.ops.collectives import given_left, left
from atp_fast.ops.functions import given_norm, given_rotation, norm, rotate
from atp_fast.ops.linear import Make, linear, made_linear, own_product, weight_of
from atp_fast.ops.pending import Pending

Noted = tuple[Callable[..., Any], tuple[Tensor | None, ...]]


@dataclass
class Twins:
    """A layer's run on two prompts in one batch: its output, and what its functions and its attention gave."""

    out: Tensor
    run: LayerRun
    noted: list[Noted]

    def attention(self, rows: int) -> tuple[Tensor, ops.AttentionStats]:
        """z and the statistics of the first rows."""
        z, stats = self.run.z, self.run.stats
        assert z is not None and stats is not None
        return z[:rows], stats.rows(rows)


def run_twins(
    plug: Plug, number: int, both: Tensor, arguments: LayerArguments, run: LayerRun
) -> Twins:
    """A layer on the clean and the corrupted prompts' inputs, one behind the other, without a graph."""
    with torch.no_grad(), Noting() as noting:
        out = plug.run_layer(number, both, arguments, run)
    return Twins(out, run, noting.noted)


class Noting(TorchFunctionMode):
    """Inside, results of the functions that `Given` knows are noted, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Noted] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is norm:
            x, weight, bias, how, backend = args
            found = ops.norm(x, weight, bias, how=how, backend=backend)
            self.noted.append((norm, found))
            return found[0]
        result = function(*args, **kwargs)
        if function in _ACTIVATIONS or (function in _KNOWN and not kwargs):
            self.noted.append((function, (result,)))
        return result


class Given(TorchFunctionMode):
    """Inside, these functions take the first half of what was noted instead of computing it."""

    def __init__(self, noted: list[Noted]) -> None:
        super().__init__()
        self._noted = iter(noted)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        activation = _ACTIVATIONS.get(function)
        if activation is None and (kwargs or (function not in _KNOWN and function is not norm)):
            return function(*args, **kwargs)
        known, values = next(self._noted, (None, ()))
        x = args[1] if function is torch.addmm else args[0]
        if known is not function or values[0] is None or len(values[0]) != 2 * len(x):
            raise RuntimeError(f"a layer called {function.__name__} where it had not before")
        value = values[0][: len(x)]
        if function is norm:
            mean, rstd = (None if v is None else v[: len(x)] for v in values[1:])
            assert rstd is not None
            return given_norm(*args, given=(value, mean, rstd))
        if activation is not None:
            return _GivenActivation.apply(x, value, activation, kwargs)  # type: ignore[no-untyped-call]
        return _KNOWN[function](value, *args)


class _GivenProduct(torch.autograd.Function):
    """`value`, which is x @ the transpose of what `back` gives (and a bias); multiply: the product for gradients, torch's if
    None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, back: Callable[[], Tensor], value: Tensor, multiply: Any
    ) -> Tensor:
        ctx.back, ctx.multiply, ctx.depth = back, multiply, x.shape[-1]
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _GivenProduct.cotangents(ctx, grad[None])[0].alone()[0], None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Pending]:
        return [Pending.made_product(grad, ctx.back, ctx.depth, ctx.multiply)]


class _GivenActivation(torch.autograd.Function):
    """`value`, which is an activation of x; backward: torch's function of (gradient, x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, backward: Any, options: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope, ctx.options = backward, options
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _GivenActivation.cotangents(ctx, grad[None])[0][0], None, None, None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Tensor]:
        (x,) = ctx.saved_tensors
        return [ctx.slope(grad, x.expand_as(grad), ctx.options)]


def _gelu_slope(grad: Tensor, x: Tensor, options: dict[str, Any]) -> Any:
    return torch.ops.aten.gelu_backward(grad, x, approximate=options.get("approximate", "none"))


def _silu_slope(grad: Tensor, x: Tensor, options: dict[str, Any]) -> Any:
    return torch.ops.aten.silu_backward(grad, x)


_ACTIVATIONS: dict[Callable[..., Any], Callable[[Tensor, Tensor, dict[str, Any]], Any]] = {
    F.gelu: _gelu_slope,
    F.silu: _silu_slope,
}


def _linear(value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _GivenProduct.apply(x, lambda: weight, value, None)  # type: ignore[no-untyped-call]


def _own_linear(value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _GivenProduct.apply(x, weight.t, value, own_product)  # type: ignore[no-untyped-call]


def _made_linear(value: Tensor, x: Tensor, make: Make, bias: Tensor | None, own: bool) -> Any:
    back = functools.partial(weight_of, make, x.dtype)
    return _GivenProduct.apply(x, back, value, own_product if own else None)  # type: ignore[no-untyped-call]


def _addmm(value: Tensor, bias: Tensor, x: Tensor, weight: Tensor) -> Any:
    return _GivenProduct.apply(x, weight.t, value, None)  # type: ignore[no-untyped-call]


_KNOWN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    linear: _own_linear,
    made_linear: _made_linear,
    torch.addmm: _addmm,
    rotate: given_rotation,
    left: given_left,
}
