"""The engine on a GPU: the same scores as the literal reference, run after run. Without a GPU there is nothing to run."""

from __future__ import annotations

import pytest
import torch

import zoo
from atp_fast import Engine
from atp_fast.attribution.literal import literal_attribution
from atp_fast.metrics import resolve
from atp_fast.nodes import KINDS, Node
from naive_patching import naive_effects

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
