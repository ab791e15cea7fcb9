"""Weights that are fetched once for many batches: counts, numbers, what waits, memory, and what is left behind."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

import atp_fast.attribution.streaming as streaming
import atp_fast.patching.sessions as sessions
import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.attribution.measured import measured_layers
from atp_fast.attribution.memory import SweepPlan, read_budget
from atp_fast.attribution.waiting import Shelf
from atp_fast.hf.placement import Fetcher
from atp_fast.nodes import KINDS
from offloaded import count_fetches, offload, placement
from test_memory import PEAKS, measured
from test_spans import UNEQUAL, pairs_of

TOLERANCE = 1e-12  # float64; tests/test_sweep.py allows batches of another size as much


def pairs_named(model: Any, name: str) -> PromptPairs:
    if name == "spans":
        return pairs_of(UNEQUAL, padding_side="left")
    return zoo.mixed_pairs(model, name)


def few_at_once(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """Batches of at most so many pairs in sweeps of offloaded models."""
    own = streaming.plan_sweep

    def few(*args: Any, **options: Any) -> SweepPlan:
        return own(*args, **options)._replace(pairs=pairs, chunk=2)

    monkeypatch.setattr(streaming, "plan_sweep", few)


def no_room(monkeypatch: pytest.MonkeyPatch, room: int = 0) -> list[str]:
    """What waits beyond `room` bytes waits on disk; the files that are made."""
    own, made = Shelf._new_file, []

    def noted(self: Shelf) -> str:
        made.append(own(self))
        return made[-1]

    kept: list[Shelf] = []  # a folder must go with its call, not when nothing refers to it any more

    def small(here: int, host: int) -> Shelf:
        kept.append(Shelf(room, 0))
        return kept[-1]

    monkeypatch.setattr(streaming, "Shelf", small)
    monkeypatch.setattr(Shelf, "_new_file", noted)
    return made


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for kind, right in wanted.items():
        assert float(right.abs().max()) > 0
        assert (found[kind] - right).abs().max() <= TOLERANCE * right.abs().max(), kind


@pytest.mark.parametrize(
    ("family", "pairs", "what", "size", "method"),
    [
        ("llama", "left", "disk", 2, "atp*"),
        ("llama", "right", "all", 3, "atp"),
        ("gpt_neox", "all left", "all", 3, "atp+graddrop"),
        ("gemma2", "right", "odd layers", 1, "atp+qk"),
        ("gpt2", "spans", "disk", 3, "atp*"),
        ("gpt2", "spans", "disk", 1, "atp"),
    ],
)
def test_weights_are_fetched_twice_for_all_batches(
    family: str,
    pairs: str,
    what: str,
    size: int,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for the forwards and once for the sweep; the numbers are those of the model in memory."""
    model = zoo.build(family, wide_norms=True)
    given = pairs_named(model, pairs)
    options: dict[str, Any] = {"metric": "nll", "method": method, "nodes": KINDS, "progress": False}
    wanted = Engine(model).attribute(given, per_pair=True, **options)
    engine = Engine(offload(model, tmp_path, what))
    before = placement(model)
    few_at_once(monkeypatch, size)
    counts = count_fetches(monkeypatch)
    measured_layers(engine.plug)  # once for all calls
    assert set(counts.values()) == {1, 2} if what == "all" else {1}
    counts.clear()
    found = engine.attribute(given, per_pair=True, **options)
    layers = [n for n, p in model.named_parameters() if p.is_meta and any(c.isdigit() for c in n)]
    assert layers and {name: counts[name] for name in layers} == dict.fromkeys(layers, 2)
    # embeddings and head are fetched as one stage: for entering and for the metric
    assert set(counts.values()) <= {2, 4}
    assert_close(found.contribution, wanted.contribution)
    assert_close(found.effect, wanted.effect)
    assert found.per_pair is not None and wanted.per_pair is not None
    assert_close(found.per_pair, wanted.per_pair)
    torch.testing.assert_close(found.clean_value, wanted.clean_value, rtol=TOLERANCE, atol=0)
    assert placement(model) == before


@pytest.mark.parametrize(
    ("family", "pairs", "what"),
    [("llama", "left", "disk"), ("gpt_neox", "all left", "all"), ("gpt2", "spans", "disk")],
)
def test_patching_fetches_twice_for_all_rows(
    family: str, pairs: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the pairs' runs, once for the rows; a second call on the same runs fetches for its rows alone."""
    model = zoo.build(family, wide_norms=True)
    given = pairs_named(model, pairs)
    space = Engine(model).plug.space(given.width, KINDS)
    nodes = [space.node(i) for i in range(3, len(space), 131)]
    subsets = [list(range(i, len(nodes), 9)) for i in range(9)]
    where = torch.arange(9) % len(given)

    def effects(engine: Engine, metric: Any) -> tuple[list[Tensor], Any]:
        patching = engine.patching(given, KINDS, metric)
        monkeypatch.setattr(sessions, "patched_rows", lambda *_: 5)
        alone = patching.effects(nodes)[0]
        counted = dict(counts)
        counts.clear()
        return [alone, patching.effects(nodes, subsets, where)[0], patching.clean_value], counted

    def all_at_once(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    all_at_once.positions = "last"
    monkeypatch.setattr(sessions, "_PAIRS_AT_ONCE", 2)
    counts = count_fetches(monkeypatch)
    wanted, nothing = effects(Engine(model), "nll")
    together = Engine(model).patch(given, nodes, all_at_once, progress=False).effect
    assert not nothing
    engine = Engine(offload(model, tmp_path, what))
    before = placement(model)
    counts.clear()
    found, first = effects(engine, "nll")
    second = dict(counts)
    layers = [n for n, p in model.named_parameters() if p.is_meta and any(c.isdigit() for c in n)]
    assert {name: first[name] for name in layers} == dict.fromkeys(layers, 2)
    assert {name: second[name] for name in layers} == dict.fromkeys(layers, 1)
    for ours, right in zip(found, wanted, strict=True):
        assert float(right.abs().max()) > 0
        assert (ours - right).abs().max() <= TOLERANCE * right.abs().max()
    counts.clear()
    found_together = engine.patch(given, nodes, all_at_once, progress=False).effect
    assert {counts[name] for name in layers} == {2}
    assert (found_together - together).abs().max() <= TOLERANCE * together.abs().max()
    assert placement(model) == before


def test_runs_that_the_budget_does_not_hold_are_made_group_by_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of pairs and of rows each fetch once, below the lowest patched layer nothing."""
    model = zoo.build("llama", wide_norms=True)
    given = zoo.random_pairs(model, 5, 9)
    space = Engine(model).plug.space(9, KINDS)
    nodes = [n for n in map(space.node, range(0, len(space), 113)) if n.layer > 0]
    wanted = Engine(model).patch(given, nodes, progress=False).effect
    offload(model, tmp_path)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    monkeypatch.setattr(sessions, "_PAIRS_AT_ONCE", 1)
    engine = Engine(model, memory_budget=3 * layer)
    measured_layers(engine.plug)
    counts = count_fetches(monkeypatch)
    found = engine.patch(given, nodes, progress=False).effect
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    by_layer = [counts[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    groups = by_layer[0]
    assert 1 < groups <= 5
    assert by_layer[1] == by_layer[2] >= 2 * groups


@pytest.mark.parametrize("room", [0, 4000])
def test_what_waits_goes_to_disk_and_is_removed(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer inputs, prefixes and cotangents beyond the room: the same bits as in memory, and no file stays."""
    model = offload(zoo.build("llama", wide_norms=True), tmp_path)
    given = zoo.mixed_pairs(model, "right")
    few_at_once(monkeypatch, 2)
    engine = Engine(model)
    wanted = engine.attribute(given, "nll", nodes=KINDS, progress=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(os.listdir(tmp_path))
    files, most = no_room(monkeypatch, room), [0]
    unlink = os.unlink

    def noted(path: Any, **options: Any) -> None:
        most[0] = max(most[0], len(os.listdir(Path(files[0]).parent)))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", noted)
    found = engine.attribute(given, "nll", nodes=KINDS, progress=False)
    for kind in KINDS:
        assert torch.equal(found.contribution[kind], wanted.contribution[kind])
    # four batches: inputs of three layers and the end, prefixes (two) and their stream, cotangents of three layers
    whole = 4 * (4 + 3 * 2 + 4 + 3)
    assert len(files) == whole if room == 0 else 0 < len(files) < whole
    assert most[0] < whole - 10  # what is not needed any more goes at once
    assert sorted(os.listdir(tmp_path)) == before


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [Stopped, ValueError, OSError])
@pytest.mark.parametrize("verb", ["attribute", "patch"])
def test_a_failure_leaves_everything_as_it_was(
    error: type[BaseException], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a layer, and while weights are fetched ahead in a thread."""
    model = offload(zoo.build("llama", wide_norms=True), tmp_path / "weights", "all")
    given = zoo.mixed_pairs(model, "right")
    engine = Engine(model)
    before = placement(model)
    few_at_once(monkeypatch, 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    no_room(monkeypatch)
    space = engine.plug.space(given.width, KINDS)

    def call() -> None:
        if verb == "attribute":
            engine.attribute(given, progress=False)
        else:
            engine.patch(given, [space.node(i) for i in range(0, len(space), 40)], progress=False)

    with monkeypatch.context() as patch:
        calls = [0]
        own = engine.plug.run_layer

        def failing(*args: Any) -> Tensor:
            calls[0] += 1
            if calls[0] == 6:
                raise error("a test's")
            return own(*args)

        patch.setattr(engine.plug, "run_layer", failing)
        with pytest.raises(error, match="a test's"):
            call()
    assert placement(model) == before
    with monkeypatch.context() as patch:
        seen = [0]
        whole = Fetcher.fetch

        def no_disk(self: Fetcher) -> dict[str, Tensor]:
            seen[0] += 1
            if seen[0] == 30:
                raise error("the disk is gone")
            return whole(self)

        patch.setattr(Fetcher, "fetch", no_disk)
        with pytest.raises(error, match="the disk is gone"):
            call()
    assert placement(model) == before
    assert sorted(os.listdir(tmp_path)) == ["weights"]
    assert not [t for t in threading.enumerate() if t.name.startswith("atp_fast")]
    call()


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offload(zoo.build("llama"), tmp_path)
    given = zoo.random_pairs(model, 3, 9)
    engine = Engine(model)
    before = placement(model)
    no_room(monkeypatch)
    monkeypatch.setattr(Shelf, "_new_file", lambda self: "/dev/full")
    message = (
        r"could not be written to /dev \(No space left on device\): give a larger memory_budget"
    )
    with pytest.raises(OSError, match=message) as caught:
        engine.attribute(given, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert placement(model) == before


@pytest.mark.parametrize("what", ["disk", "all"])
def test_a_budget_below_one_layer_is_refused(what: str, tmp_path: Path) -> None:
    """Before anything runs, with the layer, its size and the budget."""
    model = zoo.build("llama")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    offload(model, tmp_path, what)
    fetches = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *call: fetches.append(call))
    part = "layer 0" if what == "disk" else "its embeddings and head"
    size = layer if what == "disk" else 2 * 48 * 32 * 8 + 32 * 8
    with pytest.raises(
        ValueError,
        match=f"memory_budget must hold the offloaded weights of one layer of LlamaForCausalLM: {part} needs "
        f"{size:,} bytes, got {size - 1:,}",
    ):
        Engine(model, memory_budget=size - 1)
    assert not fetches


def test_a_free_share_below_one_layer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(offload(zoo.build("llama"), tmp_path))
    given = zoo.random_pairs(engine.model, 2, 5)
    monkeypatch.setattr("atp_fast.attribution.memory.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="layer 0 needs .* bytes, got 500"):
        engine.attribute(given, progress=False)
    with pytest.raises(ValueError, match="layer 0 needs .* bytes, got 500"):
        engine.patching(given, KINDS)


def test_weights_are_fetched_ahead_where_two_layers_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next layer's by a thread while one works; one layer's at a time within a small budget."""
    model = zoo.build("llama", wide_norms=True)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    offload(model, tmp_path)
    given = zoo.random_pairs(model, 3, 9)
    own, found = Fetcher.fetch, {}
    threads: list[str] = []

    def noted(self: Fetcher) -> dict[str, Tensor]:
        threads.append(threading.current_thread().name)
        return own(self)

    monkeypatch.setattr(Fetcher, "fetch", noted)
    for budget in ("1GiB", 2 * layer):
        engine = Engine(model, memory_budget=budget)
        measured_layers(engine.plug)
        threads.clear()
        found[budget] = engine.attribute(given, progress=False).contribution
        ahead = {name for name in threads if name.startswith("atp_fast weights")}
        assert len(ahead) == (1 if budget == "1GiB" else 0)
        # nothing is fetched for the first stage, embeddings and head, and so nothing by this thread
        assert (threading.current_thread().name in threads) == (budget != "1GiB")
    assert_close(found["1GiB"], found[2 * layer])


def test_weights_from_memory_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("llama", wide_norms=True)
    given = zoo.random_pairs(model, 3, 9)
    wanted = Engine(model).attribute(given, progress=False).contribution
    kept = {p.data_ptr() for p in model.model.layers.parameters()}
    engine = Engine(offload(model, tmp_path, "memory"))
    own, fetched = Fetcher.fetch, []

    def noted(self: Fetcher) -> dict[str, Tensor]:
        fetched.append(own(self))
        return fetched[-1]

    monkeypatch.setattr(Fetcher, "fetch", noted)
    found = engine.attribute(given, progress=False).contribution
    assert {x.data_ptr() for values in fetched for x in values.values()} == kept
    assert_close(found, wanted)


@PEAKS
def test_peaks_keep_to_the_budget(tmp_path: Path) -> None:
    """Weights, a batch at work and what waits together; in memory the layer inputs alone of the first pairs take 35 MB."""
    cases = [
        {"method": "atp", "pairs": 36, "positions": 48, "budget": "50MB"},
        {"method": "atp*", "pairs": 36, "positions": 64, "shared": 48, "budget": "40MB"},
        {"nodes": 12, "pairs": 8, "positions": 64, "budget": "60MB"},
    ]
    for case, found in zip(cases, measured("offloaded", cases, tmp_path), strict=True):
        budget = read_budget(case["budget"])
        assert budget is not None
        assert 0.6 * budget <= found["peak"] <= 1.1 * budget, (case, found)
