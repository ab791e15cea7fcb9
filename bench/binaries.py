"""Compiled kernels without a GPU: what a launch would start, its resources, and the instructions of its main loop.

The launchers run on meta tensors while their start is captured; the captured kernel is compiled for a target
through a stub driver, with the dtypes, sizes and strides of the real call, so that Triton sees the alignment a
real call would show it. Registers and instructions are read from the binary by the tools Triton bundles.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from atp_fast.kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# shared memory a block may have, bytes
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", re.MULTILINE
)
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
# what no part of a tile does by itself: products, copies, barriers, calls
_SHARED_WORK = {*_MATRIX, "LDGSTS", "BAR", "SYNCS", "UTCBAR", "CALL", "STG"}


class Start(NamedTuple):
    """A captured kernel start: every argument but the grid, tensors among them."""

    kernel: Any
    arguments: dict[str, Any]
    programs: int


class StubDriver:
    """The little of a driver that compiling asks for; one device number per target keeps their caches apart."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._name)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class StartDriver(StubDriver):
    """A driver to which compiled kernels can be handed for a start, which takes no time."""

    launcher_cls: Any = staticmethod(lambda source, metadata: lambda *arguments: None)
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 2**18},
    )


@contextmanager
def stub_driver(name: str) -> Iterator[None]:
    """Triton's active driver is a stub of the target, for as long as the context lasts."""
    with driver(StubDriver(name)):
        yield


@contextmanager
def driver(active: StubDriver) -> Iterator[None]:
    """Triton's active driver is this one, for as long as the context lasts."""
    # reset_active would look for a real driver
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(active)
    try:
        yield
    finally:
        triton.runtime.driver.set_active(previous)


def captured(call: Callable[[], object]) -> list[Start]:
    """The kernel starts that a call of launchers on meta tensors would make."""
    starts: list[Start] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        starts.append(Start(kernel, arguments, grid[0]))

    original = launch._start
    launch._start = record
    try:
        call()
    finally:
        launch._start = original
    return starts


def compiled(start: Start, target: str) -> Any:
    """Triton's compiled kernel of a start for a target."""
    arguments = {
        name: MockTensor.wrap_dtype(x.dtype) if isinstance(x, torch.Tensor) else x
        for name, x in start.arguments.items()
    }
    if target.startswith("gfx") and "PRECISION" in arguments:
        arguments["PRECISION"] = "ieee"
    with stub_driver(target):
        return start.kernel.warmup(**arguments, grid=(1,))


class Binary(NamedTuple):
    """What a binary for NVIDIA holds: registers, spilled bytes, shared memory, instructions by opcode.

    loop: the instructions of one trip through each of its main loops, the outermost ones with matrix instructions, or
    all outermost ones where it has none. edge: those that a further branch skips, in a tile that needs no mask; loop is without.
    """

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    loop: Counter[str]
    edge: Counter[str]


def families(opcodes: Counter[str]) -> Counter[str]:
    """Counts without the opcodes' modifiers."""
    counts: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        counts[opcode.split(".")[0]] += count
    return counts


def matrix_count(opcodes: Counter[str]) -> int:
    """Matrix instructions among the opcodes."""
    counts = families(opcodes)
    return sum(counts[family] for family in _MATRIX)


def _opcodes(text: str) -> Counter[str]:
    return Counter(match[1] for match in _INSTRUCTION.finditer(text))


def _main_loops(text: str, inner_trips: int) -> tuple[Counter[str], Counter[str]]:
    labels = {match[1]: match.start() for match in re.finditer(r"^(\.L\w+):", text, re.MULTILINE)}
    spans = {
        (labels[match[1]], match.end())
        for match in re.finditer(r"BRA\S*\s+(?:U?P\w+,\s*)?`\((\.L\w+)\)", text)
        if labels.get(match[1], len(text)) < match.start()
    }
    bodies = {span: _opcodes(text[span[0] : span[1] + 1]) for span in spans}
    busy = {span for span in spans if matrix_count(bodies[span])} or spans

    def encloses(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and b[1] <= a[1]

    # a masked tile's part computes alone; branches over less than ten instructions are the compiler's own
    skips = {
        (match.end(), labels.get(match[1], 0))
        for match in re.finditer(r"@!?U?P\w+\s+BRA\S*\s+(?:!?U?P\w+,\s*)?`\((\.L\w+)\)", text)
    }
    masks = {
        span: body
        for span in skips
        if span[0] < span[1]
        for body in [_opcodes(text[slice(*span)])]
        if body.total() >= 10 and not _SHARED_WORK & families(body).keys()
    }
    # a compiler that moves parts of a loop behind it makes spans that overlap: together they are one
    outermost: list[tuple[int, int]] = []
    for span in sorted(busy):
        if outermost and span[0] < outermost[-1][1]:
            span = (outermost[-1][0], max(span[1], outermost.pop()[1]))
        outermost.append(span)
    total: Counter[str] = Counter()
    edge: Counter[str] = Counter()
    for span in outermost:
        total += _opcodes(text[span[0] : span[1] + 1])
        for skipped, body in masks.items():
            if encloses(span, skipped) and not any(encloses(other, skipped) for other in masks):
                edge += body
        for inner in busy:
            # a loop over slices of a row: the enclosing body counts one of its trips
            if encloses(span, inner):
                for opcode, count in bodies[inner].items():
                    total[opcode] += count * (inner_trips - 1)
    return total - edge, edge


def inspect(kernel: Any, inner_trips: int = 1) -> Binary:
    """Resources and instruction counts of a compiled kernel for an NVIDIA target.

    inner_trips: how often a loop inside a main loop runs per trip of it, see tiles.row_products.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])

        def tool(*command: str) -> str:
            done = subprocess.run(
                [str(_TOOLS / command[0]), *command[1:], str(cubin)],
                capture_output=True,
                text=True,
                check=True,
            )
            return done.stdout

        usage = tool("cuobjdump", "-res-usage")
        text = tool("nvdisasm", "-c")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = _opcodes(text)
    counts = families(instructions)
    spilled = max(found["STACK"], found["LOCAL"], 4 * (counts["STL"] + counts["LDL"]))
    return Binary(
        found["REG"],
        spilled,
        kernel.metadata.shared,
        instructions,
        *_main_loops(text, inner_trips),
    )


def plain_products(kernel: Any) -> int:
    """Products that the compiler left to ordinary multiply-adds instead of the tensor cores."""
    return len(
        re.findall(r"tt\.dot .*#ttg\.dot_op<\{opIdx = 0, parent = #blocked", kernel.asm["ttgir"])
    )
