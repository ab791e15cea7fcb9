"""A layer's LayerNorms and RMSNorms, run as `ops.norm`: one pass forward, one for each cotangent backward.

An RMSNorm has no class of its own in transformers: what has one vector of weights and an eps is tried on random rows, and is
taken for one where it gives the same numbers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atp_fast.hf.attention import running
from atp_fast.hf.switching import Function, own_forwards, switched
from atp_fast.ops import Norm
from atp_fast.ops.functions import norm
from atp_fast.ops.reference import norm as definition

_KINDS = [(rounded, offset) for rounded in (False, True) for offset in (0.0, 1.0)]


class FoundNorm(NamedTuple):
    """A module, and what it computes."""

    module: nn.Module
    how: Norm


def find_norms(layer: nn.Module) -> list[FoundNorm]:
    """The layer's norms that `ops.norm` computes."""
    found = ((module, _recognised(module)) for module in layer.modules())
    return [FoundNorm(module, how) for module, how in found if how is not None]


def own_norms(norms: Sequence[FoundNorm], backend: str) -> AbstractContextManager[None]:
    """Inside, these norms of running layers are the backend's; the model's own code is back at the end."""
    kinds = {found.module: found.how for found in norms}
    mine = own_forwards(kinds)
    return switched(mine, lambda m, own: functools.partial(_forward, m, own, kinds[m], backend))


def _forward(
    module: Any, own: Function, how: Norm, backend: str, x: Tensor, *more: Any, **named: Any
) -> Tensor:
    if running.get() is None or more or named:  # a gate, say: it was recognised without one
        return own(x, *more, **named)
    weight, bias = module.weight, getattr(module, "bias", None)
    plain = x.dtype == weight.dtype and x.device == weight.device and 2 <= x.ndim <= 4
    if not plain or weight.requires_grad or x.shape[-1:] != weight.shape:
        return own(x)
    return norm(x, weight, bias, how, backend)


def _recognised(module: nn.Module) -> Norm | None:
    if type(module) is nn.LayerNorm:
        affine = module.elementwise_affine and len(module.normalized_shape) == 1
        return Norm(module.eps, centred=True) if affine else None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters()]
    if names != ["weight"] or not isinstance(eps, float) or any(True for _ in module.buffers()):
        return None
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    if weight.ndim != 1 or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)
    if weight.is_meta:  # fetched when the layer runs: the code is tried on other numbers
        weight = torch.randn(len(weight), generator=generator).to(weight.dtype)
        module = copy.copy(module)
        module._parameters = {"weight": nn.Parameter(weight)}
    rows = torch.randn(4, len(weight), generator=generator)
    # rows as small as eps tell where it is added
    x = (rows * torch.tensor([[eps**0.5], [0.1], [1.0], [30.0]])).to(weight)
    try:
        with torch.no_grad():
            own = type(module).forward(module, x)
    except Exception:  # any code may stand there, which wants other arguments
        return None
    if not isinstance(own, Tensor) or own.shape != x.shape or own.dtype != x.dtype:
        return None
    kinds = [Norm(eps, rounded=rounded, offset=offset) for rounded, offset in _KINDS]
    errors = [float((definition(x, weight, None, how)[0] - own).abs().max()) for how in kinds]
    best = min(errors)
    fits = best <= 4 * torch.finfo(x.dtype).eps * float(own.abs().max())
    return kinds[errors.index(best)] if fits else None
