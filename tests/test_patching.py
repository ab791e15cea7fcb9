"""Exact patching against whole forward passes of the plain model (naive_patching.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_fast.patching.sessions
import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.attribution.memory import Budget
from atp_fast.metrics import METRICS, resolve
from atp_fast.nodes import KINDS, Node
from atp_fast.patching.sessions import Patching, PatchSession
from atp_fast.results import PatchEffects
from naive_patching import naive_effects

POSITIONS = 8


def tolerance_of(family: str) -> float:
    """mixtral takes its routing weights in float32."""
    return 1e-6 if family == "mixtral" else 1e-9


def some_nodes(engine: Engine, kinds: Sequence[str], count: int, seed: int = 0) -> list[Node]:
    """So many nodes of every kind, at random layers and positions, the kinds mixed."""
    random = Random(seed)
    nodes = []
    for kind in kinds:
        all_of_kind = list(engine.plug.space(POSITIONS, [kind]))
        nodes += random.sample(all_of_kind, min(count, len(all_of_kind)))
    random.shuffle(nodes)
    return nodes


def some_subsets(
    engine: Engine, kinds: Sequence[str], count: int, seed: int = 0
) -> list[list[Node]]:
    """Subsets of 0, 1, 2, ... nodes."""
    random = Random(seed)
    nodes = list(engine.plug.space(POSITIONS, kinds))
    return [random.sample(nodes, size) for size in range(count)]


def ragged(model: Any, side: str, shared: int = 2, n: int = 4) -> PromptPairs:
    return zoo.random_pairs(
        model, n, POSITIONS, seed=1, ragged=True, padding_side=side, shared_prefix=shared
    )


def assert_naive(
    found: PatchEffects,
    model: Any,
    pairs: PromptPairs,
    subsets: Sequence[Sequence[Node]],
    metric: Any,
    tolerance: float = 1e-9,
) -> None:
    directed = pairs if found.direction == "noising" else pairs.swapped()
    effect, clean_value = naive_effects(model, directed, subsets, resolve(metric, directed))
    largest = float(effect.abs().max())
    assert largest > 1e-3
    assert found.effect.shape == effect.shape
    assert float((found.effect - effect).abs().max()) <= tolerance * largest
    assert float((found.clean_value - clean_value).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_last_layer_at_the_last_position_alone(
    family: str, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one length: the last layer is run for the metric's position; its nodes elsewhere, k and v too."""
    model = zoo.build(family, wide_norms=True)
    pairs = zoo.random_pairs(model, 2, POSITIONS, shared_prefix=shared)
    engine = Engine(model, backend="reference")
    widths = []
    whole = PatchSession._run_layer

    def noted(self: PatchSession, layer: int, x: Tensor, *arguments: Any) -> Tensor:
        widths.append((layer, x.shape[1]))
        return whole(self, layer, x, *arguments)

    monkeypatch.setattr(PatchSession, "_run_layer", noted)
    last = engine.plug.inspection.layers - 1
    nodes = [
        Node(kind, layer, position, 1 if kind == "neuron" else 0)
        for kind in KINDS
        for layer in (last - 1, last)
        for position in (shared, POSITIONS - 2, POSITIONS - 1)
    ]
    subsets = [*([node] for node in nodes), nodes[::5], nodes[1::7], nodes]
    found = engine.patch_subsets(pairs, subsets, "logit_diff", progress=False)
    wanted, _ = naive_effects(model, pairs, subsets, resolve("logit_diff", pairs))
    assert (found.effect - wanted).abs().max() <= tolerance_of(family) * wanted.abs().max()
    assert {width for layer, width in widths if layer == last} == {1}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_single_nodes_equal_the_naive_way(family: str, side: str) -> None:
    """All kinds, layers and positions in one call, pairs of four lengths with a shared prefix."""
    model = zoo.build(family, wide_norms=True)
    engine, pairs = Engine(model), ragged(model, side)
    nodes = some_nodes(engine, KINDS, 24)
    direction = "noising" if side == "right" else "denoising"
    found = engine.patch(pairs, nodes, direction=direction, progress=False)
    assert found.nodes == nodes
    assert_naive(
        found, model, pairs, [[node] for node in nodes], "logit_diff", tolerance_of(family)
    )


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_subsets_equal_the_naive_way(family: str) -> None:
    model = zoo.build(family, wide_norms=True)
    engine, pairs = Engine(model, "reference"), ragged(model, "left", shared=1)
    subsets = some_subsets(engine, KINDS, 30)
    found = engine.patch_subsets(pairs, subsets, progress=False)
    assert found.subsets == subsets
    assert not found.effect[:, 0].any()
    assert_naive(found, model, pairs, subsets, "logit_diff", tolerance_of(family))


def every_position(logits: Tensor, pairs: PromptPairs) -> Tensor:
    return (logits.tanh().sum(-1) * pairs.attention_mask).sum(1)


def a_middle_position(logits: Tensor, pairs: PromptPairs) -> Tensor:
    """Later positions have no effect on it."""
    return logits[torch.arange(len(pairs)), pairs.last - 2, pairs.answer_ids]


def eap_ig(logits: Tensor, clean_logits: Tensor, input_length: Tensor, labels: Tensor) -> Tensor:
    rows = torch.arange(len(logits))
    last, source = logits[rows, input_length - 1], clean_logits[rows, input_length - 1]
    return (last - source).gather(1, labels)[:, 0] ** 2


def last_only(logits: Tensor, pairs: PromptPairs) -> Tensor:
    return logits[:, 0].gather(1, pairs.answer_ids[:, None])[:, 0] ** 2


last_only.positions = "last"  # type: ignore[attr-defined]


def against_the_mean(logits: Tensor) -> Tensor:
    """Of all pairs at once: what is patched in one pair shows in all."""
    value = logits[:, -1].tanh().sum(-1)
    return value * value.mean()


METRIC_CASES: list[Any] = [
    *METRICS,
    every_position,
    a_middle_position,
    eap_ig,
    last_only,
    against_the_mean,
]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize(
    "metric", METRIC_CASES, ids=lambda m: m if isinstance(m, str) else m.__name__
)
def test_metrics(metric: Any, shared: int, direction: str) -> None:
    model = zoo.build("gemma2", wide_norms=True)
    engine, pairs = Engine(model), ragged(model, "left", shared)
    nodes = some_nodes(engine, KINDS, 4)
    subsets = [[node] for node in nodes] + some_subsets(engine, KINDS, 8)
    found = engine.patch_subsets(pairs, subsets, metric, direction, progress=False)
    assert_naive(found, model, pairs, subsets, metric)


@pytest.mark.parametrize("metric", ["nll", every_position, against_the_mean])
def test_right_padding(metric: Any) -> None:
    """The last column is padding of the shorter pairs; a metric of all pairs at once needs none."""
    model = zoo.build("gpt2")
    pairs = ragged(model, "right")
    if metric is against_the_mean:
        pairs = zoo.random_pairs(model, 3, POSITIONS, shared_prefix=2)
    engine = Engine(model)
    nodes = some_nodes(engine, KINDS, 6)
    found = engine.patch(pairs, nodes, metric, progress=False)
    assert_naive(found, model, pairs, [[node] for node in nodes], metric)


def test_every_node_of_a_small_model() -> None:
    model = zoo.build("llama", wide_norms=True, num_hidden_layers=2)
    engine, pairs = Engine(model), zoo.random_pairs(model, 1, 4, shared_prefix=1)
    nodes = list(engine.plug.space(4, KINDS))
    found = engine.patch(pairs, nodes, "nll", progress=False)
    assert_naive(found, model, pairs, [[node] for node in nodes], "nll")


def test_each_subset_on_its_own_pair() -> None:
    model = zoo.build("qwen3", wide_norms=True)
    parts = [ragged(model, "left", shared, n=5) for shared in range(4)]
    engine, pairs = Engine(model), PromptPairs.concat(parts)
    subsets = some_subsets(engine, KINDS, 25)
    where = torch.tensor([Random(i).randrange(20) for i in range(25)])
    found = engine.patch_subsets(pairs, subsets, pair_index=where, progress=False)
    wanted = naive_effects(model, pairs, subsets, resolve("logit_diff", pairs))[0]
    columns = torch.arange(25)
    largest = float(wanted.abs().max())
    assert float((found.effect - wanted)[where, columns].abs().max()) <= 1e-9 * largest
    assert found.valid is not None
    asked = torch.zeros(20, 25, dtype=torch.bool)
    asked[where, columns] = True
    present = torch.tensor(
        [[all(mask[node.position] for node in s) for s in subsets] for mask in pairs.attention_mask]
    )
    assert torch.equal(found.valid, asked & present)
    assert not found.effect[~asked].any()


@contextmanager
def rows_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> Iterator[list[int]]:
    """Row batches of at most so many rows; yields the positions each batch was planned for."""
    planned: list[int] = []

    def few(plug: object, room: int, positions: int, *rest: int) -> int:
        planned.append(positions)
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(atp_fast.patching.sessions, "patched_rows", few)
        yield planned


def test_batches_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("gpt_oss", wide_norms=True)
    engine, pairs = Engine(model), ragged(model, "left")
    nodes = some_nodes(engine, KINDS, 6)
    whole = engine.patch(pairs, nodes, progress=False)
    largest = float(whole.effect.abs().max())
    for rows in (1, 7):
        with rows_at_once(monkeypatch, rows) as planned:
            found = engine.patch(pairs, nodes, progress=False)
        assert len(planned) >= 40 // rows
        assert max(planned) > min(planned)  # later rows run fewer positions
        assert float((found.effect - whole.effect).abs().max()) <= 1e-12 * largest


@pytest.mark.parametrize("budget", [1, "300 KB", "8GiB"])
def test_a_budget_changes_nothing(budget: int | str) -> None:
    model = zoo.build("gemma3", wide_norms=True)
    pairs = ragged(model, "right")
    engine = Engine(model)
    nodes = some_nodes(engine, KINDS, 6)
    whole = engine.patch(pairs, nodes, progress=False)
    found = Engine(model, memory_budget=budget).patch(pairs, nodes, progress=False)
    largest = float(whole.effect.abs().max())
    assert float((found.effect - whole.effect).abs().max()) <= 1e-12 * largest


@pytest.mark.parametrize("metric", ["logit_diff", every_position, against_the_mean])
def test_batches_of_pairs_change_nothing(metric: Any) -> None:
    """Pairs that share 0, 1, ... tokens, in batches of 2 with prefixes of their own; a metric of all pairs has one."""
    model = zoo.build("phi")
    parts = [zoo.random_pairs(model, 1, POSITIONS, seed=s, shared_prefix=s) for s in range(6)]
    pairs = PromptPairs.concat(parts)
    engine = Engine(model)
    nodes = some_nodes(engine, KINDS, 5)
    whole = engine.patch(pairs, nodes, metric, progress=False)
    with engine.plug.plugged():
        budget = Budget(2**30, auto=False)
        patching = Patching(engine.plug, pairs, resolve(metric, pairs), KINDS, budget, 2)
        effect, measured = patching.effects(nodes)
    batches = 1 if metric is against_the_mean else 3
    assert len(patching.batches) == batches
    assert bool(measured.all())
    largest = float(whole.effect.abs().max())
    assert float((effect - whole.effect).abs().max()) <= 1e-12 * largest
    assert float((patching.clean_value - whole.clean_value).abs().max()) <= 1e-12 * largest
    assert_naive(whole, model, pairs, [[node] for node in nodes], metric)


@pytest.mark.parametrize("budget", [1, "60KB", "1GiB"])
def test_runs_that_the_budget_does_not_hold_are_made_again(
    budget: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same effects, on all pairs and on one pair each, call after call; only runs that are needed are made."""
    model = zoo.build("llama")
    pairs = zoo.random_pairs(model, 5, POSITIONS, ragged=True)
    free = Engine(model).patching(pairs, KINDS)
    patching = Engine(model, memory_budget=budget).patching(pairs, KINDS)
    nodes = some_nodes(Engine(model), KINDS, 4)
    asked: list[int] = []
    make = patching._sessions
    monkeypatch.setattr(
        patching, "_sessions", lambda numbers: asked.extend(numbers) or make(numbers)
    )
    wanted, measured = free.effects(nodes)
    for _ in range(2):
        found, valid = patching.effects(nodes)
        assert float((found - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
        assert torch.equal(valid, measured)
    torch.testing.assert_close(patching.clean_value, free.clean_value, rtol=1e-12, atol=0)
    asked.clear()
    index = torch.full((len(nodes),), 4)
    one, _ = patching.effects(nodes, [[i] for i in range(len(nodes))], index)
    assert float((one[4] - wanted[4]).abs().max()) <= 1e-12 * float(wanted.abs().max())
    batches = {1: 5, "60KB": 5, "1GiB": 1}[budget]
    assert len(patching.batches) == batches and len(asked) == 1
    assert (len(patching._kept) == batches) == (budget == "1GiB")


@pytest.mark.parametrize("metric", ["nll", every_position])
@pytest.mark.parametrize("padding", ["right", "left", "all left"])
@pytest.mark.parametrize("pairs_at_once", [1, 2, 3])
def test_batches_of_mixed_pairs(pairs_at_once: int, padding: str, metric: Any) -> None:
    """Pairs with a common start that split anywhere, in unsorted batches: nodes, and subsets each on its own pair."""
    model = zoo.build("mistral" if pairs_at_once == 2 else "gpt2", wide_norms=True)
    pairs = zoo.mixed_pairs(model, padding)
    engine = Engine(model)
    random = Random(pairs_at_once)
    nodes = [
        random.choice(list(engine.plug.space(pairs.clean_ids.shape[1], [kind])))
        for kind in KINDS
        for _ in range(6)
    ]
    budget = Budget(2**30, auto=False)
    patching = Patching(engine.plug, pairs, resolve(metric, pairs), KINDS, budget, pairs_at_once)
    effect, measured = patching.effects(nodes)
    wanted, clean_value = naive_effects(model, pairs, [[n] for n in nodes], resolve(metric, pairs))
    largest = float(wanted.abs().max())
    assert largest > 1e-3
    assert float((effect - wanted).abs().max()) <= 1e-9 * largest
    assert float((patching.clean_value - clean_value).abs().max()) <= 1e-9
    assert torch.equal(measured, pairs.attention_mask[:, [n.position for n in nodes]])
    index = torch.tensor([random.randrange(len(pairs)) for _ in nodes])
    single, asked = patching.effects(nodes, [[i] for i in range(len(nodes))], index)
    columns = torch.arange(len(nodes))
    assert torch.equal(single[index, columns], single.sum(0))
    assert float((single[index, columns] - wanted[index, columns]).abs().max()) <= 1e-9 * largest
    assert torch.equal(asked.sum(0), measured[index, columns].long())


@pytest.mark.parametrize("side", ["right", "left"])
def test_shared_tokens_have_effect_zero_and_padding_is_not_valid(side: str) -> None:
    model = zoo.build("llama", dtype=torch.float32)
    engine, pairs = Engine(model), ragged(model, side)
    nodes = list(engine.plug.space(POSITIONS, ["v", "mlp_out", "resid_pre"]))
    found = engine.patch(pairs, nodes, "nll", progress=False)
    assert found.valid is not None
    positions = torch.tensor([node.position for node in nodes])
    real = pairs.attention_mask[:, positions]
    moved = real & (positions >= (pairs.starts + pairs.split)[:, None])
    assert torch.equal(found.valid, real)
    assert not found.effect[~moved].any()
    reaching = [node.kind == "resid_pre" and node.layer == 0 for node in nodes]
    assert found.effect[moved & torch.tensor(reaching)].all()


def test_identical_prompts_have_effect_zero() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, POSITIONS)
    corrupted = torch.stack([pairs.clean_ids[0], pairs.corrupted_ids[1]])
    with pytest.warns(UserWarning, match="identical"):
        pairs = PromptPairs(pairs.clean_ids, corrupted, pairs.answer_ids, pairs.wrong_answer_ids)
        engine = Engine(model)
        found = engine.patch(pairs, some_nodes(engine, KINDS, 5), progress=False)
    assert not found.effect[0].any()
    assert found.effect[1].any()


def test_all_of_layer_0_gives_the_corrupted_run() -> None:
    model = zoo.build("mistral")
    pairs = zoo.random_pairs(model, 3, POSITIONS)
    whole = [Node("resid_pre", 0, position) for position in range(POSITIONS)]
    found = Engine(model).patch_subsets(pairs, [whole], progress=False)
    other = Engine(model).patch_subsets(pairs.swapped(), [whole], progress=False)
    total = found.clean_value + found.effect[:, 0]
    assert torch.allclose(total, other.clean_value, rtol=1e-12, atol=1e-12)


def test_two_runs_are_bit_equal_and_a_session_can_be_used_again() -> None:
    model = zoo.build("llama", dtype=torch.float32)
    engine, pairs = Engine(model), ragged(model, "right")
    nodes = some_nodes(engine, KINDS, 5)
    first = engine.patch(pairs, nodes, progress=False).effect
    assert torch.equal(first, engine.patch(pairs, nodes, progress=False).effect)
    patching = engine.patching(pairs, KINDS)
    with engine.plug.plugged():
        for _ in range(2):
            effect = patching.effects(nodes)[0]
            assert float((effect - first).abs().max()) <= 1e-4 * float(first.abs().max())


def test_progress_counts_every_row() -> None:
    model = zoo.build("gpt2")
    engine, pairs = Engine(model), ragged(model, "left")
    nodes = some_nodes(engine, KINDS, 3)
    for metric in ("nll", against_the_mean):
        steps: list[int] = []
        patching = engine.patching(pairs, KINDS, metric)
        with engine.plug.plugged():
            patching.effects(nodes, advance=steps.append)
        assert sum(steps) == len(nodes) * len(pairs)


def test_no_nodes() -> None:
    model = zoo.build("gpt2")
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, POSITIONS)
    with pytest.raises(ValueError, match="nodes must not be empty"):
        engine.patch(pairs, [])
    assert engine.estimate_patch(pairs, []).seconds == 0
    with pytest.raises(ValueError, match="subsets must not be empty"):
        engine.patch_subsets(pairs, [])
    found = engine.patch_subsets(pairs, [[], []], progress=False)
    assert found.effect.tolist() == [[0.0, 0.0]] * 2
    assert found.valid is None


WRONG: dict[str, tuple[Callable[[Engine, PromptPairs], object], type[Exception], str]] = {
    "pairs": (lambda e, p: e.patch(p.clean_ids, []), TypeError, "pairs must be PromptPairs"),
    "pairs to estimate": (
        lambda e, p: e.estimate_patch(p.clean_ids, []),
        TypeError,
        "pairs must be PromptPairs",
    ),
    "pairs of a bound": (
        lambda e, p: e.bound_missed(p.clean_ids),
        TypeError,
        "pairs must be PromptPairs",
    ),
    "layer": (
        lambda e, p: e.patch(p, [Node("q", 3, 0, 0)]),
        ValueError,
        r"layer of Node\(kind='q', layer=3.* must be in \[0, 3\), got 3",
    ),
    "position": (
        lambda e, p: e.patch(p, [Node("q", 0, 8, 0)]),
        ValueError,
        r"position of .* must be in \[0, 8\), got 8",
    ),
    "negative": (
        lambda e, p: e.patch(p, [Node("q", 0, -1, 0)]),
        ValueError,
        r"position of .* must be in \[0, 8\), got -1",
    ),
    "head": (
        lambda e, p: e.patch_subsets(p, [[Node("k", 0, 0, 2)]]),
        ValueError,
        r"index of .* must be in \[0, 2\), got 2",
    ),
    "kind": (
        lambda e, p: e.patch(p, [Node("heads", 0, 0, 0)]),
        ValueError,
        "nodes must be among q, k, .*, got 'heads'",
    ),
    "tuple": (
        lambda e, p: e.patch(p, [("q", 0, 0, 0)]),
        TypeError,
        r"nodes must be Node\(kind, layer, position, index\), got \('q', 0, 0, 0\)",
    ),
    "subset": (
        lambda e, p: e.patch_subsets(p, [Node("q", 0, 0, 0)]),
        TypeError,
        r"nodes must be Node\(kind, layer, position, index\), got 'q'",
    ),
    "pair_index shape": (
        lambda e, p: e.patch_subsets(p, [[]], pair_index=torch.tensor([0, 1])),
        ValueError,
        r"pair_index must have shape \(1,\), got \(2,\)",
    ),
    "pair_index range": (
        lambda e, p: e.patch_subsets(p, [[], []], pair_index=torch.tensor([0, 2])),
        ValueError,
        r"pair_index must be in \[0, 2\), got \[0, 2\]",
    ),
    "pair_index negative": (
        lambda e, p: e.patch_subsets(p, [[]], pair_index=torch.tensor([-1])),
        ValueError,
        r"pair_index must be in \[0, 2\), got \[-1\]",
    ),
    "pair_index dtype": (
        lambda e, p: e.patch_subsets(p, [[]], pair_index=torch.tensor([0.0])),
        ValueError,
        "pair_index must hold integers, got torch.float32",
    ),
    "pair_index list": (
        lambda e, p: e.patch_subsets(p, [[]], pair_index=[0]),
        TypeError,
        "pair_index must be a Tensor, got list",
    ),
    "pair_index metric": (
        lambda e, p: e.patch_subsets(
            p, [[Node("q", 0, 0, 0)]], against_the_mean, pair_index=torch.tensor([0])
        ),
        ValueError,
        "pair_index needs a metric of single pairs",
    ),
    "direction": (
        lambda e, p: e.patch(p, [Node("q", 0, 0, 0)], direction="backwards"),
        ValueError,
        "direction must be 'noising' or 'denoising', got 'backwards'",
    ),
    "metric": (
        lambda e, p: e.patch(p, [Node("q", 0, 0, 0)], "loss"),
        ValueError,
        "metric must be among nll, .*, got 'loss'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    call, error, message = WRONG[case]
    model = zoo.build("llama")
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, POSITIONS)
    with pytest.raises(error, match=message):
        call(engine, pairs)


def test_neurons_of_experts_outside_the_interface_are_refused() -> None:
    model = zoo.build_other_experts()
    pairs = zoo.random_pairs(model, 2, POSITIONS)
    with pytest.raises(NotImplementedError, match=r"'neuron' of .* mixture of experts"):
        Engine(model).patch(pairs, [Node("neuron", 0, 3, 1)])


def test_an_expert_that_one_run_alone_chose() -> None:
    """Chosen in the clean run alone, its neurons are patched to 0; in the corrupted run alone, nothing reads them."""
    model = zoo.build("mixtral", num_hidden_layers=2)
    pairs, engine, width = zoo.random_pairs(model, 1, 12), Engine(model), 40
    runs: list[list[list[int]]] = []
    hook = model.model.layers[0].mlp.experts.register_forward_hook(
        lambda module, args, output: runs.append(args[1].tolist())
    )
    with torch.no_grad():
        model(pairs.clean_ids), model(pairs.corrupted_ids)
    hook.remove()
    position, clean = next(
        (t, set(a))
        for t, (a, b) in enumerate(zip(*runs, strict=True))
        if len(set(a) & set(b)) == 1 and t > 0
    )
    every = [Node("neuron", 0, position, i) for i in range(4 * width)]
    effect = engine.patch(pairs, every, progress=False).effect[0].view(4, width)
    estimate = engine.attribute(pairs, nodes=("neuron",), method="atp", progress=False)
    guessed = estimate.effect["neuron"][0, position].view(4, width)
    for expert in range(4):
        assert bool((effect[expert].abs() > 1e-9).all()) == (expert in clean), expert
        assert bool((guessed[expert] != 0).all()) == (expert in clean), expert


def state(model: Any) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits
    return {
        "logits": logits.tolist(),
        "attention": model.config._attn_implementation,
        "flags": [p.requires_grad for p in model.parameters()],
        "hooks": [[list(getattr(m, name)) for name in hooks] for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "products": torch.backends.mkldnn.matmul.fp32_precision,
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("call", range(1, 8))
def test_the_model_is_left_as_it_was(call: int) -> None:
    """An error in the call-th run of a layer, from the pairs' own runs to a batch of patched rows."""
    model = zoo.build("gpt2", dtype=torch.float32)
    next(model.parameters()).requires_grad_(False)
    engine, pairs = Engine(model), zoo.random_pairs(model, 2, POSITIONS, shared_prefix=2)
    nodes = some_nodes(engine, KINDS, 3)
    before = state(model)
    engine.patch(pairs, nodes, every_position, progress=False)
    assert state(model) == before
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = model.transformer.h[1].mlp.register_forward_hook(hook)
    stopped = False
    try:
        engine.patch(pairs, nodes, every_position, progress=False)
    except KeyboardInterrupt:
        stopped = True
    finally:
        handle.remove()
    assert stopped == (len(calls) == call)
    assert call > 3 or stopped
    assert state(model) == before
