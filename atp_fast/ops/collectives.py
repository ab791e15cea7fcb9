"""Sums and parts of tensors over the processes that share one model, as differentiable functions.

A sum in one direction is nothing in the other: what all processes hold alike goes into a product with each one's weights
(`entered`: its gradient is summed), and what they sum up they then hold alike (`left`). One sum takes all cotangents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """The processes that share one model's weights; `rank` is this one's number among `size`."""

    def __init__(self, handle: dist.ProcessGroup, device: torch.device) -> None:
        self.handle, self.device = handle, device
        self.size, self.rank = dist.get_world_size(handle), dist.get_rank(handle)

    def sum(self, x: Tensor, own: bool = False) -> Tensor:
        """The sum of all processes' x, the same bits in each; x may be overwritten where it is nobody else's (own)."""
        total = x if own and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.handle)
        return total

    def parts(self, x: Tensor) -> list[Tensor]:
        """All processes' x, which have one shape, in their order."""
        found = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        dist.all_gather(found, x.contiguous(), group=self.handle)
        return found

    def mine(self, x: Tensor) -> Tensor:
        """This process's part of x's last dimension."""
        return x.chunk(self.size, -1)[self.rank]

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers; NaN if one is."""
        return max((float(x) for x in self.told(number)), key=lambda x: (x != x, x))

    def told(self, what: Any) -> list[Any]:
        """What every process tells, in their order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, what, group=self.handle)
        return found


def entered(x: Tensor, group: Group) -> Tensor:
    """x, the same in every process, on its way into what each computes a part of: the gradient is the sum of theirs."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Entered.apply(x, group)  # type: ignore[no-untyped-call,no-any-return]
    return x


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grad), None


def left(x: Tensor, group: Group) -> Tensor:
    """The sum of every process's x."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Left.apply(x, group)  # type: ignore[no-untyped-call,no-any-return]
    return group.sum(x)


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def joined(x: Tensor, group: Group) -> Tensor:
    """Every process's x side by side along the last dimension, which all then hold alike."""
    return _Joined.apply(x, group)  # type: ignore[no-untyped-call,no-any-return]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return torch.cat(group.parts(x), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.mine(grad), None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Tensor]:
        return [ctx.group.mine(grad).clone()]


def parted(x: Tensor, group: Group) -> Tensor:
    """This process's part of the last dimension of x, which all hold alike; the gradient is put together again."""
    return _Parted.apply(x, group)  # type: ignore[no-untyped-call,no-any-return]


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.mine(x).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat(ctx.group.parts(grad), -1), None

    @staticmethod
    def cotangents(ctx: Any, grad: Tensor) -> list[Tensor]:
        return [torch.cat(ctx.group.parts(grad), -1)]
