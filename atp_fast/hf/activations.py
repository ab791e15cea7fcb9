"""Activation functions that a model spells out in single operations, run as torch's fused ones.

GPT-2's gelu is nine operations: nine passes over all neurons forward, more for every cotangent backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import AccurateGELUActivation, NewGELUActivation

_tanh_gelu = functools.partial(F.gelu, approximate="tanh")
_FUSED: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    NewGELUActivation: _tanh_gelu,
    AccurateGELUActivation: _tanh_gelu,
}


def find_activations(layer: nn.Module) -> list[nn.Module]:
    """The layer's activation functions that have a fused form."""
    return [module for module in layer.modules() if type(module) in _FUSED]


@contextlib.contextmanager
def fused(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these activations run fused; the model's own code is back at the end."""
    switched = [m for m in modules if "forward" not in vars(m)]  # not what another has switched
    try:
        for module in switched:
            own: Callable[[Tensor], Tensor] = module.forward
            module.forward = functools.partial(_forward, own, _FUSED[type(module)])
        yield
    finally:
        for module in switched:
            vars(module).pop("forward", None)


def _forward(
    own: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    # narrow types are rounded where the model rounds them
    return function(x) if x.dtype.itemsize >= 4 else own(x)
