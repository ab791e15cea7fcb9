"""Activation functions that a model spells out in single operations, run as torch's fused ones.

GPT-2's gelu is nine operations: nine passes over all neurons forward, more for every cotangent backward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import AccurateGELUActivation, NewGELUActivation

from atp_fast.hf.attention import running
from atp_fast.hf.switching import Function, switched

_tanh_gelu = functools.partial(F.gelu, approximate="tanh")
_FUSED: dict[type[nn.Module], Function] = {
    NewGELUActivation: _tanh_gelu,
    AccurateGELUActivation: _tanh_gelu,
}


def find_activations(layer: nn.Module) -> list[nn.Module]:
    """The layer's activation functions that have a fused form."""
    return [module for module in layer.modules() if type(module) in _FUSED]


def fused(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Inside, these activations of running layers are fused; the model's own code is back at the end."""
    own = [(m, "forward") for m in modules if "forward" not in vars(m)]  # not another's
    return switched(own, lambda m, f: functools.partial(_forward, f, _FUSED[type(m)]))


def _forward(own: Function, function: Function, x: Tensor) -> Tensor:
    # narrow types are rounded where the model rounds them
    return function(x) if x.dtype.itemsize >= 4 and running.get() is not None else own(x)
