"""What a layer's work takes in memory, measured on a few tokens: bytes per position of one prompt.

Counted are the storages that torch makes, while they are alive. How much a layer saves for its adjoint, and how much is
alive at the worst moment of a forward and of a cotangent's way back, depends on its code: it is measured, not derived.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atp_fast.attribution.tape import LayerTape
from atp_fast.hf import LayerArguments, LayerRun, Plug
from atp_fast.nodes import ATTENTION_KINDS, NODE_KINDS


class LayerBytes(NamedTuple):
    """Bytes per position, the most that any kind of layer takes.

    forward: the worst moment of a forward without a graph, its output included; tape: what a tape holds; neurons, statistics:
    what it holds more where neurons are scored, and of the key fix; output: the worst moment of one cotangent's way from the
    layer's output to z; given: what it leaves there, gradients of z, neurons and the input; input: the worst moment of its
    way from q, k, v to the input.
    """

    forward: int
    tape: int
    neurons: int
    statistics: int
    output: int
    given: int
    input: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts the bytes of the storages that are made: alive now, and at the worst moment since `mark`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self.now = self.marked = self._peak = 0

    def mark(self) -> None:
        """Count the peak from here on."""
        self._peak = self.marked = self.now

    @property
    def peak(self) -> int:
        """Bytes that were alive at the worst moment beyond those at the mark."""
        return self._peak - self.marked

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            number = storage._cdata
            if number not in given and number not in self._alive:
                self._alive[number] = storage.nbytes()
                self.now += storage.nbytes()
                self._peak = max(self._peak, self.now)
                weakref.finalize(storage, self._gone, number)
        return out

    def _gone(self, number: int) -> None:
        self.now -= self._alive.pop(number, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


_MEASURED: weakref.WeakKeyDictionary[Plug, LayerBytes] = weakref.WeakKeyDictionary()


def measured_layers(plug: Plug) -> LayerBytes:
    """What `measure_layers` said of this model when it was first asked."""
    if plug not in _MEASURED:
        _MEASURED[plug] = measure_layers(plug)
    return _MEASURED[plug]


def measure_layers(plug: Plug) -> LayerBytes:
    """Every kind of layer once, on two short prompts, whose difference leaves out what does not grow with positions."""
    ids = plug.short_prompt()
    many = ids.shape[1]
    few = many // 2
    if few == 0:
        return LayerBytes(*[0] * len(LayerBytes._fields))
    found = []
    with plug.plugged():
        short, long = plug.enter(ids[:, :few]), plug.enter(ids)
        for number in plug.first_of_each_kind:
            with plug.holding(number):
                rows = [_measure(plug, number, x, given[number]) for x, given in (short, long)]
            found.append([max(0, m - f) // (many - few) for f, m in zip(*rows, strict=True)])
    return LayerBytes(*(int(plug.shares.largest(max(c))) for c in zip(*found, strict=True)))


def _measure(plug: Plug, number: int, x: Tensor, arguments: LayerArguments) -> Sequence[int]:
    """LayerBytes of one layer on one input, over all positions."""
    live = LiveBytes()
    with live, torch.no_grad():
        run = LayerRun(plug.backend, lambda kind, value: value, kinds=("neuron",))
        out = plug.run_layer(number, x, arguments, run)
        forward = live.peak
    del run, out
    tapes = []
    for kinds, statistics in ((ATTENTION_KINDS, False), (NODE_KINDS, True), (NODE_KINDS, False)):
        live = LiveBytes()
        with live:
            tape = LayerTape(plug, number, x, arguments, None, kinds, statistics=statistics)
            tapes.append(live.now)
    bare, fixed, whole = tapes
    run = tape.run
    with live:
        cotangent = torch.ones_like(tape.out)[None]
        values = [run.z, tape.values.get("neuron"), tape.x]
        live.mark()
        gradients = tape.from_output(cotangent, [t for t in values if t is not None])
        output, given = live.peak, live.now - live.marked
        inner = {
            k: torch.ones_like(t)[None] for k in "qkv" if (t := tape.values.get(k)) is not None
        }
        live.mark()
        if inner:
            tape.from_attention(inner, gradients[-1])
        return forward, bare, whole - bare, fixed - whole, output, given, live.peak
