"""What a CUDA graph does, on a CPU: the operations of a function recorded, and repeated on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from atp_fast import Attribution

T = TypeVar("T")


class HostRead(RuntimeError):
    """The host read what a recording computes."""


class Recorder:
    """attribution.graphs.Graphs for CPU tensors: every operation that torch dispatches is noted with its tensors, and repeated
    into the same ones. As on a GPU, recording computes nothing: what was there is put back, what is new is NaN.

    What runs without torch's dispatcher, such as the C++ backend, is not seen; so it is for backend "reference".
    """

    def __init__(self, device: torch.device) -> None:
        self.parts: list[_Part] = []
        self.made: dict[int, Tensor] = {}  # by address, what the recordings have allocated
        self.replays = 0

    def capture(self, function: Callable[[], T]) -> T:
        part = _Part(self.made)
        try:
            with part:
                found = function()
        finally:
            part.forget()
        self.parts.append(part)
        return found

    def replay(self, part: int) -> None:
        self.replays += 1
        self.parts[part].repeat()

    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.made.values())


class _Part(TorchDispatchMode):
    def __init__(self, made: dict[int, Tensor]) -> None:
        super().__init__()
        self.made = made
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if torch.Tag.data_dependent_output in function.tags and any(map(self.is_made, given)):
            raise HostRead(str(function))
        inside = {address(x) for x in given}
        if function._schema.is_mutable:
            for x in _written(function, args, kwargs):
                if not self.is_made(x) and address(x) not in self.before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                    self.before[address(x)] = whole, whole.clone()
        result = function(*args, **kwargs)
        new = [x for x in _tensors(result) if address(x) not in inside]
        for x in new:
            self.made[address(x)] = x.data  # keeps the memory
        plain = tree_map(lambda x: x.data if isinstance(x, Tensor) else x, (args, kwargs))
        empty = "empty" in function._schema.name  # what is there stays there
        if (new and not empty) or function._schema.is_mutable:
            self.steps.append((function, *plain, [x.data for x in _tensors(result)]))
        return result

    def is_made(self, x: Tensor) -> bool:
        return address(x) in self.made

    def forget(self) -> None:
        """As if nothing had been computed."""
        for whole, before in self.before.values():
            whole.copy_(before)
        for *_, results in self.steps:
            for x in results:
                if self.is_made(x) and x.numel() and x.is_floating_point():
                    x.fill_(torch.nan)

    def repeat(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, results in self.steps:
                found = _tensors(function(*args, **kwargs))
                for x, now in zip(results, found, strict=True):
                    if address(x) != address(now):
                        x.copy_(now)


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What the operation writes to, of what it is given."""
    names = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
    given = {a.name: x for a, x in zip(function._schema.arguments, args, strict=False)} | kwargs
    return _tensors([given.get(name) for name in names])


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def assert_same_bits(found: Attribution, wanted: Attribution) -> None:
    """And nothing in them is zero throughout."""
    assert torch.equal(found.clean_value, wanted.clean_value)
    assert torch.equal(found.corrupted_value, wanted.corrupted_value)
    for kind in wanted.contribution:
        assert wanted.contribution[kind].any(), kind
        assert torch.equal(found.contribution[kind], wanted.contribution[kind]), kind
        assert torch.equal(found.effect[kind], wanted.effect[kind]), kind
        if wanted.per_pair is not None:
            assert found.per_pair is not None
            assert torch.equal(found.per_pair[kind], wanted.per_pair[kind]), kind
