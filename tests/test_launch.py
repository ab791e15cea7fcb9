"""Kernels that were started before are started as they were compiled then: the same binary, grid and arguments as Triton's own way
gives, on a driver that notes what it is asked to start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_fast.kernels import launch
from atp_fast.kernels.launch import Blocks

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import binaries

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="nothing is compiled")

FEW, MANY = Blocks(16, 16, 1, 1, 1), Blocks(32, 16, 1, 4, 1)
X, Y = torch.zeros(64), torch.zeros(64)


@triton.jit
def _scaled(x_ptr, y_ptr, size, factor, EXTRA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = tl.load(x_ptr + i, mask=i < size) * factor
    if y_ptr is not None:
        tl.store(y_ptr + i, x + EXTRA, mask=i < size)


class Launcher:
    """What Triton hands a compiled kernel's start to."""

    started: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, src: Any, metadata: Any) -> None:
        self.binary = src.hash(), metadata.num_warps

    def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        assert (stream, *rest[3:5]) == (0, *hooks)
        arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in rest[5:]]
        self.started.append((self.binary, (x, y, z), arguments))


class Driver(binaries.StartDriver):
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 77  # nobody else's cache of compiled kernels


@pytest.fixture(autouse=True)
def own_ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The driver's place is taken; what goes Triton's own way is noted."""
    own: list[Any] = []
    start = launch._start

    def noting(kernel: Any, grid: Any, arguments: dict[str, Any]) -> Any:
        own.append(kernel)
        return start(kernel, grid, arguments)

    monkeypatch.setattr(launch, "_start", noting)
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(Launcher, "started", [])
    with binaries.driver(Driver("sm_90")):
        yield own


def arguments(**changes: Any) -> dict[str, Any]:
    return {"x_ptr": X, "y_ptr": Y, "size": 48, "factor": 2.0, "EXTRA": 3, **changes}


CALLS: dict[str, tuple[dict[str, Any], Blocks]] = {
    "plain": (arguments(), FEW),
    "other memory": (arguments(x_ptr=torch.zeros(64)), FEW),
    "another order": (dict(reversed(arguments().items())), FEW),
    "rows that start anywhere": (arguments(y_ptr=Y[1:]), FEW),
    "half of the alignment": (arguments(y_ptr=Y[2:]), FEW),
    "another dtype": (arguments(x_ptr=X.bfloat16()), FEW),
    "none": (arguments(y_ptr=None), FEW),
    "one": (arguments(size=1), FEW),
    "no multiple of 16": (arguments(size=47), FEW),
    "64 bits": (arguments(size=2**40), FEW),
    "another factor": (arguments(factor=0.5), FEW),
    "another constant": (arguments(EXTRA=4), FEW),
    "other blocks": (arguments(), MANY),
    "more warps": (arguments(), FEW._replace(num_warps=2)),
}


def started(name: str) -> tuple[Any, ...]:
    given, blocks = CALLS[name]
    launch.run(_scaled, lambda b: 96 // b.block_m, given, (blocks,), X, parts=3)
    return Launcher.started[-1]


def test_the_second_start_is_tritons_own(own_ways: list[Any]) -> None:
    wanted = {}
    for name in CALLS:
        launch._ready.clear()
        wanted[name] = started(name)
    assert len(own_ways) == len(CALLS)
    launch._ready.clear()
    first = [started(name) for name in CALLS]
    again = [started(name) for name in reversed(CALLS)]
    assert len(own_ways) == 2 * len(CALLS) - 2  # two are "plain" in all that matters
    assert first == list(wanted.values())
    assert again[::-1] == list(wanted.values())
    _, grid, given = wanted["plain"]
    assert grid == (6, 3, 1)
    assert given == [X.data_ptr(), Y.data_ptr(), 48, 2.0, 3, 16, 16, 1]
    assert len({binary for binary, *_ in wanted.values()}) == 10


def test_an_autotuners_choice_is_started_as_it_was_compiled(
    own_ways: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid follows the blocks that were chosen, and others are not started by calls that do not fill the device."""

    class Tuned:
        best_config = SimpleNamespace(kwargs={"BLOCK_M": 32, "BLOCK_N": 16, "CHUNK": 1})

        def __getitem__(self, grid: Any) -> Any:
            meta = self.best_config.kwargs
            return lambda **given: _scaled[grid(meta)](**given, **meta, num_warps=4)

    tuned = Tuned()
    monkeypatch.setattr(launch, "_tuned", lambda kernel, choices: tuned)
    monkeypatch.setattr(launch, "_processors", lambda device: 4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: pytest.MonkeyPatch.context())
    for length, own in ((96, [tuned]), (96, []), (32, [_scaled]), (32, []), (192, []), (96, [])):
        own_ways.clear()
        launch.run(_scaled, lambda b: length // b.block_m, arguments(), (FEW, MANY), X)  # noqa: B023
        assert own_ways == own
        block = 16 if length == 32 else 32
        _, grid, given = Launcher.started[-1]
        assert grid == (length // block, 1, 1)
        assert given[-3:] == [block, 16, 1]


def test_what_is_ready_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_READY_AT_MOST", 3)
    for size in range(16, 256, 16):
        given = arguments(size=size)
        launch.run(_scaled, lambda b: 1, given, (FEW,), X)
        assert Launcher.started[-1][2][2] == size
        assert 1 <= len(launch._ready) <= 3
