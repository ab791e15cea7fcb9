"""Dictionaries' features and error terms as nodes, against hooks on the plain model (naive_dictionaries.py)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import plotly.offline
import pytest
import torch
from torch import Tensor, nn

import atp_fast.attribution.sweep
import zoo
from atp_fast import Attribution, Engine, PromptPairs
from atp_fast.attribution.memory import SweepPlan, SweepSize, estimate_sweep, features_at_once
from atp_fast.distributed import attribute_sharded
from atp_fast.hf.dictionaries import SITES
from atp_fast.metrics import resolve
from atp_fast.nodes import KINDS, Node, NodeSpace, label
from atp_fast.results import PatchEffects, agreement
from naive_dictionaries import Given, Naive, Sources, by_position, naive_features, naive_patched
from test_memory import PEAKS, measured
from test_spans import EQUAL, UNEQUAL, pairs_of, sources

HIDDEN, FEATURES = 32, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def widths_of(model: Any) -> dict[str, int]:
    """The width of every kind of place, from the plain model."""
    hooked = Naive(model)
    with hooked.running_on():
        seen = hooked.seen(torch.tensor([[1, 2]]))
    given = [Given(1, site, *jump_relu(1), site) for site in SITES]
    return {one.site: one.rows(seen[one.key()]).shape[1] for one in given if one.key() in seen}


def jump_relu(width: int, features: int = FEATURES, seed: int = 0) -> tuple[Any, Any]:
    """An encoder that jumps, and a decoder that is not linear."""
    into, out = (
        random(width, features, seed=seed) / width**0.5,
        random(features, width, seed=seed + 1),
    )

    def encode(x: Tensor) -> Tensor:
        before = x @ into.to(x) + 0.3
        return before * (before > 0.2)

    def decode(f: Tensor) -> Tensor:
        return torch.tanh(f @ out.to(f)) + 0.1 * (f.square() @ out.flip(0).to(f)) + 0.05

    return encode, decode


def top_k(width: int, features: int = 12, seed: int = 0) -> tuple[Any, Any]:
    weight = random(width, features, seed=seed) / width**0.5

    def encode(x: Tensor) -> Tensor:
        before = x @ weight
        values, at = before.topk(3)
        return torch.zeros_like(before).scatter(-1, at, values.relu())

    return encode, lambda f: f @ weight.T


def everywhere(model: Any, sites: Any = SITES) -> list[Given]:
    """A dictionary at every kind of place; behind the last layer too, and one of another kind in a second layer."""
    widths = widths_of(model)
    found = [Given(1, site, *jump_relu(widths[site], seed=i), site) for i, site in enumerate(sites)]
    hidden = widths["resid_pre"]
    found += [
        Given(2, "resid_post", *jump_relu(hidden, seed=20), "resid_post"),
        Given(0, "resid_pre", *jump_relu(hidden, seed=30), "resid_pre"),
        Given(2, "mlp_out", *top_k(hidden, seed=40), "another"),
        Given(1, "z", *top_k(widths["z"], seed=50), "beside"),
    ]
    return found


def with_dictionaries(model: Any, given: list[Given], *args: Any, **options: Any) -> Engine:
    engine = Engine(model, *args, **options)
    for one in given:
        kinds = engine.add_dictionary(one.layer, one.site, one.encode, one.decode, name=one.name)
        assert kinds == (f"{one.name}.features", f"{one.name}.error")
    return engine


def kinds_of(engine: Engine) -> tuple[str, ...]:
    return engine.plug.kinds[len(KINDS) :]


def assert_naive(
    model: Any,
    engine: Engine,
    pairs: PromptPairs,
    given: list[Given],
    method: str,
    metric: str = "logit_diff",
    places: Callable[[PromptPairs, int], Sources] = by_position,
    nodes: tuple[str, ...] = (),
) -> Attribution:
    nodes = (*nodes, *kinds_of(engine))
    found = engine.attribute(pairs, metric, method, nodes, per_pair=True, progress=False)
    assert found.space.kinds == nodes
    graddrop = method in ("atp+graddrop", "atp*")
    measure = resolve(metric, pairs)
    scores, effects = naive_features(model, pairs, measure, given, graddrop, places)
    present = pairs.present.sum(0).clamp(min=1)[None, :, None]
    for kind in kinds_of(engine):
        per_pair = torch.stack([x[kind] for x in (scores if graddrop else effects)])
        wanted = {
            "per_pair": per_pair,
            "contribution": sum(x[kind] for x in scores) / present,
            "effect": sum(x[kind] for x in effects) / present,
        }
        for name, right in wanted.items():
            ours = getattr(found, name)[kind]
            assert ours.shape == right.shape, (kind, name)
            assert float(right.abs().max()) > 1e-6, (kind, name)
            error = float((ours - right).abs().max() / right.abs().max())
            assert error < 1e-9, (kind, name, error)
    return found


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "atp+qk"), ("gpt2", "atp*"), ("llama", "atp"), ("llama", "atp+graddrop")],
)
def test_effects_equal_those_of_hooks(family: str, method: str) -> None:
    """Every kind of place, padding on the left, three lengths, a shared prefix."""
    model = zoo.build(family, wide_norms=True)
    given = everywhere(model)
    pairs = zoo.random_pairs(model, 3, 8, ragged=True, shared_prefix=2, padding_side="left")
    engine = with_dictionaries(model, given, "reference")
    assert_naive(model, engine, pairs, given, method)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "qwen3"])
def test_more_families_and_the_compiled_backend(family: str) -> None:
    """gemma2 scales its writes by norms of their own; mixtral's neurons are those of its experts, other kinds beside."""
    model = zoo.build(family, wide_norms=True)
    given = everywhere(
        model, [site for site in SITES if site != "neuron"] if family == "mixtral" else SITES
    )
    pairs = zoo.random_pairs(model, 2, 6, ragged=True)
    engine = with_dictionaries(model, given, "cpp")
    if family == "mixtral":  # its routing weights are float32
        found = engine.attribute(pairs, nodes=kinds_of(engine), progress=False)
        measure = resolve("logit_diff", pairs)
        effects = naive_features(model, pairs, measure, given, False)[1]
        for kind in kinds_of(engine):
            wanted = (
                sum(x[kind] for x in effects) / pairs.present.sum(0).clamp(min=1)[None, :, None]
            )
            assert (found.effect[kind] - wanted).abs().max() <= 1e-6 * wanted.abs().max(), kind
        return
    assert_naive(model, engine, pairs, given, "atp*", nodes=("q", "k", "neuron", "resid_pre"))


@pytest.mark.parametrize(("rows", "method"), [(EQUAL, "atp"), (UNEQUAL, "atp*")])
def test_spans(rows: Any, method: str) -> None:
    """A span's effect is the sum over its positions, the other prompt's values moved to those they stand for."""
    model, pairs = zoo.build("llama", wide_norms=True), pairs_of(rows)
    given = everywhere(model)

    def places(pairs: PromptPairs, row: int) -> Sources:
        length = len(rows[row][0])
        found = Sources([-1] * length, [0] * length)
        for name in rows[row][2]:
            for t, source in sources(rows[row], name).items():
                found.source[t], found.column[t] = source, pairs.spans.names.index(name)
        return found

    for budget in (None, 1):
        engine = with_dictionaries(model, given, memory_budget=budget)
        assert_naive(model, engine, pairs, given, method, places=places)


def test_an_identity_dictionary_is_the_coordinates() -> None:
    """The features' effects are those of the coordinates, add up to the place's own, and no error is left."""
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 3, 7)
    engine = Engine(model)
    for site in ("mlp_out", "neuron"):
        engine.add_dictionary(1, site, lambda x: x, lambda f: f)
    nodes = ("neuron", "mlp_out", *kinds_of(engine))
    found = engine.attribute(pairs, nodes=nodes, progress=False)
    assert (
        found.contribution["neuron.features"][0] - found.contribution["neuron"][1]
    ).abs().max() < 1e-14
    whole = found.effect["mlp_out.features"][0].sum(-1)
    assert (whole - found.effect["mlp_out"][1, :, 0]).abs().max() < 1e-14 * max(
        1, whole.abs().max()
    )
    for name in ("mlp_out", "neuron"):
        assert float(found.contribution[f"{name}.error"].abs().max()) == 0


# ---- exact patching


def some_nodes(engine: Engine, positions: int, count: int, seed: int = 0) -> list[Node]:
    random, nodes = Random(seed), []
    for kind in kinds_of(engine):
        of_kind = list(engine.plug.space(positions, [kind]))
        nodes += random.sample(of_kind, min(count, len(of_kind)))
    random.shuffle(nodes)
    return nodes


@pytest.mark.parametrize(("family", "side"), [("gpt2", "left"), ("llama", "right")])
def test_single_nodes_and_subsets_are_patched_as_by_hooks(family: str, side: str) -> None:
    """Features of one dictionary at one position together, with its error, with the place itself, with nodes below."""
    model = zoo.build(family, wide_norms=True)
    given = everywhere(model)
    pairs = zoo.random_pairs(model, 2, 6, ragged=True, shared_prefix=1, padding_side=side)
    engine = with_dictionaries(model, given)
    nodes = some_nodes(engine, 6, 2)
    random = Random(1)
    subsets = [[node] for node in nodes]
    for position in (4,):
        for one in given:
            here = [Node(f"{one.name}.features", one.layer, position, i) for i in range(FEATURES)]
            error = Node(f"{one.name}.error", one.layer, position)
            subsets += [here[:3], [*here[1:4], error], random.sample(nodes, 12)]
            subsets.append([*here[2:5], Node("resid_pre", 1, position), Node("mlp_out", 1, 4)])
    found = engine.patch_subsets(pairs, subsets, progress=False)
    wanted = naive_patched(model, pairs, subsets, resolve("logit_diff", pairs), given)
    assert (found.effect - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    alone = engine.patch(pairs, nodes, progress=False)
    assert alone.nodes == nodes
    assert (alone.effect - wanted[:, : len(nodes)]).abs().max() <= 1e-9 * wanted.abs().max()
    assert int((alone.effect.abs() > 1e-6).any(0).sum()) > len(nodes) // 3


@pytest.mark.parametrize(("shared", "budget"), [(0, None), (3, 1)])
def test_all_features_and_the_error_are_the_place_itself(shared: int, budget: int | None) -> None:
    """One length: the last layer is run for the last position alone."""
    model = zoo.build("llama", wide_norms=True)
    given = everywhere(model)
    pairs = zoo.random_pairs(model, 2, 6, shared_prefix=shared)
    engine = with_dictionaries(model, given, memory_budget=budget)
    heads = range(engine.plug.inspection.heads)
    neurons = range(engine.plug.inspection.neurons)
    whole, parts = [], []
    for one in given:
        layer, kind = (
            (one.layer, one.site) if one.site != "resid_post" else (one.layer + 1, "resid_pre")
        )
        if layer == 3:
            continue
        for position in (3, 5):
            index = {"z": heads, "neuron": neurons}.get(kind, (0,))
            whole.append([Node(kind, layer, position, i) for i in index])
            features = range(
                engine.plug.space(6, [f"{one.name}.features"]).widths[f"{one.name}.features"]
            )
            parts.append([Node(f"{one.name}.features", one.layer, position, i) for i in features])
            parts[-1].append(Node(f"{one.name}.error", one.layer, position))
    found = engine.patch_subsets(pairs, [*whole, *parts], progress=False).effect
    assert found[:, : len(whole)].abs().max() > 1e-2
    assert (
        found[:, : len(whole)] - found[:, len(whole) :]
    ).abs().max() <= 1e-12 * found.abs().max()
    # behind the last layer all of it is the corrupted run's logits there
    last = [Node("resid_post.features", 2, 5, i) for i in range(FEATURES)]
    both = engine.patch_subsets(pairs, [[*last, Node("resid_post.error", 2, 5)]], progress=False)
    right = engine.attribute(pairs, nodes=("v",), progress=False)
    assert (both.effect[:, 0] - (right.corrupted_value - right.clean_value)).abs().max() < 1e-10


def test_spans_are_patched_whole() -> None:
    model, pairs = zoo.build("gpt2"), pairs_of(EQUAL)
    given = everywhere(model)
    engine = with_dictionaries(model, given)
    one = given[3]
    for span, positions, row in ((0, (2, 3), 0), (1, (4, 5), 0)):
        nodes = [
            Node(f"{one.name}.features", one.layer, span, 2),
            Node(f"{one.name}.error", one.layer, span),
        ]
        whole = engine.patch_subsets(pairs, [nodes], progress=False).effect[row]
        apart = [node._replace(position=t) for node in nodes for t in positions]
        plain = pairs.without_spans()[[row]]
        wanted = naive_patched(model, plain, [apart], resolve("logit_diff", plain), given)
        assert wanted.abs().max() > 1e-6
        assert (whole - wanted[0]).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_patching_behind_the_last_layer_reaches_every_logit(metric: str) -> None:
    model = zoo.build("llama", wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 6)
    given = [Given(2, "resid_post", *jump_relu(HIDDEN, seed=20), "resid_post")]
    engine = with_dictionaries(model, given)

    def every_position(logits: Tensor, pairs: PromptPairs) -> Tensor:
        return (logits.tanh().sum(-1) * pairs.attention_mask).sum(1)

    nodes = [Node("resid_post.features", 2, t, i) for t in range(6) for i in range(FEATURES)]
    found = engine.patch(pairs, nodes, every_position, progress=False)
    assert bool((found.effect.abs().view(2, 6, FEATURES).amax((0, 2)) > 1e-6).all())
    at_end = engine.patch(pairs, nodes, metric, progress=False).effect
    before, last = at_end.split([5 * FEATURES, FEATURES], 1)
    assert before.abs().max() < 1e-12 < last.abs().max()


def test_the_bound_on_missed_features() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, 5)
    engine = Engine(model)
    engine.add_dictionary(1, "mlp_out", *jump_relu(HIDDEN))
    kinds = kinds_of(engine)
    exact = engine.patch(
        pairs, engine.attribute(pairs, nodes=kinds, progress=False).top(3), progress=False
    )
    bound = engine.bound_missed(
        pairs, exact.nodes, nodes=kinds, forwards=60, probability=0.3, progress=False
    )
    assert len(bound.nodes) == 5 * (FEATURES + 1) - 3
    assert {node.kind for node in bound.nodes} == set(kinds)
    assert bound.bounds[0] > 0


# ---- memory


class Counted:
    """An encoder that notes how many rows it gets at once, and can run out of memory."""

    def __init__(self, encode: Any, fail_at: int | None = None) -> None:
        self.encode, self.rows, self.fail_at = encode, [], fail_at

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        if len(self.rows) == self.fail_at:
            raise torch.OutOfMemoryError("a test's")
        found: Tensor = self.encode(x)
        return found


@pytest.mark.parametrize(("method", "padding"), [("atp", "right"), ("atp*", "left")])
def test_a_budget_changes_nothing(method: str, padding: str) -> None:
    """Under the smallest one pair and one position are taken at a time."""
    model = zoo.build("gpt2", num_hidden_layers=2)
    pairs = zoo.mixed_pairs(model, padding)
    given = [Given(1, site, *jump_relu(HIDDEN), site) for site in ("resid_post", "z")]
    counted = [Counted(one.encode) for one in given]
    given = [one._replace(encode=encode) for one, encode in zip(given, counted, strict=True)]
    found, exact = {}, {}
    for budget in (None, "150KB", 1):
        engine = with_dictionaries(model, given, memory_budget=budget)
        for encode in counted:
            encode.rows.clear()
        found[budget] = engine.attribute(
            pairs, method=method, nodes=kinds_of(engine), per_pair=True, progress=False
        )
        most = {max(encode.rows) for encode in counted}
        assert (most == {1}) == (budget == 1)
        if budget is None:
            assert min(most) == 7 * 7  # all pairs, all positions after the shared two
        exact[budget] = engine.patch(pairs, some_nodes(engine, 9, 6), progress=False).effect
    for budget in ("150KB", 1):
        for name in ("contribution", "effect", "per_pair"):
            for kind, wanted in getattr(found[None], name).items():
                ours = getattr(found[budget], name)[kind]
                assert (ours - wanted).abs().max() <= 1e-12 * wanted.abs().max(), (name, kind)
        assert (exact[budget] - exact[None]).abs().max() <= 1e-12 * exact[None].abs().max()


@pytest.mark.parametrize("spans", [False, True])
def test_out_of_memory_among_the_features(spans: bool) -> None:
    """What is in the scores already is not added a second time."""
    model = zoo.build("gpt2", num_hidden_layers=6)
    pairs = pairs_of(EQUAL) if spans else zoo.random_pairs(model, 2, 7)
    encode, decode = jump_relu(HIDDEN)
    engine = Engine(model)
    counted = Counted(encode)
    engine.add_dictionary(1, "mlp_out", counted, decode)
    engine.add_dictionary(1, "resid_post", counted, decode)
    kinds = kinds_of(engine)
    wanted = engine.attribute(pairs, nodes=kinds, progress=False)
    calls = len(counted.rows)
    for fail_at in (calls + 2, calls + 3):
        counted.fail_at, counted.rows = fail_at - calls, []
        with pytest.warns(UserWarning, match="out of memory in layer"):
            found = engine.attribute(pairs, nodes=kinds, progress=False)
        for kind in kinds:
            for a, b in ((found.contribution, wanted.contribution), (found.effect, wanted.effect)):
                assert (a[kind] - b[kind]).abs().max() <= 1e-12 * b[kind].abs().max()


def test_the_plan_knows_the_features() -> None:
    """Their work is a part of the estimate, bounded by the plan's numbers, and shrinks with the budget."""
    engine = Engine(zoo.build("gpt2"))
    plug, weight = engine.plug, random(32, 4096)
    size = SweepSize(positions=64, prefix=0, cotangents=4, kinds=("mlp_out.features",), logits=1)
    engine.add_dictionary(1, "mlp_out", lambda x: x @ weight, lambda f: f @ weight.T)
    plan = SweepPlan(2, 4, 3)
    whole = 8 * (4 + 2 * 4) * 2 * 64 * 4096  # four copies, and two for each cotangent
    for numbers, work in ((1 << 40, whole), (0, whole // 64), (2**20, 8 * 3 * 2**20)):
        estimate = estimate_sweep(plug, plan._replace(features=numbers), size)
        without = estimate_sweep(plug, plan, size._replace(kinds=("mlp_out",)))
        assert estimate == without + work
    with_spans = estimate_sweep(plug, plan, size._replace(spans=3))
    assert with_spans >= estimate_sweep(plug, plan, size) + 8 * 2 * 3 * 2 * 4 * 4096
    assert features_at_once(plug, 8 * 6 * 8 * 1000) == 1000
    assert features_at_once(plug, 1 << 50) == 2**23


@PEAKS
def test_features_keep_to_the_budget() -> None:
    """All at once they would take a gigabyte."""
    case = {"method": "atp*", "pairs": 1, "positions": 256, "budget": "300MB", "features": 32768}
    (found,) = measured("gpt_neox", [case])
    assert 0.7 <= found["estimate"] / found["peak"] <= 1.3, found
    assert found["estimate"] <= 3e8


def test_no_layer_below_the_lowest_dictionary_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, 5)
    swept: list[int] = []
    whole = atp_fast.attribution.sweep._Layer

    class Noted(whole):  # type: ignore[misc,valid-type]
        def __init__(self, state: Any, number: int, added: Any):
            swept.append(number)
            super().__init__(state, number, added)

    monkeypatch.setattr(atp_fast.attribution.sweep, "_Layer", Noted)
    engine = Engine(model)
    kinds = engine.add_dictionary(2, "resid_post", *jump_relu(HIDDEN))
    for nodes, layers in (
        (kinds, []),
        ((*kinds, *engine.add_dictionary(1, "attn_out", *jump_relu(HIDDEN))), [2, 1]),
        (("attn_out.error",), [2, 1]),
        (("attn_out.error", "v"), [2, 1, 0]),
    ):
        swept.clear()
        engine.attribute(pairs, nodes=nodes, progress=False)
        assert swept == layers


# ---- results


@pytest.fixture(scope="module")
def made() -> tuple[Engine, PromptPairs, Attribution, list[Given]]:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 3, 6, ragged=True)
    given = everywhere(model)
    engine = with_dictionaries(model, given)
    nodes = ("z", "neuron", "mlp_out", *kinds_of(engine))
    return engine, pairs, engine.attribute(pairs, nodes=nodes, per_pair=True, progress=False), given


def test_tables(made: Any) -> None:
    _, _, found, _ = made
    space = found.space
    assert space.shape("resid_pre.features") == (2, 6, FEATURES)
    assert space.shape("resid_pre.error") == (2, 6, 1)
    assert list(space.layers_of("resid_pre.features")) == [0, 1]
    assert list(space.layers_of("another.error")) == [2]
    assert len(found) == len(space) == sum(space.size(kind) for kind in space.kinds)
    table = found.to_dataframe()
    assert len(table) == len(space)
    for row in table.sample(200, random_state=0).itertuples():
        at = row.kind, space.row(row.kind, row.layer), row.position, table.loc[row.Index, "index"]
        assert row.contribution == float(found.contribution[at[0]][at[1], at[2], at[3]])
    for number, node in enumerate(space):
        assert space.flat(node) == number
    best = found.top(40, kinds=("resid_pre.features", "another.error"))
    assert {node.kind for node in best} == {"resid_pre.features", "another.error"}
    assert {node.layer for node in best if node.kind == "another.error"} == {2}
    assert [n.contribution for n in found.scored(best)] == [n.contribution for n in best]
    assert label(Node("resid_pre.features", 5, 7, 1234)) == "L5 F1234 resid_pre @7"
    assert label(Node("resid_pre.error", 5, 7)) == "L5 error resid_pre @7"
    assert "resid_pre: 7 features at resid_pre of layer 0" in found.metadata["dictionaries"]


def test_nodes_outside_the_space(made: Any) -> None:
    engine, pairs, found, _ = made
    for node, message in (
        (Node("resid_pre.features", 2, 0, 0), "layer of .* must be among 0, 1, got 2"),
        (Node("resid_pre.features", 3, 0, 0), r"layer of .* must be in \[0, 3\), got 3"),
        (Node("resid_pre.features", 0, 0, 7), r"index of .* must be in \[0, 7\), got 7"),
        (Node("resid_pre.error", 0, 0, 1), r"index of .* must be in \[0, 1\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.patch(pairs, [node], progress=False)
        with pytest.raises(ValueError, match=message):
            found.scored([node])
    with pytest.raises(
        ValueError, match="nodes must be among q, .*, another.error, got 'x.features'"
    ):
        engine.attribute(pairs, nodes=("x.features",))
    with pytest.raises(NotImplementedError, match="nodes of dictionaries have no estimate"):
        engine.estimate(pairs, nodes=("q", "z.error"))
    with pytest.raises(NotImplementedError, match="nodes of dictionaries have no estimate"):
        engine.estimate_patch(pairs, [Node("z.error", 1, 3)])
    with pytest.raises(ValueError, match="nodes must be among q, k"):
        NodeSpace(2, 2, {"x.features": 3})


def test_save_and_load(made: Any, tmp_path: Any) -> None:
    engine, pairs, found, _ = made
    found.save(tmp_path / "a.safetensors")
    again = Attribution.load(tmp_path / "a.safetensors")
    assert again.space == found.space
    assert again.top(30) == found.top(30)
    for kind in found.space.kinds:
        assert torch.equal(again.per_pair[kind], found.per_pair[kind])
    exact = engine.patch(pairs, found.top(20), progress=False)
    exact.save(tmp_path / "b.safetensors")
    assert PatchEffects.load(tmp_path / "b.safetensors").nodes == exact.nodes
    assert agreement(found.top(20), exact).rank_correlation > 0


def test_figures_show_the_strongest(made: Any, tmp_path: Any) -> None:
    _, _, found, _ = made
    layers = {"a.features": (2, 6), "a.error": (2, 6)}
    space = NodeSpace(8, 4, {"neuron": 3, "a.features": 16000, "a.error": 1}, only=layers)
    scores = {kind: torch.rand(space.shape(kind)) for kind in space.kinds}
    words = ("method", "metric", "direction", "backend", "model")
    many = Attribution(
        contribution=scores,
        effect=scores,
        space=space,
        counts=torch.full((4,), 3),
        clean_value=torch.rand(3),
        corrupted_value=torch.rand(3),
        **{name: getattr(found, name) for name in words},
    )
    scores["a.features"][1, :, 777] += 5
    figure = many.heatmap("a.features")
    assert figure.data[0].z.shape == (32, 4)
    assert figure.data[0].y[-1] == "L6 F777 a"
    assert figure.data[0].z[-1].tolist() == pytest.approx(scores["a.features"][1, :, 777].tolist())
    assert list(many.heatmap("a.error").data[0].y) == ["2", "6"]
    with pytest.raises(ValueError, match="over must be 'position' for a.features, got 'head'"):
        many.heatmap("a.features", over="head")
    many.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a.features" in page and "head, neuron or feature" in page
    assert len(page) - len(plotly.offline.get_plotlyjs()) < 500_000


def test_the_report_of_a_run(made: Any, tmp_path: Any) -> None:
    engine, pairs, found, _ = made
    exact = engine.patch(pairs, found.top(10), progress=False)
    found.report(tmp_path / "report.html", exact=exact)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "resid_post.features" in page and "7 features at resid_pre of layer 0" in page


def test_shards(made: Any, tmp_path: Any) -> None:
    engine, pairs, found, given = made
    kinds = found.space.kinds
    sharded = attribute_sharded(
        engine, pairs, tmp_path, nodes=kinds, shard_size=2, per_pair=True, progress=False
    )
    assert sharded.space == found.space
    for name in ("contribution", "effect", "per_pair"):
        for kind, wanted in getattr(found, name).items():
            assert (getattr(sharded, name)[kind] - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    other = with_dictionaries(engine.model, [one for one in given if one.name != "another"])
    with pytest.raises(ValueError, match="dictionaries is .*another"):
        attribute_sharded(other, pairs, tmp_path, nodes=("z",), shard_size=2, progress=False)
    with pytest.raises(ValueError, match="nodes must be among .* got 'another.error'"):
        attribute_sharded(other, pairs, tmp_path / "b", nodes=("another.error",), progress=False)


# ---- who gives them


class Scaled(nn.Module):
    """An object as sae-lens has them, which undoes in decode the norm that it divided by in encode, and forgets it."""

    def __init__(self, width: int, hook: str | None = None, **config: Any) -> None:
        super().__init__()
        self.into, self.out = (nn.Parameter(random(*s)) for s in ((width, 9), (9, width)))
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook), **config)

    def encode(self, x: Tensor) -> Tensor:
        self.norm = x.norm(dim=-1, keepdim=True)
        return ((x / self.norm) @ self.into).relu()

    def decode(self, f: Tensor) -> Tensor:
        x = (f @ self.out) * self.norm
        del self.norm
        return x


def test_a_dictionary_that_scales() -> None:
    """Both runs are decoded under the scale of the run that is patched: gradients by hand, patches add up to the place."""
    model = zoo.build("llama", wide_norms=True)
    pairs = zoo.random_pairs(model, 2, 6)
    engine, sae = Engine(model), Scaled(HIDDEN, "blocks.1.hook_mlp_out")
    engine.add_dictionary(1, "mlp_out", sae)
    assert engine.dictionaries[0].stateful
    found = engine.attribute(
        pairs, "logit_diff", "atp", ("mlp_out", *kinds_of(engine)), progress=False
    )

    # the same with the scale handed over by hand
    own: dict[str, Tensor] = {}

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x = own.setdefault("x", output.detach().requires_grad_())
        return x + 0 * output

    values, totals = {}, []
    for row in range(2):
        own.clear()
        block = model.model.layers[1].mlp
        hook = block.register_forward_hook(
            lambda m, a, out: values.__setitem__("other", out.detach())
        )
        model(pairs.corrupted_ids[[row]])
        hook.remove()
        hook = block.register_forward_hook(change)
        logits = model(pairs.clean_ids[[row]]).logits[:, -1:]
        hook.remove()
        (grad,) = torch.autograd.grad(
            resolve("logit_diff", pairs)(logits, pairs[[row]], None).sum(), own["x"]
        )
        x, to = own["x"].detach()[0], values["other"][0]
        norm = x.norm(dim=-1, keepdim=True)
        delta = (to / to.norm(dim=-1, keepdim=True) @ sae.into).relu() - (
            x / norm @ sae.into
        ).relu()
        totals.append(delta * ((grad[0] * norm) @ sae.out.T))
    wanted = torch.stack(totals).mean(0).detach()
    assert (found.effect["mlp_out.features"][0] - wanted).abs().max() < 1e-9 * wanted.abs().max()
    whole = found.effect["mlp_out"][1, :, 0]
    nodes = [[Node("mlp_out.features", 1, 4, i) for i in range(9)] + [Node("mlp_out.error", 1, 4)]]
    exact = engine.patch_subsets(pairs, [*nodes, [Node("mlp_out", 1, 4)]], progress=False).effect
    assert whole.abs().max() > 1e-6 and exact.abs().max() > 1e-6
    assert (exact[:, 0] - exact[:, 1]).abs().max() < 1e-10 * exact.abs().max()
    assert all(p.requires_grad for p in sae.parameters()) and all(
        p.grad is None for p in sae.parameters()
    )


def test_the_place_that_an_object_was_made_for() -> None:
    engine = Engine(zoo.build("gpt2"))
    width = engine.plug.inspection.hidden
    assert engine.add_dictionary(1, "resid_post", Scaled(width, "blocks.1.hook_resid_post"))
    assert engine.add_dictionary(0, "mlp_out", Scaled(width, None))
    assert engine.add_dictionary(0, "attn_out", Scaled(width, "somewhere"))
    old = Scaled(width)
    old.cfg = SimpleNamespace(hook_name="blocks.2.hook_resid_pre")
    for layer, site in ((1, "resid_pre"), (2, "resid_post")):
        with pytest.raises(ValueError, match="made for, blocks.2.hook_resid_pre, got layer"):
            engine.add_dictionary(layer, site, old)
    assert engine.add_dictionary(2, "resid_pre", old, name="old")
    with pytest.raises(NotImplementedError, match="transcoders are not served: Scaled reads"):
        engine.add_dictionary(
            2, "mlp_out", Scaled(width, "blocks.2.ln2.hook_normalized", d_out=width)
        )


def sae_lens() -> Any:
    return pytest.importorskip("sae_lens")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "normalised"),
    [
        ("StandardSAE", "none"),
        ("StandardSAE", "layer_norm"),
        ("TopKSAE", "constant_norm_rescale"),
        ("JumpReLUSAE", "none"),
        ("GatedSAE", "none"),
    ],
)
def test_sae_lens(architecture: str, normalised: str) -> None:
    library, model = sae_lens(), zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, 6)
    engine = Engine(model)
    places = [
        (1, "resid_post", "blocks.1.hook_resid_post", HIDDEN),
        (2, "z", "blocks.2.attn.hook_z", HIDDEN),
    ]
    for layer, site, hook, width in places:
        options: dict[str, Any] = {"reshape_activations": "hook_z"} if site == "z" else {}
        if architecture == "TopKSAE":
            options["k"] = 8
        config = getattr(library, f"{architecture}Config")(
            d_in=width,
            d_sae=40,
            dtype="float64",
            normalize_activations=normalised,
            metadata=library.SAEConfig.__dataclass_fields__["metadata"].default_factory(),
            **options,
        )
        config.metadata.hook_name = hook
        sae = getattr(library, architecture)(config)
        with torch.no_grad():
            for i, parameter in enumerate(sae.parameters()):
                parameter.add_(0.3 * random(*parameter.shape, seed=i))
        with pytest.raises(ValueError, match="made for"):
            engine.add_dictionary(layer - 1, site, sae)
        engine.add_dictionary(layer, site, sae)
        assert engine.dictionaries[-1].stateful == (normalised != "none")
    found = engine.attribute(pairs, nodes=kinds_of(engine), progress=False)
    assert all(bool(score.any()) for score in found.contribution.values())
    for name, layer, whole in (
        ("resid_post", 1, [Node("resid_pre", 2, 5)]),
        ("z", 2, [Node("z", 2, 5, head) for head in range(engine.plug.inspection.heads)]),
    ):
        parts = [Node(f"{name}.features", layer, 5, i) for i in range(40)] + [
            Node(f"{name}.error", layer, 5)
        ]
        effect = engine.patch_subsets(pairs, [whole, parts], progress=False).effect
        assert (effect[:, 0] - effect[:, 1]).abs().max() <= 1e-9 * effect.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_sae_lens_dictionaries_that_are_refused() -> None:
    library, engine = sae_lens(), Engine(zoo.build("gpt2"))
    config = library.BatchTopKTrainingSAEConfig(d_in=HIDDEN, d_sae=40, k=5, dtype="float64")
    with pytest.raises(NotImplementedError, match="encode must treat every position by itself"):
        engine.add_dictionary(1, "mlp_out", library.BatchTopKTrainingSAE(config))
    config = library.TranscoderConfig(
        d_in=HIDDEN, d_out=HIDDEN, d_sae=40, apply_b_dec_to_input=False
    )
    with pytest.raises(NotImplementedError, match="transcoders are not served"):
        engine.add_dictionary(1, "mlp_out", library.Transcoder(config))


# ---- what is refused, and what is left as it was


def refused(layer: Any = 1, site: Any = "mlp_out", **given: Any) -> tuple[Any, ...]:
    encode, decode = jump_relu(HIDDEN)
    options = {"encode": encode, "decode": decode} | given
    return layer, site, options


REFUSED: dict[str, tuple[type[Exception], str, tuple[Any, ...]]] = {
    "layer": (ValueError, r"layer must be in \[0, 3\), got 3", refused(layer=3)),
    "negative": (ValueError, r"layer must be in \[0, 3\), got -1", refused(layer=-1)),
    "no layer": (TypeError, "layer must be an int, got '1'", refused(layer="1")),
    "site": (ValueError, "site must be among resid_pre, .*, got 'hook_z'", refused(site="hook_z")),
    "name": (ValueError, "name must be made of letters, .*, got 'a.b'", refused(name="a.b")),
    "no decode": (TypeError, "encode must come with decode, or be an object", refused(decode=None)),
    "encode": (TypeError, "encode must be callable, got Tensor", refused(encode=torch.ones(3))),
    "width": (
        ValueError,
        r"encode must take \(8, 32\) torch.float64 on cpu, got RuntimeError",
        refused(encode=jump_relu(31)[0]),
    ),
    "dtype": (
        ValueError,
        r"encode must take \(8, 32\) torch.float64 on cpu, got RuntimeError: expected",
        refused(encode=lambda x: x @ torch.ones(HIDDEN, 4)),
    ),
    "integers": (
        TypeError,
        "encode must give a tensor of floating-point",
        refused(encode=lambda x: x.long()),
    ),
    "no tensor": (
        TypeError,
        "encode must give a tensor .*, got tuple",
        refused(encode=lambda x: (x, x)),
    ),
    "shape": (
        ValueError,
        r"encode must give one row of features for each of 8 values, got \(8, 4, 8\)",
        refused(encode=lambda x: x.view(len(x), 4, 8)),
    ),
    "transcoder": (
        ValueError,
        r"decode must give values of shape \(8, 32\), got \(8, 31\)",
        refused(decode=jump_relu(31)[1]),
    ),
    "device": (
        ValueError,
        "encode must stay on cpu, got meta",
        refused(encode=lambda x: x.to("meta"), decode=lambda f: f),
    ),
    "not finite": (
        ValueError,
        "decode must give finite numbers",
        refused(decode=lambda f: jump_relu(HIDDEN)[1](f) / 0),
    ),
    "detached": (
        ValueError,
        "decode must be differentiable in the features",
        refused(decode=lambda f: jump_relu(HIDDEN)[1](f.detach())),
    ),
    "constant": (
        ValueError,
        "decode must depend on the features",
        refused(decode=lambda f: torch.ones(len(f), HIDDEN, dtype=f.dtype, requires_grad=True) * 1),
    ),
    "in place": (
        ValueError,
        "encode must leave the values that it is given as they are",
        refused(encode=lambda x: x.relu_(), decode=lambda f: f.tanh()),
    ),
    "one row": (
        ValueError,
        "encode must take one row of values, got ZeroDivisionError: division by zero",
        refused(encode=lambda x: x if len(x) > 1 else 1 / 0, decode=lambda f: f.tanh()),
    ),
    "batch": (
        NotImplementedError,
        "encode must treat every position by itself",
        refused(encode=lambda x: jump_relu(HIDDEN)[0](x - x.mean(0))),
    ),
    "batch decoded": (
        NotImplementedError,
        "decode must treat every position by itself",
        refused(decode=lambda f: jump_relu(HIDDEN)[1](f - f.mean(0))),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    kind, message, (layer, site, options) = REFUSED[case]
    model = zoo.build("llama", wide_norms=True)
    engine = Engine(model)
    with pytest.raises(kind, match=message):
        engine.add_dictionary(layer, site, **options)
    assert engine.dictionaries == ()
    assert kinds_of(engine) == ()
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation != "atp_fast"
    assert all(p.requires_grad for p in model.parameters())


def test_places_that_a_model_does_not_have() -> None:
    engine = Engine(zoo.build_other_experts())
    with pytest.raises(
        NotImplementedError, match="nodes 'neuron' of .* are not served: layer 1 is a mixture"
    ):
        engine.add_dictionary(0, "neuron", *jump_relu(40))


def test_names() -> None:
    engine = Engine(zoo.build("gpt2"))
    width = engine.plug.inspection.hidden
    engine.add_dictionary(1, "mlp_out", *jump_relu(width))
    engine.add_dictionary(0, "mlp_out", *jump_relu(width))
    assert [d.layer for d in engine.dictionaries] == [0, 1]
    with pytest.raises(
        ValueError,
        match="name must be another one for a second dictionary of layer 1, got 'mlp_out'",
    ):
        engine.add_dictionary(1, "mlp_out", *jump_relu(width))
    with pytest.raises(
        ValueError,
        match="name 'mlp_out' is that of 7 features at mlp_out .*12 features at mlp_out another name",
    ):
        engine.add_dictionary(2, "mlp_out", *top_k(width))
    with pytest.raises(ValueError, match="these 7 features at attn_out another name"):
        engine.add_dictionary(2, "attn_out", *jump_relu(width), name="mlp_out")
    assert engine.add_dictionary(1, "mlp_out", *top_k(width), name="wide") == (
        "wide.features",
        "wide.error",
    )
    engine.remove_dictionary("mlp_out")
    assert kinds_of(engine) == ("wide.features", "wide.error")
    with pytest.raises(ValueError, match="name must be among wide, got 'mlp_out'"):
        engine.remove_dictionary("mlp_out")
    assert kinds_of(Engine(engine.model)) == ()


def test_a_narrow_model_and_a_wide_dictionary() -> None:
    """bfloat16 values, a dictionary in float32: its own numbers stay in float32, patched values fit the model."""
    model = zoo.build("llama", dtype=torch.bfloat16)
    pairs = zoo.random_pairs(model, 2, 6)
    into = random(HIDDEN, 16).float()
    engine = Engine(model)
    engine.add_dictionary(
        1, "mlp_out", lambda x: (x.float() @ into).relu(), lambda f: f @ into.T / 32
    )
    found = engine.attribute(
        pairs, nodes=("mlp_out", *kinds_of(engine)), method="atp", progress=False
    )
    assert found.effect["mlp_out.features"].dtype == torch.float32
    whole = found.effect["mlp_out.features"][0].sum(-1) + found.effect["mlp_out.error"][0, :, 0]
    wanted = found.effect["mlp_out"][1, :, 0]
    assert (whole - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # the decoder is linear
    nodes = [Node("mlp_out.features", 1, 4, i) for i in range(16)] + [Node("mlp_out.error", 1, 4)]
    exact = engine.patch_subsets(pairs, [nodes, [Node("mlp_out", 1, 4)]], progress=False).effect
    assert torch.equal(exact[:, 0], exact[:, 1])


def test_inside_inference_mode_and_the_model_is_left_alone() -> None:
    model = zoo.build("gpt2")
    pairs = zoo.random_pairs(model, 2, 6)
    before = model(pairs.clean_ids).logits
    engine = Engine(model)
    sae = Scaled(HIDDEN)
    with torch.inference_mode():
        engine.add_dictionary(1, "mlp_out", sae)
        engine.attribute(pairs, nodes=kinds_of(engine), progress=False)
        engine.patch(pairs, [Node("mlp_out.error", 1, 4)], progress=False)
    assert torch.equal(model(pairs.clean_ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_features_that_do_not_fire_are_no_reason_to_warn(recwarn: Any) -> None:
    model = zoo.build("gpt2")
    engine = Engine(model)
    engine.add_dictionary(1, "mlp_out", lambda x: (x - 1e6).relu(), lambda f: f + 1)
    found = engine.attribute(zoo.random_pairs(model, 2, 6), nodes=kinds_of(engine), progress=False)
    assert not found.contribution["mlp_out.features"].any()
    assert found.contribution["mlp_out.error"].any()
    assert not recwarn.list
