"""What a call will take, said before it runs: units of work instead of seconds, bytes of weights and results, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import atp_fast.estimates
import zoo
from atp_fast import Engine
from atp_fast.attribution.adjoint import Adjoint
from atp_fast.hf import Plug
from atp_fast.hf.placement import Fetcher
from atp_fast.nodes import KINDS


class Work:
    """A clock that counts work in place of seconds: rows times positions that layers are run on, and cotangents taken back."""

    def __init__(self) -> None:
        self.done = 0.0

    def perf_counter(self) -> float:
        return self.done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    found = Work()
    run_layer, through = Plug.run_layer, Adjoint.__call__

    def ran(plug: Plug, number: int, x: torch.Tensor, *rest: Any) -> Any:
        found.done += x.shape[0] * x.shape[1]
        return run_layer(plug, number, x, *rest)

    def walked(adjoint: Adjoint, cotangents: Any, *rest: Any) -> Any:
        found.done += 3 * len(cotangents[0])
        return through(adjoint, cotangents, *rest)

    monkeypatch.setattr(Plug, "run_layer", ran)
    monkeypatch.setattr(Adjoint, "__call__", walked)
    monkeypatch.setattr(
        atp_fast.estimates, "time", SimpleNamespace(perf_counter=found.perf_counter)
    )
    yield found


@pytest.mark.parametrize("budget", [1, "150KB", "1GiB"])
@pytest.mark.parametrize("method", ["atp", "atp*"])
@pytest.mark.parametrize("shared", [0, 3])
def test_seconds_are_those_of_all_layers_and_batches(
    work: Work, method: str, budget: Any, shared: int
) -> None:
    """Taped and untaped layers, chunks of cotangents with a rest, prefixes, several batches: exact, in units of work."""
    model = zoo.build("llama", num_hidden_layers=7)
    pairs = zoo.random_pairs(model, 4, 9, shared_prefix=shared)
    engine = Engine(model, "reference", memory_budget=budget)
    engine.estimate(pairs)  # measures the layers' memory once
    before = work.done
    estimate = engine.estimate(pairs, method=method, nodes=KINDS)
    tried, before = work.done - before, work.done
    engine.attribute(pairs, method=method, nodes=KINDS, progress=False)
    assert estimate.seconds == pytest.approx(work.done - before, rel=1e-9)
    if estimate.batches == 4:
        assert tried < work.done - before


@pytest.mark.parametrize("what", ["odd layers", "all"])
def test_only_what_is_fetched_takes_time_to_fetch(
    work: Work, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are work too; the lowest layer may lie in memory and others of its kind on disk, and the ends with them."""
    pytest.importorskip("accelerate")
    from offloaded import offload

    own = Fetcher.fetch

    def fetch(fetcher: Fetcher) -> Any:
        work.done += sum(fetcher.sizes())
        return own(fetcher)

    model = offload(zoo.build("llama", num_hidden_layers=7), tmp_path, what)
    monkeypatch.setattr(Fetcher, "fetch", fetch)
    engine = Engine(model, "reference", memory_budget="60KB")
    pairs = zoo.random_pairs(model, 4, 9)
    estimate = engine.estimate(pairs, nodes=KINDS)
    before = work.done
    engine.attribute(pairs, nodes=KINDS, progress=False)
    assert estimate.seconds == pytest.approx(work.done - before, rel=1e-9)
