"""The ops on the CPU: allocates, passes addresses and strides to atp_fast._C, keeps tensors alive meanwhile.

Results carry no autograd graph; the ops are called on plain tensors (see reference.py for what they compute).
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_fast import _C
from atp_fast.ops.reference import accumulation_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _passed(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """(address, dtype, strides) of a tensor, the only way by which one reaches the extension."""
    if x.device.type != "cpu" or x.layout != torch.strided:
        raise ValueError(f"backend 'cpp' needs strided CPU tensors, got {x.layout} on {x.device}")
    if x.is_neg():
        raise ValueError("backend 'cpp' needs resolved tensors, got one with the negative bit set")
    return x.data_ptr(), _DTYPES[x.dtype], x.stride()


def node_effects(delta: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
    """I = sum over the last axis of delta * grad, per cotangent; with weights, sum over C of w |I|.

    grad may have another dtype than delta as long as both accumulate in the same one.
    """
    dtype = accumulation_dtype(delta)
    if weights is not None:
        weights = weights.to(dtype).contiguous()
    shape = grad.shape[:-1] if weights is None else delta.shape[:-1]
    out = torch.empty(shape, dtype=dtype)
    _C.node_effects(
        grad.shape,
        _passed(delta),
        _passed(grad),
        0 if weights is None else weights.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
