"""Replayed sweeps on a CPU: recordings by recorder.py, which repeats a recording's operations as a CUDA graph does, and the
recorded functions on `meta` tensors, from which nothing can be read. The graphs themselves are in test_cuda.py."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import zoo
from atp_fast import Attribution, Engine, PromptPairs, engine
from atp_fast.attribution import batch as batches
from atp_fast.attribution import replay
from atp_fast.attribution.batch import enter_pairs, extent, sweep_extent
from atp_fast.attribution.graphs import HostReads
from atp_fast.attribution.memory import SweepPlan
from atp_fast.attribution.question import METHODS
from atp_fast.attribution.replay import (
    Asked,
    Recording,
    Replays,
    batch_key,
    changed,
    model_state,
    varying,
)
from atp_fast.attribution.scores import Scores
from atp_fast.kernels import launch
from atp_fast.metrics import METRICS_BY_NAME
from atp_fast.nodes import KINDS
from atp_fast.ops import backends
from recorder import HostRead, Recorder, assert_same_bits
from test_spans import UNEQUAL, pairs_of

pytestmark = pytest.mark.filterwarnings("error:.*sweeping eagerly")
FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3"]


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are rounded as on a GPU."""
    monkeypatch.setattr(batches, "rounds_shapes", lambda device: True)


@functools.cache
def built(family: str) -> PreTrainedModel:
    return zoo.build(family, torch.float32)


def noted(recorders: list[Recorder], device: torch.device) -> Recorder:
    recorders.append(Recorder(device))
    return recorders[-1]


class Both:
    """Two engines on a model, of which one replays; what that one recorded."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self.recorders: list[Recorder] = []
        self.eager = Engine(model, "reference", **options)
        self.replaying = Engine(model, "reference", **options)
        self.replaying._replays = self.replays = Replays(functools.partial(noted, self.recorders))

    def attribute(self, pairs: PromptPairs, **options: Any) -> Attribution:
        """By the engine that replays; the other one gives the same bits."""
        found = self.replaying.attribute(pairs, progress=False, **options)
        assert_same_bits(found, self.eager.attribute(pairs, progress=False, **options))
        return found

    def replayed(self) -> list[int]:
        """How many sweeps each recording replayed, the one by which it was compared among them."""
        return [recorder.replays // 2 for recorder in self.recorders]


@contextlib.contextmanager
def planned(**changes: Any) -> Iterator[None]:
    """Plans with these changes."""

    def plan(*args: Any, **options: Any) -> SweepPlan:
        return own(*args, **options)._replace(**changes)

    own = engine.plan_sweep
    with mock.patch.object(engine, "plan_sweep", plan):
        yield


TOGETHER = {"together": True, "taped_from": 0}
"""As on a GPU with room."""
FEW: dict[str, Any] = {"method": "atp", "nodes": ["z", "neuron"]}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return built("llama")


def some_pairs(seed: int, **options: Any) -> PromptPairs:
    return zoo.random_pairs(built("llama"), 3, 9, seed, ragged=True, **options)


# ---- the same bits


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "atp*") for family in FAMILIES), *(("llama", m) for m in METHODS if m != "atp*")],
)
def test_replayed_sweeps_give_the_eager_bits(family: str, method: str) -> None:
    """Other tokens, lengths, splits, tables and metrics than those that were recorded."""
    model = built(family)
    both = Both(model)
    with planned(**TOGETHER):
        for seed, metric in enumerate(["logit_diff", "nll", "logit_diff", "kl"]):
            width, shared = (9, 0) if seed % 2 else (11, 2)
            pairs = zoo.random_pairs(model, 3, width, seed, ragged=True, shared_prefix=shared)
            both.attribute(pairs, method=method, metric=metric)
    assert both.replayed() == [2]


def all_positions(logits: Tensor, pairs: PromptPairs) -> Tensor:
    real = pairs.attention_mask.to(logits.device)
    chosen = logits.gather(2, pairs.clean_ids.to(logits.device)[..., None])[..., 0]
    return (chosen * real).sum(1)


def spanned(seed: int) -> PromptPairs:
    """Prompts of unequal lengths, in another order and of other tokens for every seed."""
    rows = UNEQUAL[seed:] + UNEQUAL[:seed]
    pairs = pairs_of(rows, padding_side="left" if seed % 2 else "right")
    for ids, mask in (
        (pairs.clean_ids, pairs.attention_mask),
        (pairs.corrupted_ids, pairs.corrupted_attention_mask),
    ):
        ids.add_(seed).mul_(mask)
    return pairs


OPTIONS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # pairs by seed, the engine's options, the plan's changes, the call's options
    "left padding": (lambda s: some_pairs(s, padding_side="left"), {}, TOGETHER, {}),
    "spans": (spanned, {}, TOGETHER, {}),
    "spans, apart": (spanned, {}, {"taped_from": 1}, {"method": "atp+graddrop"}),
    "prefix": (
        lambda s: zoo.random_pairs(built("llama"), 3, 24, s, ragged=True, shared_prefix=17 + s % 3),
        *({}, TOGETHER, {"metric": all_positions}),
    ),
    "one prefix": (
        lambda s: zoo.random_pairs(built("llama"), 1, 24, s, shared_prefix=17 + s % 3),
        *({}, {"taped_from": 2}, {}),
    ),
    "every position counts at first": (
        lambda s: zoo.random_pairs(built("llama"), 3, 16, s, ragged=s > 1),
        *({}, TOGETHER, {}),
    ),
    "all kinds, per pair": (some_pairs, {}, TOGETHER, {"nodes": KINDS, "per_pair": True}),
    "signed per pair": (some_pairs, {}, {}, {"method": "atp+qk", "per_pair": True}),
    "narrow products": (some_pairs, {"precision": "bf16"}, {}, {}),
    "chunks, no tapes": (some_pairs, {}, {"chunk": 2, "taped_from": 3}, {"direction": "denoising"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_whatever_is_asked(name: str, llama: PreTrainedModel) -> None:
    pairs, options, plan, asked = OPTIONS[name]
    both = Both(llama, **options)
    with planned(**plan):
        for seed in range(4):
            both.attribute(pairs(seed), **asked)
    assert both.replayed() == [2]


@pytest.mark.parametrize("padding", ["right", "left", "all left"])
def test_batches_of_one_call_add_up(padding: str, llama: PreTrainedModel) -> None:
    both, pairs = Both(llama), zoo.mixed_pairs(llama, padding)
    with planned(pairs=1, together=True, taped_from=0):
        both.attribute(pairs, per_pair=True)
    assert both.replayed() == [len(pairs) - 2]


def test_half_precision() -> None:
    both = Both(zoo.build("gemma3", torch.bfloat16))
    with planned(**TOGETHER):
        for seed in range(4):
            both.attribute(some_pairs(seed))
    assert both.replayed() == [2]


# ---- shapes


@pytest.mark.parametrize(
    ("shared", "length", "wanted"),
    [(0, 5, (0, 16)), (0, 16, (0, 16)), (15, 17, (0, 32)), (17, 30, (16, 16)), (16, 32, (16, 16))],
)
def test_shapes_are_rounded(
    shared: int, length: int, wanted: tuple[int, int], llama: PreTrainedModel
) -> None:
    plug = Engine(llama, "reference").plug
    pairs = zoo.random_pairs(llama, 2, length, shared_prefix=shared)
    assert sweep_extent(plug, pairs) == wanted
    batches.rounds_shapes = lambda device: False  # put back by the fixture
    assert sweep_extent(plug, pairs) == extent(plug, pairs) == (shared, length - shared)


def test_steps_grow_with_the_length_and_keep_to_the_context(llama: PreTrainedModel) -> None:
    plug = Engine(llama, "reference").plug
    for context, length, wanted in (
        (None, 256, 256),
        (None, 257, 288),
        (None, 513, 576),
        (None, 2000, 2048),
        (530, 513, 530),
    ):
        plug.inspection.context = context
        assert sweep_extent(plug, zoo.random_pairs(llama, 1, length)) == (0, wanted)
    plug.moves = False  # a model of another kind
    assert sweep_extent(plug, zoo.random_pairs(llama, 1, 513)) == (0, 513)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_rounded_shapes_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 3, 23, ragged=True, shared_prefix=17)
    answer = Engine(model, "reference").attribute
    found = answer(pairs, metric=all_positions, nodes=KINDS, per_pair=True, progress=False)
    monkeypatch.setattr(batches, "rounds_shapes", lambda device: False)
    wanted = answer(pairs, metric=all_positions, nodes=KINDS, per_pair=True, progress=False)
    assert found.per_pair is not None
    assert wanted.per_pair is not None
    for kind, right in wanted.per_pair.items():
        assert (found.per_pair[kind] - right).abs().max() <= 1e-12 * right.abs().max(), kind


# ---- nothing recorded depends on the host


class NoGraphs(Recorder):
    """Not to be used."""

    def capture(self, function: Any) -> Any:
        raise AssertionError


def run_on_meta(
    model: PreTrainedModel, pairs: PromptPairs, method: str, backend: str = "reference", **plan: Any
) -> None:
    """Both recorded parts with weights, inputs and scores on `meta`: reading a number of theirs raises."""
    plug = Engine(copy.deepcopy(model), "reference").plug
    kinds = tuple(kind for kind in KINDS if kind not in plug.inspection.refused)
    with plug.plugged():
        batch = enter_pairs(plug, pairs, *sweep_extent(plug, pairs))
        plug.model.to("meta")
        plug.backend = backend
        tensors, order = varying(batch)
        inputs, places = [x.to("meta") for x in tensors], iter(order)
        batch = changed(batch, lambda _: inputs[next(places)])
        space = plug.space(pairs.width, kinds)
        scores = Scores(space, METHODS[method], plug.device, torch.float32, len(pairs))
        chosen = SweepPlan(len(pairs), 2, 0, together=True)._replace(**plan)
        rows = torch.arange(len(pairs), device=plug.device)
        asked = Asked(plug, batch, METRICS_BY_NAME["nll"], chosen, scores, rows, len)
        recording = Recording(NoGraphs(plug.device), asked)
        with stubbed_kernels(), HostReads(plug.device, []) as reads:
            runs = recording.forwards(plug)
            recording._cotangent = torch.empty_like(runs.clean[-1])
            recording.layers(plug, runs)
        assert reads.found is None, reads.found


@contextlib.contextmanager
def stubbed_kernels() -> Iterator[None]:
    """Inside, the Triton backend takes tensors on `meta`, and starts nothing."""
    with (
        mock.patch.dict(backends._DEVICES, triton="meta"),
        mock.patch.object(launch, "_start", lambda *_: None),
    ):
        yield


META = {
    "padded": (some_pairs, {}),
    "left": (lambda s: some_pairs(s, padding_side="left"), {"together": False}),
    "prefix": (OPTIONS["prefix"][0], {}),
    "spans": (spanned, {"taped_from": 1}),
    "narrow": (some_pairs, {"precision": "bf16", "together": False}),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("family", "case"), [*((f, "padded") for f in FAMILIES), *(("llama", c) for c in META)]
)
def test_nothing_recorded_is_read(family: str, case: str, backend: str) -> None:
    pairs, plan = META[case]
    for method in ("atp", "atp*"):
        run_on_meta(built(family), pairs(1), method, backend, **plan)


@pytest.mark.parametrize(
    "read",
    [lambda x: bool(x.any()), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x.cpu()],
)
def test_what_is_read_raises_on_meta(
    read: Any, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read planted beside the scores."""
    own = Scores.add

    def add(scores: Scores, kind: str, layer: int, place: Any, *args: Any, **named: Any) -> None:
        own(scores, kind, layer, place, *args, **named)
        read(scores.score[kind])

    monkeypatch.setattr(Scores, "add", add)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_on_meta(llama, some_pairs(1), "atp")


def test_what_the_host_reads_is_found() -> None:
    x, mask = torch.arange(6.0), torch.arange(6) > 2
    reads: dict[str, Any] = {
        "_local_scalar_dense": lambda: bool(mask.any()),
        "nonzero": mask.nonzero,
        "index": lambda: x[mask],
        "index_put_": lambda: x.clone().__setitem__(mask, 0.0),
        "equal": lambda: torch.equal(x, x),
        "masked_select": lambda: x.masked_select(mask),
        "_to_copy": lambda: x.to("meta"),
        "copy_": lambda: torch.empty(6, device="meta").copy_(x),
    }
    for name, read in reads.items():
        with HostReads(torch.device("cpu"), []) as found:
            read()
        assert found.found is not None, name
        assert f"aten.{name}." in found.found
    with HostReads(torch.device("cpu"), [mask]) as found:
        bool(mask[3])  # a constant, in a view
        x[torch.arange(2)] = torch.where(mask, x, 0.0)[:2].to(torch.float64).to(x)
        torch.full((2,), 3.0, device="meta")
    assert found.found is None


def test_the_recorder_refuses_what_a_graph_cannot_hold() -> None:
    x, recorder = torch.ones(3), Recorder(torch.device("cpu"))
    with pytest.raises(HostRead):
        recorder.capture(lambda: float((x + 1).sum()))
    total = recorder.capture(lambda: x.mul_(2).sum())
    assert x.tolist() == [1, 1, 1]
    assert total.isnan()
    x.fill_(3)
    recorder.replay(0)
    assert (x.tolist(), float(total)) == ([6, 6, 6], 18)


# ---- what is not recorded


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["experts", "hook", "mode", "odd argument"])
def test_other_models_are_swept_eagerly_without_a_word(
    what: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = {"experts": zoo.build("mixtral", torch.float32)}
    model = families.get(what, llama)
    both = Both(model)
    mode: Any = contextlib.nullcontext()
    if what == "hook":
        handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    if what == "mode":
        mode = Watching()
    if what == "odd argument":
        own = both.replaying.plug.enter

        def enter(*args: Any) -> Any:
            x, arguments = own(*args)
            return x, [a._replace(kwargs={**a.kwargs, "use_cache": [x]}) for a in arguments]

        monkeypatch.setattr(both.replaying.plug, "enter", enter)
    with warnings.catch_warnings(), mode:
        warnings.simplefilter("error")
        for seed in range(3):
            both.attribute(some_pairs(seed), **FEW)
    assert both.recorders == []
    if what == "hook":
        handle.remove()


def test_what_models_are_not_recorded(llama: PreTrainedModel) -> None:
    plug = Engine(llama, "reference").plug
    assert model_state(plug) is not None
    for owner, name, value in (
        (plug, "own_softmax", True),
        (plug, "quantised", [None]),
        (plug.shares, "group", object()),
        (type(plug), "offloaded", True),
        (type(plug), "device", torch.device("meta")),
    ):
        with mock.patch.object(owner, name, value):
            assert model_state(plug) is None, name
    assert model_state(plug) is not None


def test_batches_that_do_not_differ_are_no_sights(llama: PreTrainedModel) -> None:
    both = Both(llama)
    with pytest.warns(UserWarning, match="identical"):
        same = PromptPairs(*(some_pairs(0).clean_ids,) * 2, torch.tensor([1, 2, 3]))
    for _ in range(3):
        both.replaying.attribute(same, "nll", progress=False)
    assert both.recorders == []


# ---- what changes between calls


def test_weights_may_change_in_place(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    both = Both(model)
    for seed in range(4):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        both.attribute(some_pairs(seed), **FEW)
    assert both.replayed() == [2]


@pytest.mark.parametrize("what", ["weight", "setting", "eps"])
def test_another_model_is_recorded_anew(what: str, llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    both = Both(model)
    for seed in range(3):
        both.attribute(some_pairs(seed), **FEW)
    layer = model.model.layers[1]
    before = both.replaying.attribute(some_pairs(7), progress=False, **FEW)
    if what == "weight":
        weight = layer.mlp.up_proj.weight.detach() * 2
        layer.mlp.up_proj.weight = torch.nn.Parameter(weight)
    elif what == "setting":
        layer.self_attn.scaling *= 2
    else:
        layer.scale = {"outputs": [2.0]}
        own = layer.mlp.forward
        layer.mlp.forward = lambda x: own(x) * layer.scale["outputs"][0]
        both.attribute(some_pairs(7), **FEW)
        layer.scale["outputs"][0] = 3.0
    after = both.attribute(some_pairs(7), **FEW)
    assert not torch.equal(before.contribution["neuron"], after.contribution["neuron"])
    assert both.replayed() == [2]


def test_settings_of_torch_are_in_the_key(llama: PreTrainedModel) -> None:
    found, plug = set(), Engine(llama, "reference").plug
    with plug.plugged():
        batch = enter_pairs(plug, some_pairs(0), 0, 16)
        scores = Scores(plug.space(9, ("q",)), METHODS["atp"], plug.device, torch.float32)
        rows = torch.arange(3)
        asked = Asked(plug, batch, METRICS_BY_NAME["nll"], SweepPlan(3, 1, 0), scores, rows, len)
        found.add(batch_key(asked))
        with torch.autocast("cpu"):
            found.add(batch_key(asked))
        found.add(batch_key(asked._replace(plan=SweepPlan(3, 2, 0))))
        found.add(batch_key(asked._replace(metric=METRICS_BY_NAME["kl"])))
        assert len(found) == 3
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_bf16_reduced_precision_reduction
        try:
            matmul.allow_bf16_reduced_precision_reduction = not before
            found.add(batch_key(asked))
        finally:
            matmul.allow_bf16_reduced_precision_reduction = before
    assert len(found) == 4


def test_either_way_of_setting_the_precision_of_products_is_in_the_key() -> None:
    """In a process of its own: torch refuses its older question for good once the newer one was answered."""
    script = """
import torch
from atp_fast.attribution.replay import _product_precision
found = {_product_precision()}
torch.set_float32_matmul_precision("high")
found.add(_product_precision())
torch.set_float32_matmul_precision("highest")
torch.backends.cuda.matmul.fp32_precision = "tf32"
found.add(_product_precision())
torch.backends.cuda.matmul.fp32_precision = "ieee"
found.add(_product_precision())
print(len(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3


# ---- memory, failures, and the end


class Short(Recorder):
    """Runs out of memory when it records or, once it was compared, replays."""

    when = "capture"

    def capture(self, function: Any) -> Any:
        if self.when == "capture":
            raise torch.OutOfMemoryError("no room")
        return super().capture(function)

    def replay(self, part: int) -> None:
        if self.when == f"replay {part}" and self.replays >= 4:
            raise torch.OutOfMemoryError("no room")
        super().replay(part)


@pytest.mark.parametrize("when", ["capture", "replay 0", "replay 1"])
def test_out_of_memory_is_an_eager_sweep(
    when: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Short, "when", when)
    both = Both(llama)
    both.replays._graphs = Short
    with pytest.warns(UserWarning, match="out of memory.*: sweeping eagerly, as") as said:
        for seed in range(9):
            both.attribute(some_pairs(seed), **FEW)
    assert len(said) == 1
    assert both.replays.bytes == 0 or when != "capture"


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Python does not look for cycles, which would hide that there are some."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("when", ["call", "replay 0", "replay 1"])
def test_memory_is_free_again_before_the_eager_sweep(
    when: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, no_collection: None
) -> None:
    """What ran out of it is neither held by the error's traceback nor by a frame that goes on."""
    held: list[weakref.ref[Any]] = []
    alive: list[int] = []
    forwards, layers, swept = Recording.forwards, Recording.layers, replay.sweep_batch

    def noting(recording: Recording, plug: Any) -> Any:
        runs = forwards(recording, plug)
        held.extend([weakref.ref(recording), weakref.ref(runs)])
        return runs

    def short(*given: Any) -> None:
        if when == "call":
            raise torch.OutOfMemoryError("no room")
        layers(*given)

    def eager(*args: Any, **named: Any) -> Any:
        alive.append(len({id(each()) for each in held if each() is not None}))
        return swept(*args, **named)

    monkeypatch.setattr(Short, "when", when)
    monkeypatch.setattr(Recording, "forwards", noting)
    monkeypatch.setattr(Recording, "layers", short)
    monkeypatch.setattr(replay, "sweep_batch", eager)
    engine = Engine(llama, "reference")
    engine._replays = Replays(Short)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(2 if when == "call" else 5):
            engine.attribute(some_pairs(seed), progress=False, **FEW)
    # a recording's first batches, the one compared with it while it lives, and the one after it failed
    assert held and alive == ([0, 0] if when == "call" else [0, 1, 0])


class Wrong(Recorder):
    """Repeats what it recorded a little wrongly, or not at all."""

    def replay(self, part: int) -> None:
        super().replay(part)
        for table in self.parts[1].before.values() if part else ():
            whole = table[0].view(torch.float32)
            whole[:1] += 1e-3


class Broken(Recorder):
    def capture(self, function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        (Wrong, "a replayed sweep gave other numbers than the eager one"),
        (Broken, r"a sweep could not be recorded \(RuntimeError: operation not permitted"),
    ],
)
def test_a_wrong_recording_gives_no_number(
    graphs: type[Recorder], message: str, llama: PreTrainedModel
) -> None:
    both = Both(llama)
    both.replays._graphs = graphs
    with pytest.warns(UserWarning, match=message) as said:
        for seed in range(4):
            both.attribute(some_pairs(seed), **FEW)
    assert len(said) == 1
    assert both.replays.bytes == 0


def test_what_is_not_finite_is_told_as_ever(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    both = Both(model)
    for seed in range(3):
        both.attribute(some_pairs(seed), **FEW)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(torch.inf)
    with pytest.raises(ValueError, match="not finite .* in layer 1"):
        both.replaying.attribute(some_pairs(3), progress=False, **FEW)
    assert both.replayed() == [1]


def test_a_metric_that_raises_leaves_the_recording_good(llama: PreTrainedModel) -> None:
    def picky(logits: Tensor, pairs: PromptPairs) -> Tensor:
        if raises:
            raise ArithmeticError
        return logits[:, -1, 3] - logits[:, -1, 5]

    both, raises = Both(llama), False
    for seed in range(3):
        both.attribute(some_pairs(seed), metric=picky, **FEW)
    raises = True
    with pytest.raises(ArithmeticError):
        both.replaying.attribute(some_pairs(3), metric=picky, progress=False, **FEW)
    raises = False
    both.attribute(some_pairs(3), metric=picky, **FEW)
    assert len(both.recorders) == 1


def test_few_are_kept_and_shapes_that_take_turns_are_not_recorded_each_time(
    llama: PreTrainedModel,
) -> None:
    both = Both(llama)

    def call(pairs: int, width: int, times: int = 1) -> None:
        for seed in range(times):
            drawn = zoo.random_pairs(llama, pairs, width, seed)
            both.attribute(drawn, **FEW)

    shapes = [(1, 6), (2, 6), (1, 20), (2, 20), (3, 6)]

    for count in shapes[:4]:
        call(*count, times=2)
    call(*shapes[0])
    assert both.replayed() == [1, 0, 0, 0]
    call(*shapes[4], times=2)  # in the place of the second, which was not used for longest
    assert [len(both.recorders), len(both.replays._recorded)] == [5, 4]
    call(*shapes[1], times=3)
    assert len(both.recorders) == 5
    call(*shapes[1])  # in the place of the third
    assert len(both.recorders) == 6
    for count in shapes:
        call(*count)
    assert both.replayed() == [2, 0, 0, 1, 1, 1]


def test_recordings_keep_to_half_of_the_budget(llama: PreTrainedModel) -> None:
    pairs = [some_pairs(seed) for seed in range(4)]
    whole = Both(llama)
    whole.attribute(pairs[0], **FEW)
    whole.attribute(pairs[1], **FEW)
    held = whole.replays.bytes
    assert held > 0
    assert whole.replaying._budget().bytes >= held
    with mock.patch("atp_fast.attribution.memory.free_memory", lambda device: 10**7):
        assert whole.replaying._budget().bytes == (10**7 + held) // 2
    tight = Both(llama, memory_budget=held)  # what it records is too much then
    none = Both(llama, memory_budget=1)
    for each in pairs:
        tight.attribute(each, **FEW)
        none.attribute(each, **FEW)
    assert tight.replays.bytes == 0
    assert none.recorders == []
    # what is patched shares the budget with what is recorded
    roomy = Both(llama, memory_budget=4 * held)
    for each in pairs:
        roomy.attribute(each, **FEW)
    assert roomy.replays.bytes == held
    assert roomy.replaying.patching(pairs[0], ["q"]).budget.bytes == 3 * held


def test_recordings_go_where_an_eager_sweep_needs_room(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Both(llama)
    for seed in range(3):
        both.attribute(some_pairs(seed), **FEW)
    assert both.replays.bytes > 0
    own, fails = Scores.add, [True]

    def add(scores: Scores, *args: Any, **named: Any) -> None:
        if fails and args[0] == "z" and args[1] == 1:
            fails.clear()
            raise torch.OutOfMemoryError("no room")
        own(scores, *args, **named)

    monkeypatch.setattr(Scores, "add", add)
    other = zoo.random_pairs(llama, 2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it makes room before it does less at once
        found = both.replaying.attribute(other, progress=False, **FEW)
    assert both.replays.bytes == 0
    assert_same_bits(found, both.eager.attribute(other, progress=False, **FEW))


def test_no_recording_outlives_its_engine(llama: PreTrainedModel) -> None:
    both = Both(llama)
    for seed in range(3):
        both.attribute(some_pairs(seed), **FEW)
    ends = [weakref.ref(both.recorders.pop())]
    ends += [weakref.ref(recording) for recording in both.replays._recorded.values()]
    assert all(end() is not None for end in ends)
    del both
    assert all(end() is None for end in ends)


def test_the_argument(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="replay must be True or False, got 'auto'"):
        Engine(llama, replay="auto")
    assert Engine(llama)._replays is None
    monkeypatch.setattr(engine, "backend_for", lambda *_: "triton")
    assert isinstance(Engine(llama)._replays, Replays)
    assert Engine(llama, replay=False)._replays is None
