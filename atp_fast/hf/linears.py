"""A model's linear layers by the C++ backend's product, on the CPUs where that is faster than torch's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atp_fast.hf.switching import Function, own_forwards, switched
from atp_fast.ops import backends
from atp_fast.ops.linear import Make, linear, made_linear, own_products_are_faster


def find_linears(model: nn.Module) -> list[nn.Module]:
    """The model's linear layers."""
    return [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]


def own_linears(
    modules: Sequence[nn.Module], device: torch.device, backend: str
) -> AbstractContextManager[None]:
    """Inside, float32 linear layers whose weights need no gradient multiply by backend "cpp", if that is the backend.

    The model's own code is back at the end.
    """
    if not _are_own(torch.empty(0, device=device), backend):
        return nullcontext()
    own = own_forwards(modules)
    return switched(own, lambda module, forward: functools.partial(_forward, module, forward))


def mapped(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x @ weight.T + bias, as nn.Linear with this weight (outputs, inputs) would be run inside `own_linears`."""
    if _are_own(x, backend) and _can_be_own(x, weight, bias):
        return linear(x, weight.t(), bias)
    return F.linear(x, weight, bias)


def made(x: Tensor, make: Make, bias: Tensor | None, backend: str) -> Tensor:
    """x @ make(x.dtype).T + bias by the product that `mapped` would take; the weight lives as long as it is multiplied."""
    own = x.dtype == torch.float32 and x.device.type == "cpu" and _are_own(x, backend)
    return made_linear(x, make, None if bias is None else bias.detach().to(x.dtype), own)


def _are_own(x: Tensor, backend: str) -> bool:
    return own_products_are_faster() and backends.backend_for(x, backend) == "cpp"


def _can_be_own(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    float32 = x.dtype == weight.dtype == torch.float32
    on_cpu = x.device.type == weight.device.type == "cpu"
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return float32 and on_cpu and not trained and 1 in weight.stride()


def _forward(module: Any, own: Function, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if not _can_be_own(x, weight, bias):
        return own(x)
    return linear(x, weight.t() if isinstance(module, nn.Linear) else weight, bias)
