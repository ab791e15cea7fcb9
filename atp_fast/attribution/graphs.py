"""Work of the device recorded once and repeated: CUDA graphs, and what a recording must not do."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: torch's pinned allocator may still ask them where its memory comes from."""
_capturing = threading.Lock()  # torch captures one graph of a process at a time


class Graphs(Protocol):
    """Parts of work, recorded one after the other and repeated in that order, on the tensors they were recorded with.

    What they allocate stays theirs as long as they live; recording computes nothing.
    """

    def capture(self, function: Callable[[], T]) -> T: ...

    def replay(self, part: int) -> None: ...

    def bytes(self) -> int: ...


class CudaGraphs:
    """CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = _stream(device)

    def capture(self, function: Callable[[], T]) -> T:
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            # other threads may go on with models of their own
            recording = torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            )
            try:
                with recording:
                    found = function()
            except BaseException:
                _failed.append(graph)
                # torch up to 2.12 goes on allocating for the graph, and the next torch.cuda.empty_cache() would raise
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                raise
            finally:  # a capture that fails leaves its stream current
                torch.cuda.set_stream(before)
        self._graphs.append(graph)
        return found

    def replay(self, part: int) -> None:
        with torch.cuda.device(self._device):
            self._graphs[part].replay()

    def bytes(self) -> int:
        """What the pool holds of the device's memory."""
        pool = tuple(self._pool)
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)


@functools.cache
def _stream(device: torch.device) -> Any:
    """The stream of all captures on a device: cuBLAS keeps a workspace for each that it has met, and this one's is no pool's."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.bfloat16):
            torch.ones(2, 2, device=device, dtype=dtype) @ torch.ones(
                2, 2, device=device, dtype=dtype
            )
    return stream


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that a recording could not hold: one whose result the host reads or sizes tensors by, or a
    copy between devices.

    constants: tensors that the host may read, for they are the same in every repetition.
    """

    def __init__(self, device: torch.device, constants: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._constants = [x.untyped_storage() for x in constants]
        self.found: str | None = None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.found is None and self._leaves_the_device(function, args, kwargs):
            self.found = str(function)
        return function(*args, **kwargs)

    def _leaves_the_device(self, function: Any, args: Any, kwargs: Any) -> bool:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = function._schema.name.removeprefix("aten::")
        if name in ("copy_", "_to_copy"):
            target = torch.device(kwargs.get("device") or given[0].device)
            return any(not _same(x.device, target) for x in given)
        mine = [x for x in given if _same(x.device, self._device)]
        if mine and any(x.ndim and not _same(x.device, self._device) for x in given):
            return True
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return not _READS.isdisjoint(function.tags) and not all(map(self._is_constant, mine))

    def _is_constant(self, x: Tensor) -> bool:
        return any(x.untyped_storage()._cdata == known._cdata for known in self._constants)


_READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; without a number, the current one of its type is meant."""
    numbers = {one.index, other.index} - {None}
    return one.type == other.type and len(numbers) < 2
