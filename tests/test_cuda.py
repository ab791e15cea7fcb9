"""The engine on a GPU: the same scores as the literal reference, run after run. Without a GPU there is nothing to run."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast import engine as engine_module
from atp_fast.attribution.literal import literal_attribution
from atp_fast.attribution.memory import SweepPlan
from atp_fast.attribution.replay import Replays
from atp_fast.attribution.scores import Scores
from atp_fast.metrics import resolve
from atp_fast.nodes import KINDS, Node
from naive_patching import naive_effects
from recorder import assert_same_bits
from test_spans import UNEQUAL, pairs_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_equals_the_literal_reference(family: str, dtype: torch.dtype) -> None:
    """Against the float64 literal: at most twice the error of the CPU's literal in the same dtype, and a few eps."""
    if dtype == torch.bfloat16 and family in zoo.MOE:
        pytest.skip("rounding sends tokens to other experts")
    wide, narrow = zoo.build(family), zoo.build(family, dtype=dtype)
    pairs, kinds = zoo.random_pairs(wide, 3, 9, ragged=True, shared_prefix=1), KINDS
    truth = literal_attribution(wide, pairs, nodes=kinds)[0]
    literal = literal_attribution(narrow, pairs, nodes=kinds)[0]
    engine = Engine(narrow.cuda())
    assert engine.backend == "triton"
    found = engine.attribute(pairs, nodes=kinds, progress=False)
    assert all(x.is_cuda for x in found.contribution.values())
    ours = found.cpu().contribution
    for kind in kinds:
        largest = float(truth[kind].abs().max())
        allowed = 2 * float((literal[kind] - truth[kind]).abs().max())
        allowed += 16 * torch.finfo(dtype).eps * largest
        error = float((ours[kind] - truth[kind]).abs().max())
        assert error <= allowed, (kind, error, allowed, largest)


@pytest.mark.parametrize("budget", [1, "auto"])
def test_two_runs_are_bit_equal(budget: int | str) -> None:
    model = zoo.build("llama", dtype=torch.float32).cuda()
    pairs = zoo.random_pairs(model, 4, 12, ragged=True)
    engine = Engine(model, memory_budget=budget)
    first, second = (engine.attribute(pairs, per_pair=True, progress=False) for _ in range(2))
    for kind in first.contribution:
        assert torch.equal(first.contribution[kind], second.contribution[kind]), kind
        assert torch.equal(first.per_pair[kind], second.per_pair[kind]), kind


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_patching_equals_naive_patching(family: str) -> None:
    model = zoo.build(family)
    pairs = zoo.random_pairs(model, 2, 8, ragged=True)
    kinds = [kind for kind in ("q", "k", "v", "z", "neuron") if kind in KINDS]
    nodes = [Node(kind, layer, t, 1) for kind in kinds for layer in (0, 2) for t in (0, 3, 7)]
    metric = resolve("logit_diff", pairs)
    naive, _ = naive_effects(model, pairs, [[node] for node in nodes], metric)
    ours = Engine(model.float().cuda()).patch(pairs, nodes, progress=False).effect
    assert (ours - naive).abs().max() <= 1e-4 * naive.abs().max()


# ---- replayed sweeps


def replays_of(engine: Engine) -> Replays:
    assert engine._replays is not None
    return engine._replays


def assert_replayed(model: Any, pairs: list[PromptPairs], **asked: Any) -> None:
    """One recording, made in the second call, and the bits of an engine that never replays."""
    engine, eager = Engine(model), Engine(model, replay=False)
    for number, each in enumerate(pairs):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = engine.attribute(each, progress=False, **asked)
        assert len(replays_of(engine)._recorded) == min(number, 1)
        assert_same_bits(found, eager.attribute(each, progress=False, **asked))
    assert replays_of(engine).bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["atp", "atp*"])
@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in zoo.MOE])
def test_replayed_sweeps_give_the_eager_bits(family: str, method: str, dtype: torch.dtype) -> None:
    model = zoo.build(family, dtype=dtype).cuda()
    pairs = [zoo.random_pairs(model, 3, 9 + seed, seed, ragged=True) for seed in range(4)]
    assert_replayed(model, pairs, method=method)


def test_replayed_sweeps_whatever_is_asked() -> None:
    model = zoo.build("llama", dtype=torch.float32).cuda()
    left = [zoo.random_pairs(model, 3, 9, s, ragged=True, padding_side="left") for s in range(4)]
    assert_replayed(model, left, per_pair=True, nodes=KINDS)
    shared = [zoo.random_pairs(model, 2, 24, s, ragged=True, shared_prefix=17) for s in range(4)]
    assert_replayed(model, shared, metric="kl", direction="denoising")
    assert_replayed(model, [pairs_of(UNEQUAL) for _ in range(4)], method="atp+qk")


def test_replayed_batches_of_one_call_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine_module.plan_sweep

    def one_pair(*args: Any, **options: Any) -> SweepPlan:
        return own(*args, **options)._replace(pairs=1)

    monkeypatch.setattr(engine_module, "plan_sweep", one_pair)
    model = zoo.build("llama", dtype=torch.float32).cuda()
    pairs = zoo.mixed_pairs(model, "all left")
    engine = Engine(model)
    found = engine.attribute(pairs, per_pair=True, progress=False)
    assert len(replays_of(engine)._recorded) == 1
    eager = Engine(model, replay=False)
    assert_same_bits(found, eager.attribute(pairs, per_pair=True, progress=False))


def test_replay_leaves_models_alone_that_read_what_they_compute() -> None:
    model = zoo.build("mixtral", dtype=torch.float32).cuda()
    engine = Engine(model)
    pairs = zoo.random_pairs(model, 2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, *_, last = (engine.attribute(pairs, progress=False) for _ in range(3))
    assert replays_of(engine)._recorded == {}
    assert_same_bits(first, last)


def test_replay_after_a_recording_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that only a capture meets: the numbers are the eager ones, the next shape is recorded."""
    model = zoo.build("llama", dtype=torch.float32).cuda()
    engine, eager, own = Engine(model), Engine(model, replay=False), Scores.add

    def add(scores: Scores, *args: Any, **named: Any) -> None:
        own(scores, *args, **named)
        if reads and torch.cuda.is_current_stream_capturing():
            float(scores.score["q"].sum())

    monkeypatch.setattr(Scores, "add", add)
    reads, stream = True, torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="a sweep could not be recorded"):
        for seed in range(3):
            pairs = zoo.random_pairs(model, 2, 9, seed)
            found = engine.attribute(pairs, progress=False)
            assert_same_bits(found, eager.attribute(pairs, progress=False))
    assert torch.cuda.current_stream() == stream
    reads = False
    for seed in range(3):
        pairs = zoo.random_pairs(model, 3, 9, seed)
        found = engine.attribute(pairs, progress=False)
        assert_same_bits(found, eager.attribute(pairs, progress=False))
    assert len(replays_of(engine)._recorded) == 1


def test_replay_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama", dtype=torch.float32).cuda()
    engine, eager = Engine(model), Engine(model, replay=False)
    pairs = zoo.random_pairs(model, 2, 9)
    wanted = eager.attribute(pairs, progress=False)
    for _ in range(4):
        assert_same_bits(engine.attribute(pairs, progress=False), wanted)

    def replay(graph: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    with pytest.warns(UserWarning, match="out of memory in a replayed sweep: sweeping eagerly"):
        assert_same_bits(engine.attribute(pairs, progress=False), wanted)
    assert replays_of(engine).bytes == 0


def test_replay_ends_with_its_engine() -> None:
    model = zoo.build("llama", dtype=torch.float32).cuda()
    engine = Engine(model)
    for seed in range(3):
        engine.attribute(zoo.random_pairs(model, 2, 9, seed), progress=False)
    held = replays_of(engine).bytes
    (recording,) = (weakref.ref(x) for x in replays_of(engine)._recorded.values())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    del engine
    assert recording() is None
    torch.cuda.empty_cache()
    assert held > 0
    assert torch.cuda.memory_reserved() < before
