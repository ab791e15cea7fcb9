"""Rotation by position (RoPE), run as `ops.rotate`: one pass for queries, one for keys, and the same backward.

transformers has it as a function of each model's file, not as a module. It is exchanged there for as long as a layer
runs, and acts inside that run only; where it gives other numbers than `ops.rotate`, it stays what it is.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from atp_fast.hf.attention import running
from atp_fast.ops.functions import rotate
from atp_fast.ops.reference import rotate as definition

_NAME = "apply_rotary_pos_emb"
_lock = threading.Lock()
_users: dict[
    ModuleType, tuple[int, Any]
] = {}  # how many layers run, and the function that was there


def find_rotations(layer: nn.Module) -> list[ModuleType]:
    """The files whose rotation the layer's code may call."""
    files = {sys.modules[type(module).__module__] for module in layer.modules()}
    return [file for file in files if callable(vars(file).get(_NAME))]


@contextlib.contextmanager
def own_rotations(files: Sequence[ModuleType]) -> Iterator[None]:
    """Inside, a running layer's rotation is ours; the files are as they were when the last that is inside has left."""
    with _lock:
        for file in files:
            count, own = _users.get(file, (0, vars(file)[_NAME]))
            _users[file] = count + 1, own
            if count == 0:
                setattr(file, _NAME, functools.wraps(own)(functools.partial(_rotation, own)))
    try:
        yield
    finally:
        with _lock:
            for file in files:
                count, own = _users.pop(file)
                if count == 1:
                    setattr(file, _NAME, own)
                else:
                    _users[file] = count - 1, own


def _rotation(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = running.get()
    if run is None or kwargs or len(args) != 4 or not _fits(own, *args):
        return own(*args, **kwargs)
    q, k, *tables = args
    cos, sin = (x.expand(len(q), -1, -1) for x in tables)
    return tuple(rotate(x, cos, sin, run.backend) for x in (q, k))


def _fits(own: Callable[..., Any], q: Any, k: Any, cos: Any, sin: Any) -> bool:
    tensors = (q, k, cos, sin)
    if not all(isinstance(x, Tensor) and x.dtype == q.dtype for x in tensors):
        return False
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or sin.shape != cos.shape:
        return False
    if cos.shape[0] not in (1, len(q)) or cos.shape[1] != q.shape[2] or cos.shape[1] != k.shape[2]:
        return False
    return _same(own, q.shape[3], cos.shape[2], q.dtype)


@functools.cache
def _same(own: Callable[..., Any], head_dim: int, rotated: int, dtype: torch.dtype) -> bool:
    """Whether the function gives what ops.rotate is defined to give, on random numbers."""
    if rotated % 2 or rotated > head_dim:
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 3, head_dim), (1, 1, 3, head_dim), (1, 3, rotated), (1, 3, rotated))
    q, k, cos, sin = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    try:
        found = own(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    tolerance = 4 * torch.finfo(dtype).eps
    return all(
        y.shape == x.shape
        and bool((y - definition(x, cos, sin, False)).abs().max() <= tolerance * 8)
        for x, y in zip((q, k), found, strict=True)
    )
