"""Kernel starts per layer stay within tests/launch_budget.json, which may only fall."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from atp_fast.kernels import add_effects
from atp_fast.ops import triton

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from launches import FAMILIES, METHODS, PHASES, Launches, per_layer

BUDGET = Path(__file__).parent / "launch_budget.json"
GOALS = {"llama": {"atp": 50, "atp*": 60}}
GOAL = 70

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="the kernels are stubbed")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_per_layer(family: str, method: str) -> None:
    held = json.loads(BUDGET.read_text())[family][method]
    found = per_layer(family, method)
    assert {phase: sum(found[phase].values()) for phase in PHASES} == held, found
    assert sum(held.values()) <= GOALS.get(family, {}).get(method, GOAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_pairs_are_scored_by_one_kernel_where_programs_are_few(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(add_effects, "too_few", lambda programs, on: True)
    held = json.loads(BUDGET.read_text())[family]["atp*"]["scoring"]
    assert sum(per_layer(family, "atp*")["scoring"].values()) == held


def test_views_and_allocations_are_no_starts() -> None:
    x, launches = torch.ones(4, 6), Launches()
    with launches:
        torch.empty(3)
        x.view(6, 4).t()[1:].unsqueeze(0)
        x @ x.t() + 1
        x.t().reshape(24)
    assert launches.counts == {
        ("sweep", "aten::mm"): 1,
        ("sweep", "aten::add"): 1,
        ("sweep", "aten::clone"): 1,
    }


def test_what_runs_under_vmap_counts_once() -> None:
    x, launches = torch.ones(4, 6), Launches()
    with launches:
        torch.func.vmap(torch.sin)(x)
    assert launches.counts == {("sweep", "aten::sin"): 1}
