"""nnsight: scores by module path beside its documented recipe, inside traces and outside. Needs the library."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("nnsight")

import nnsight
from nnsight import TransformersModel

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.hf import Plug
from atp_fast.hf.modules import node_places
from atp_fast.integrations import nnsight as ours
from atp_fast.nodes import KINDS
from tokenizers_for_tests import bpe

PLACES = {
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj"),
    "gpt_neox": (
        "gpt_neox.layers.{}.attention.query_key_value",
        "gpt_neox.layers.{}.attention.dense",
    ),
    "llama": ("model.layers.{}.self_attn.{}_proj", "model.layers.{}.self_attn.o_proj"),
}
TOKENS = torch.randint(1, zoo.VOCAB, (2, 2, 6), generator=torch.Generator().manual_seed(1))


def wrapped(family):
    model = zoo.build(family, dtype=torch.float32)
    return TransformersModel(model, task="text-generation", tokenizer=bpe()), model


@pytest.fixture(params=PLACES)
def family(request):
    return request.param


def pairs_of():
    return PromptPairs(*TOKENS, torch.tensor([3, 4]), torch.tensor([5, 6]))


def metric_of(logits):
    rows = torch.arange(2)
    return (logits[rows, -1, torch.tensor([3, 4])] - logits[rows, -1, torch.tensor([5, 6])]).sum()


def at(model, path):
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def heads_of(config, family, kind, values):
    """(pairs, positions, heads, dim) of a projection's values."""
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if family == "gpt2" and kind in "qkv":
        return values.chunk(3, -1)["qkv".index(kind)].unflatten(-1, (heads, -1))
    if family == "gpt_neox" and kind in "qkv":
        return values.unflatten(-1, (heads, 3, -1))[..., "qkv".index(kind), :]
    return values.unflatten(-1, (kv if kind in "kv" and kv else heads, -1))


def recipe(model, family):
    """The documentation's attribution patching: clean values, corrupted values, a backward trace, delta . gradient."""
    clean, corrupted = TOKENS
    before, behind = PLACES[family]
    layers = range(3)
    names = {
        (kind, layer): before.format(layer, kind) if kind != "z" else behind.format(layer)
        for kind in "qkvz"
        for layer in layers
    }
    paths = list(dict.fromkeys(names[kind, layer] for layer in layers for kind in "qkvz"))

    def value(path):
        module = at(model, path)
        return module.input if path in {names["z", layer] for layer in layers} else module.output

    ours_first, theirs, grads = {}, {}, {}
    with torch.no_grad(), model.trace(clean):
        for path in paths:
            ours_first[path] = value(path).save()
    with model.trace(corrupted):
        for path in paths:
            theirs[path] = value(path).save()
        score = metric_of(model.output.logits)
        with score.backward():
            for path in reversed(paths):
                grads[path] = theirs[path].grad.save()
    model._module.zero_grad(set_to_none=True)
    config = model._module.config
    return {
        (kind, layer): (
            heads_of(config, family, kind, ours_first[path] - theirs[path])
            * heads_of(config, family, kind, grads[path])
        )
        .sum(-1)
        .detach()
        for (kind, layer), path in names.items()
    }, names


def test_the_documented_recipe_with_our_call_in_its_place(family):
    model, _ = wrapped(family)
    expected, names = recipe(model, family)
    found = ours.attribute(
        model, pairs_of(), method="atp", nodes=("q", "k", "v", "z"), direction="denoising", per_pair=True, progress=False
    )  # fmt: skip
    by_path = ours.by_module(found, model, "per_pair")
    assert set(by_path) == set(names.values())
    for (kind, layer), theirs in expected.items():
        mine = by_path[names[kind, layer]][kind]
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()), (kind, layer)


def test_every_kind_has_its_module(family):
    model, module = wrapped(family)
    found = ours.attribute(model, pairs_of(), method="atp", nodes=KINDS, progress=False)
    by_path = ours.by_module(found, model)
    listed = dict(module.named_modules())
    assert set(by_path) <= set(listed)
    kinds = [kind for scores in by_path.values() for kind in scores]
    assert sorted(kinds) == sorted(list(KINDS) * 3)
    one = by_path[PLACES[family][1].format(2)]
    assert torch.equal(one["z"], found.effect["z"][2])
    contribution = ours.by_module(found, model, "contribution")
    assert torch.equal(contribution[PLACES[family][1].format(0)]["z"], found.contribution["z"][0])
    with pytest.raises(ValueError, match="scores must have been kept"):
        ours.by_module(found, model, "per_pair")


def test_the_norm_behind_a_projection_is_where_queries_stand():
    module = zoo.build("qwen3")
    places = node_places(Plug(module, "auto"))
    assert places["q", 1] == ("model.layers.1.self_attn.q_norm", "output")
    assert places["v", 1] == ("model.layers.1.self_attn.v_proj", "output")
    assert places["neuron", 2] == ("model.layers.2.mlp.down_proj", "input")


def test_inside_a_trace_scores_are_the_same_and_the_trace_is_undisturbed(family):
    model, module = wrapped(family)
    path = PLACES[family][1].format(1)
    options = {"nodes": ("z",), "progress": False}
    outside = ours.attribute(model, pairs_of(), **options)
    with model.trace(TOKENS[0]):
        plain = model.output.logits.save()
    with model.trace(TOKENS[0]):
        found = ours.attribute(model, pairs_of(), **options)
        best = int(found.effect["z"][1].abs().sum(0).argmax())
        heads = module.config.num_attention_heads
        z = at(model, path).input.clone()
        z.unflatten(-1, (heads, -1))[:, :, best] = 0
        at(model, path).input = z
        scores = found.effect["z"].save()
        logits = model.output.logits.save()
    assert torch.equal(scores, outside.effect["z"])
    assert not torch.allclose(logits, plain)
    with model.trace(TOKENS[0]):
        again = model.output.logits.save()
    assert torch.equal(again, plain)


def test_the_wrapper_works_as_before(family):
    model, module = wrapped(family)
    with model.trace(TOKENS[0]):
        first = model.output.logits.save()
    forwards = {name: inner.__dict__.get("forward") for name, inner in module.named_modules()}
    with pytest.raises(RuntimeError, match="mine"), ours.unwrapped(model) as plain:
        assert plain is module
        raise RuntimeError("mine")
    with ours.engine(model, backend="reference") as engine:
        assert engine.backend == "reference"
    after = {name: inner.__dict__.get("forward") for name, inner in module.named_modules()}
    assert all(forwards[name] is after[name] for name in forwards)
    with model.trace(TOKENS[0]):
        second = model.output.logits.save()
    assert torch.equal(first, second)


def test_numbers_are_the_plain_model_s_to_the_bit(family):
    """Also where a source has been asked for, which puts another forward in place."""
    model, _ = wrapped(family)
    expected = Engine(zoo.build(family, dtype=torch.float32)).attribute(pairs_of(), progress=False)
    behind = PLACES[family][1]
    at(model, behind.format(0)).source  # noqa: B018
    found = ours.attribute(model, pairs_of(), progress=False)
    assert set(found.effect) == set(expected.effect)
    for kind, effect in expected.effect.items():
        assert torch.equal(found.effect[kind], effect), kind
        assert torch.equal(found.contribution[kind], expected.contribution[kind]), kind


def test_a_forward_of_the_module_s_own_is_kept():
    """As monkeypatched layers have it: what the user's model computes is what is attributed."""
    plain, patched = (zoo.build("llama", dtype=torch.float32) for _ in range(2))
    for model in (plain, patched):
        inner = model.model.layers[1].mlp
        inner.forward = lambda x, inner=inner: 2 * type(inner).forward(inner, x)
    found = ours.attribute(
        TransformersModel(patched, task="text-generation", tokenizer=bpe()),
        pairs_of(),
        nodes=("z",),
        progress=False,
    )
    expected = Engine(plain).attribute(pairs_of(), nodes=("z",), progress=False)
    assert torch.equal(found.effect["z"], expected.effect["z"])
    other = Engine(zoo.build("llama", dtype=torch.float32)).attribute(
        pairs_of(), nodes=("z",), progress=False
    )
    assert not torch.allclose(other.effect["z"], expected.effect["z"])


def test_edits_are_not_passed_over():
    model, _ = wrapped("llama")
    with model.edit(inplace=True):
        model.model.layers[0].mlp.output[:] = 0
    with pytest.raises(NotImplementedError, match=r"no edits, this \w+ has 1 .*clear_edits"):
        ours.attribute(model, pairs_of())
    model.clear_edits()
    ours.attribute(model, pairs_of(), nodes=("z",), progress=False)


def test_a_kind_that_stands_in_no_module_is_told(monkeypatch):
    model, _ = wrapped("llama")
    found = ours.attribute(model, pairs_of(), nodes=("z", "mlp_out"), progress=False)
    real = ours.node_places
    monkeypatch.setattr(
        ours, "node_places", lambda plug: {k: x for k, x in real(plug).items() if k != ("z", 1)}
    )
    with pytest.raises(
        NotImplementedError, match=r"z of layer 1 stands in no .*found.effect\['z'\]"
    ):
        ours.by_module(found, model)


def test_any_wrapper_of_a_module_is_taken():
    module = zoo.build("llama", dtype=torch.float32)
    found = ours.attribute(nnsight.NNsight(module), pairs_of(), nodes=("k",), progress=False)
    plain = zoo.build("llama", dtype=torch.float32)
    expected = Engine(plain).attribute(pairs_of(), nodes=("k",), progress=False)
    assert torch.equal(found.effect["k"], expected.effect["k"])


def test_bad_models_are_told():
    module = zoo.build("llama")
    with pytest.raises(TypeError, match="model must be wrapped by nnsight, got LlamaForCausalLM"):
        ours.attribute(module, pairs_of())

    class Remote:
        dispatched = False

        def __init__(self):
            self._module = torch.nn.Linear(2, 2, device="meta")

        def dispatch(self):
            raise OSError("no such repository")

    with pytest.raises(
        NotImplementedError, match=r"Remote has no weights here .*no such repository.*remote models"
    ):
        ours.attribute(Remote(), pairs_of())
    remote = Remote()
    remote.dispatched = True
    with pytest.raises(
        NotImplementedError, match="Remote has no weights here: remote models are not served"
    ):
        ours.attribute(remote, pairs_of())


def test_weights_are_loaded_where_they_are_missing():
    module = zoo.build("llama", dtype=torch.float32)

    class Late:
        dispatched = False

        def __init__(self):
            self._module = torch.nn.Linear(2, 2, device="meta")

        def dispatch(self):
            self._module, self.dispatched = module, True

    found = ours.attribute(Late(), pairs_of(), nodes=("z",), progress=False)
    assert torch.equal(
        found.effect["z"],
        Engine(module).attribute(pairs_of(), nodes=("z",), progress=False).effect["z"],
    )


def test_the_page_s_examples_run(monkeypatch, tmp_path, capsys):
    import runpy
    from pathlib import Path

    model = zoo.build(
        "gpt2", dtype=torch.float32, vocab_size=5000, num_hidden_layers=10, hidden_size=48, num_attention_heads=12
    )  # fmt: skip
    tokenizer = bpe("When Mary and John went to the store, John gave a drink to " * 2)

    def load(name, dispatch):
        assert name == "openai-community/gpt2" and dispatch
        return TransformersModel(model, task="text-generation", tokenizer=tokenizer)

    monkeypatch.setattr("nnsight.TransformersModel", load)
    page = Path(__file__).parents[2] / "docs" / "integrations" / "nnsight.md"
    script = tmp_path / "page.py"  # a trace reads its own source
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)))
    scope = runpy.run_path(str(script))
    assert capsys.readouterr().out.splitlines()[0].endswith(", 12])")
    assert scope["logits"].shape[-1] == 5000


def test_another_version_is_one_error(monkeypatch):
    import importlib
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.5.1" if name == "nnsight" else real(name)
    )
    with pytest.raises(
        ImportError, match=r"needs nnsight >= 0.8, < 0.9, found 0.5.1: .*atp_fast\[nnsight\]"
    ):
        importlib.reload(ours)
