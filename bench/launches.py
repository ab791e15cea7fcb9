"""How many kernels a sweep starts per layer, and how long Python takes for that, without a GPU.

Counted are the operations that torch dispatches beneath autograd and vmap, but for views and allocations, and the starts of
the Triton kernels, which are stubbed: their outputs are zeros. The number per layer is the slope between two depths of a
tiny bfloat16 model, so that what a call does once does not count.

Of the time, what Triton and the driver take to start a kernel that was started before is left out; what torch takes to compute a
few numbers on the CPU, and to fill the outputs with zeros, is not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import binaries
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atp_fast import Engine, PromptPairs, kernels
from atp_fast.attribution import memory
from atp_fast.attribution import sweep as sweeps
from atp_fast.attribution.literal import literal_attribution
from atp_fast.kernels import launch
from atp_fast.nodes import NODE_KINDS
from atp_fast.ops import triton

PHASES = ("forwards", "sweep", "scoring")
METHODS = ("atp", "atp*")
_DEPTHS = (2, 3)
_DEPTHS_IN_TIME = (4, 16)
_VOCABULARY = 48
_COMMON: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA: dict[str, Any] = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
# heads of 16 columns: what the kernels take as it lies
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gpt_neox": {**_COMMON, "intermediate_size": 96},
    "gpt2": _COMMON,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma3_text": {**_LLAMA, "head_dim": 16, "sliding_window": 4},
}
# allocations, a view that says it is none, and reading one number
_NO_STARTS = ("empty", "_unsafe_view", "_local_scalar_dense")
# what adds to the scores, wherever it is called from
_SCORING = ((sweeps._Layer, "_first_order"), (sweeps._Layer, "_given"))


class Launches(TorchDispatchMode):
    """Counts of (phase, operation) while it is on; a Triton start is an operation named after its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.phase = "sweep"

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if not function.is_view and not any(part in name for part in _NO_STARTS):
            self.counts[self.phase, name] += 1
        return function(*args, **(kwargs or {}))

    def started(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        self.counts[self.phase, f"triton::{kernel.__name__}"] += 1

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose operations count for this phase."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return wrapped

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, the Triton backend takes CPU tensors and starts nothing, and operations are counted."""

        with _stubbed(self.started), contextlib.ExitStack() as stack:
            for patch in (
                mock.patch.object(sweeps, "run_batch", self.during("forwards", sweeps.run_batch)),
                *(
                    mock.patch.object(owner, name, self.during("scoring", getattr(owner, name)))
                    for owner, name in _SCORING
                ),
            ):
                stack.enter_context(patch)
            stack.enter_context(self)
            yield


@contextlib.contextmanager
def _stubbed(start: Callable[..., Any]) -> Iterator[None]:
    """Inside, kernels are started by `start`: their outputs are zeros."""

    def zeroed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def zeros(*args: Any, **options: Any) -> Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **options).zero_()

        return zeros

    with (
        mock.patch.object(triton, "INTERPRETED", True),
        mock.patch.object(launch, "_start", start),
        mock.patch.object(launch, "_ready", {}),
        mock.patch.object(memory, "saves_starts", lambda device, rows: True),
        mock.patch.object(torch, "empty", zeroed(torch.empty)),
        mock.patch.object(torch, "empty_like", zeroed(torch.empty_like)),
    ):
        yield


class _Compiled:
    """A compiled kernel whose starts take no time."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: None


def build(family: str, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A tiny random model of FAMILIES in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **FAMILIES[family], num_hidden_layers=layers)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


@functools.cache
def _engine(family: str, layers: int) -> Engine:
    """An engine that starts Triton kernels on a model on the CPU; it was checked with the C++ backend."""
    engine = Engine(build(family, layers, torch.bfloat16), backend="cpp")
    engine.plug.backend = engine.backend = "triton"
    return engine


def counts_of(family: str, method: str, layers: int) -> Counter[tuple[str, str]]:
    """What one call of `Engine.attribute` starts, two pairs, all kinds of nodes by default, every layer taped."""
    engine, launches = _engine(family, layers), Launches()
    with launches.counting():
        engine.attribute(_pairs(), method=method, progress=False)
    return launches.counts


def _pairs() -> PromptPairs:
    ids = torch.arange(24).reshape(4, 6)
    return PromptPairs(ids[:2], ids[2:], torch.tensor([1, 2]), torch.tensor([3, 4]))


def per_layer(family: str, method: str) -> dict[str, dict[str, float]]:
    """By phase, the starts of each operation per layer."""
    few, many = (counts_of(family, method, layers) for layers in _DEPTHS)
    found: dict[str, dict[str, float]] = {phase: {} for phase in PHASES}
    for phase, name in sorted(few | many):
        slope = (many[phase, name] - few[phase, name]) / (_DEPTHS[1] - _DEPTHS[0])
        if slope:
            found[phase][name] = slope
    return found


def host_seconds(family: str, method: str, rounds: int) -> dict[str, list[float]]:
    """Seconds that Python takes per layer of a call by atp_fast and, of plain AtP, by the literal code, round by round."""
    few, many = _DEPTHS_IN_TIME
    calls = {("atp_fast triton", n): _attribution(_engine(family, n), method) for n in (few, many)}
    if method == "atp":
        calls |= {("literal", n): _literal(_engine(family, n)) for n in (few, many)}
    found: dict[str, list[float]] = {provider: [] for provider, _ in calls}
    with _stubbed(lambda *_: _Compiled()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every effect is zero
        for turn in range(rounds + 1):  # the first makes ready
            seconds = {what: _seconds(call, 1) for what, call in calls.items()}
            for provider, times in found.items():
                if turn:
                    slope = (seconds[provider, many] - seconds[provider, few]) / (many - few)
                    times.append(slope)
    return found


def _attribution(engine: Engine, method: str) -> Callable[[], object]:
    return lambda: engine.attribute(_pairs(), method=method, progress=False)


def _literal(engine: Engine) -> Callable[[], object]:
    return lambda: literal_attribution(engine.model, _pairs(), method="atp", nodes=NODE_KINDS)


@contextlib.contextmanager
def _driven(plain: bool) -> Iterator[None]:
    """Inside, the Triton backend takes CPU tensors, and starts end at a driver that does nothing; plain: all by Triton's own way."""

    def run(
        kernel: Any, programs: Any, arguments: Any, choices: Any, on: Any, parts: int = 1
    ) -> None:
        blocks = choices[0]
        options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
        meta = launch._meta(kernel, blocks)
        kernel[programs(blocks), parts](**arguments, **meta, **options, enable_fp_fusion=True)

    modules = [
        importlib.import_module(f"{kernels.__name__}.{m.name}")
        for m in pkgutil.iter_modules(kernels.__path__)
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(binaries.driver(binaries.StartDriver("sm_90")))
        stack.enter_context(_stubbed(launch._start))
        for module in modules if plain else ():
            if getattr(module, "run", None) is launch.run:
                stack.enter_context(mock.patch.object(module, "run", run))
        yield


def started_seconds(family: str, method: str, rounds: int) -> dict[str, list[float]]:
    """Seconds that the host takes per layer of a call, Triton's part of every start included, by atp_fast and with all starts by
    Triton's own way, round by round."""
    few, many = _DEPTHS_IN_TIME
    calls = [_attribution(_engine(family, n), method) for n in (few, many)]
    ways = {"atp_fast triton, with starts": False, "atp_fast triton, with Triton's starts": True}
    found: dict[str, list[float]] = {way: [] for way in ways}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every effect is zero
        for turn in range(rounds + 1):  # the first compiles
            for way, plain in ways.items():
                with _driven(plain):
                    below, above = (_seconds(call, 2) for call in calls)
                if turn:
                    found[way].append((above - below) / (many - few))
    return found


def _seconds(call: Callable[[], object], times: int) -> float:
    """Of the last of some calls."""
    for _ in range(times):
        began = time.perf_counter()
        call()
    return time.perf_counter() - began
