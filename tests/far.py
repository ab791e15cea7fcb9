"""A second device without a GPU: tensors that say they lie on it, computed on the CPU, and errors where devices mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAR = torch.device("lazy:1")
"""A type of device that torch knows and has no kernels for."""
# operations that take tensors of several devices on real ones too
_MIXING = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_")


class FarTensor(Tensor):
    """A tensor on FAR; `near` has its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device("meta"),
            dispatch_device=True,
        )

    def __init__(self, near: Tensor) -> None:
        self.near = near

    @property
    def device(self) -> torch.device:
        return FAR

    @property
    def is_meta(self) -> bool:
        return False

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if function is torch.ops.prim.device.default:
        return FAR
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in tensors if isinstance(x, FarTensor)]
    near = [x for x in tensors if not isinstance(x, FarTensor) and x.ndim > 0]
    name = function._schema.name
    if far and (near or (name == "aten::index_put_" and tensors[0] not in far)):
        indices = name.startswith("aten::index") and isinstance(tensors[0], FarTensor)
        if name not in _MIXING or (name.startswith("aten::index") and not indices):
            raise RuntimeError(f"{name} mixes devices: {[(x.device, *x.shape) for x in tensors]}")
    there = bool(far)
    if kwargs.get("device") is not None:
        there = kwargs["device"] == FAR
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = function(
        *tree_map_only(FarTensor, lambda x: x.near, args),
        **tree_map_only(FarTensor, lambda x: x.near, kwargs),
    )
    if name == "aten::copy_":
        return args[0]
    return tree_map_only(Tensor, FarTensor, found) if there else found


class FarDevice(TorchDispatchMode):
    """Inside, tensors can be made on FAR and moved there and back; counts the moves."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function._schema.name == "aten::_to_copy" and kwargs.get("device") is not None:
            self.moves[str(args[0].device), str(kwargs["device"])] += 1
        return _run(function, args, kwargs)


def send(module: nn.Module) -> None:
    """A module's weights to FAR; its inputs must be there."""
    for inner in module.modules():
        for name, p in inner._parameters.items():
            if p is not None:
                inner._parameters[name] = nn.Parameter(FarTensor(p.detach()), p.requires_grad)
        for name, b in inner._buffers.items():
            if b is not None:
                inner._buffers[name] = FarTensor(b)


def follow(module: nn.Module, device: Callable[[], torch.device]) -> None:
    """Whatever the module is given goes to a device first, as accelerate's hooks do it between layers."""

    def move(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(device()), (args, kwargs))

    module.register_forward_pre_hook(move, with_kwargs=True)
