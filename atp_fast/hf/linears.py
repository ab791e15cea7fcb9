"""A model's linear layers by the C++ backend's product, on the CPUs where that is faster than torch's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atp_fast import products
from atp_fast.ops import backends


@contextlib.contextmanager
def own_linears(model: nn.Module, device: torch.device, backend: str) -> Iterator[None]:
    """Inside, float32 linear layers whose weights need no gradient multiply by backend "cpp", if that is the backend.

    The model's own code is back at the end.
    """
    chosen = backends.backend_for(torch.empty(0, device=device), backend)
    if chosen != "cpp" or not products.own_products_are_faster():
        yield
        return
    layers = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    # accelerate fetches weights that are elsewhere, then calls what it keeps as _old_forward
    fetched = [m for m in layers if "_old_forward" in vars(m)]
    plain = [m for m in layers if "forward" not in vars(m)]  # not what another has switched
    before = [(m, "_old_forward", vars(m)["_old_forward"]) for m in fetched]
    try:
        for module, name, own in [*before, *((m, "forward", m.forward) for m in plain)]:
            setattr(module, name, functools.partial(_forward, module, own))
        yield
    finally:
        for module, name, own in before:
            setattr(module, name, own)
        for module in plain:
            vars(module).pop("forward", None)


def _forward(module: Any, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, weight)) and not (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not plain or 1 not in weight.stride():
        return own(x)
    return products.linear(x, weight.t() if isinstance(module, nn.Linear) else weight, bias)
