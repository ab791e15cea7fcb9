"""Layers that differ: other numbers of heads and neurons, no attention or no MLP, scaled and single and several writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import atp_fast.hf.layers
import served_models
import tiny_models
import zoo
from atp_fast import Engine
from atp_fast.metrics import resolve
from atp_fast.nodes import Node, NodeSpace
from atp_fast.patching.subsets import moving_ids
from atp_fast.results import Attribution
from naive_attribution import naive_attribution
from naive_patching import naive_effects

LIMIT = 1e-9
WIDTHS = {"q": 4, "k": 3, "neuron": 5}
COUNTS = {"k": (3, 0, 2), "neuron": (0, 5, 1)}
SPACE = NodeSpace(3, 2, WIDTHS, COUNTS)


# ---- the space


def test_numbers_run_over_the_nodes_that_there_are() -> None:
    wanted = [
        Node(kind, layer, position, index)
        for kind in WIDTHS
        for layer in range(3)
        for position in range(2)
        for index in range(COUNTS.get(kind, (4, 4, 4))[layer])
    ]
    assert list(SPACE) == wanted
    assert len(SPACE) == len(wanted) == 2 * (12 + 5 + 6)
    assert [SPACE.flat(node) for node in wanted] == list(range(len(wanted)))
    assert [SPACE.offset(kind) for kind in WIDTHS] == [0, 24, 34]
    assert [SPACE.size(kind) for kind in WIDTHS] == [24, 10, 12]
    assert SPACE.shape("neuron") == (3, 2, 5)
    assert list(SPACE.in_layers("q")) == [4, 4, 4]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (Node("k", 1, 0, 0), "layer 1 has no nodes 'k', got Node"),
        (Node("k", 2, 0, 2), r"index of .* must be in \[0, 2\), got 2"),
        (Node("neuron", 2, 0, 4), r"index of .* must be in \[0, 1\), got 4"),
        (Node("neuron", 3, 0, 0), r"layer of .* must be in \[0, 3\), got 3"),
        (Node("neuron", 1, 2, 0), r"position of .* must be in \[0, 2\), got 2"),
    ],
)
def test_nodes_that_a_layer_lacks(node: Node, reason: str) -> None:
    for check in (SPACE.check, SPACE.flat):
        with pytest.raises(ValueError, match=reason):
            check(node)


@pytest.mark.parametrize("counts", [(3, 0), (3, 0, 4), (2, 0, 2)])
def test_counts_that_do_not_fit(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="counts of 'k' must be one for each of 3 layers, the lar"):
        NodeSpace(3, 2, {"k": 3}, {"k": counts})


# ---- models


def other_neurons(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = other("llama", intermediate_size=24).model.layers[1].mlp


def other_heads(model: PreTrainedModel) -> None:
    """Layer 1 has as many key heads as query heads."""
    model.model.layers[1].self_attn = (
        other("llama", num_key_value_heads=4).model.layers[1].self_attn
    )


def both(model: PreTrainedModel) -> None:
    other_neurons(model)
    other_heads(model)


def other(family: str, **settings: int) -> PreTrainedModel:
    return zoo.build(family, seed=1, wide_norms=True, **settings)


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for kind, right in wanted.items():
        assert right.abs().max() > 0, kind
        assert (found[kind] - right).abs().max() <= LIMIT * right.abs().max(), kind


@pytest.mark.parametrize("change", [other_neurons, other_heads])
@pytest.mark.parametrize("shared", [0, 3])
def test_layers_that_differ(change: Callable[[PreTrainedModel], None], shared: int) -> None:
    model = zoo.build("llama", wide_norms=True)
    change(model)
    engine = Engine(model, "reference")
    assert engine.plug.moves
    pairs = zoo.random_pairs(model, 3, 7, shared_prefix=shared)
    kinds = ["q", "k", "v", "z", "neuron", "resid_pre"]
    found = engine.attribute(pairs, "nll", nodes=kinds, progress=False)
    contribution, effect = naive_attribution(model, pairs, resolve("nll", pairs), kinds)
    close(found.contribution, contribution)
    close(found.effect, effect)
    for engine in (Engine(model, "cpp"), Engine(model, "reference", memory_budget=1)):
        close(engine.attribute(pairs, "nll", nodes=kinds, progress=False).effect, effect)
    space = found.space
    nodes = [*[node for node in space if node.position == 4][::7], Node("k", 1, 5, 1)]
    exact = engine.patch(pairs, nodes, "nll", progress=False).effect
    right, _ = naive_effects(model, pairs, [[node] for node in nodes], resolve("nll", pairs))
    assert (exact - right).abs().max() <= LIMIT * right.abs().max()


def test_patched_rows_behind_a_prefix_are_tried_in_every_layer() -> None:
    model = zoo.build("llama", wide_norms=True)
    other_heads(model)
    pairs = zoo.random_pairs(model, 3, 7, shared_prefix=3)
    estimate = Engine(model, "reference").estimate_patch(pairs, [Node("k", 1, 5, 3)], "nll")
    assert estimate.seconds > 0


def test_what_is_listed() -> None:
    """Tables, tops, candidates and files count the nodes that there are."""
    model = zoo.build("llama", wide_norms=True)
    both(model)
    engine = Engine(model, "reference")
    pairs = zoo.random_pairs(model, 2, 6, shared_prefix=2)
    kinds = ("k", "neuron")
    found = engine.attribute(pairs, "nll", nodes=kinds, per_pair=True, progress=False)
    assert engine.plug.inspection.counts == {"k": (2, 4, 2), "v": (2, 4, 2), "neuron": (40, 24, 40)}
    assert found.contribution["neuron"].shape == (3, 6, 40)
    assert not found.contribution["neuron"][1, :, 24:].any()
    nodes = list(found.space)
    assert len(found) == len(nodes) == 6 * (8 + 104)
    table = found.table(None)
    columns = [table[name].tolist() for name in ("kind", "layer", "position", "index")]
    assert [Node(*row) for row in zip(*columns, strict=True)] == nodes
    by_hand = [float(found.contribution[n.kind][n.layer, n.position, n.index]) for n in nodes]
    assert table["contribution"].tolist() == by_hand
    assert sorted(found.top(len(nodes))) == sorted(nodes)
    assert [node for node in nodes if node.position >= 2] == [
        found.space.node(int(i)) for i in moving_ids(found.space, pairs)
    ]
    with pytest.raises(ValueError, match=r"must be in \[0, 24\), got 24"):
        engine.patch(pairs, [Node("neuron", 1, 3, 24)], "nll")
    bound = engine.bound_missed(
        pairs, nodes=("k",), metric="nll", forwards=40, probability=0.3, progress=False
    )
    assert len(bound.nodes) == 4 * (2 + 4 + 2)


def test_files_of_layers_that_differ(tmp_path: Path) -> None:
    """A mixer, a mixture of experts, attention or an MLP in each layer; logits in float32 whatever the weights."""
    model = tiny_models.build("nemotron_h")
    pairs = zoo.random_pairs(model, 2, 6)
    kinds = ("q", "neuron", "attn_out")
    found = Engine(model, "reference").attribute(pairs, nodes=kinds, progress=False)
    found.save(tmp_path / "run.safetensors")
    again = Attribution.load(tmp_path / "run.safetensors")
    assert again.space == found.space
    assert again.top(50) == found.top(50)
    again.report(tmp_path / "report.html")
    again.to_csv(tmp_path / "nodes.csv")
    assert len((tmp_path / "nodes.csv").read_text().splitlines()) == 1 + 6 * (4 + 96 + 40 + 1 + 1)


# ---- writes


# scaled writes; a scaled skip; a mixer beside attention; one write a layer; a mixture with shared experts
WRITES = {
    "minicpm3": ("q", "neuron", "attn_out", "mlp_out", "resid_pre"),
    "beam": ("k", "neuron", "attn_out", "mlp_out", "resid_pre"),
    "falcon_h1": ("z", "neuron", "attn_out", "mlp_out", "resid_pre"),
    "nemotron_h": ("v", "neuron", "attn_out", "mlp_out", "resid_pre"),
    "granitemoehybrid": ("k", "neuron", "attn_out", "resid_pre"),
    "gemma4_text": ("k", "z", "neuron", "attn_out", "mlp_out", "resid_pre"),
}


@pytest.mark.parametrize("model_type", [*WRITES, "nemotron_h, attention first"])
def test_writes(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AtP* and exact patching beside the naive code, whose hooks know the modules by name.

    Attention first: cotangents pass a layer without an MLP as they are, on their way to layers that have scores; where its norm
    is its own code, more is added to them in place.
    """
    model_type, _, first = model_type.partition(", ")
    order = {"layers_block_type": ["attention", "mlp"] * 2, "num_hidden_layers": 4} if first else {}
    model, kinds = tiny_models.build(model_type, **order), WRITES[model_type]
    if first:
        monkeypatch.setattr(atp_fast.hf.layers, "find_norms", lambda layer: [])
        kinds = ("q", "k", "v", "z", "neuron", "attn_out", "mlp_out", "resid_pre")
    if model_type == "gemma4_text":
        for layer in model.model.layers:
            layer.layer_scalar.fill_(0.7)
    with served_models._Wide():
        engine = Engine(model, "reference")
        pairs = zoo.random_pairs(model, 2, 7, seed=3)
        found = engine.attribute(pairs, "nll", nodes=kinds, progress=False)
        wanted = naive_attribution(model, pairs, resolve("nll", pairs), kinds)
        for ours, table in zip((found.contribution, found.effect), wanted, strict=True):
            for kind, right in table.items():
                for layer, count in enumerate(found.space.in_layers(kind)):
                    right[layer, :, count:] = 0
            close(ours, table)
        nodes = [node for node in found.space if node.position == 5 and node.index < 3]
        exact = engine.patch(pairs, nodes, "nll", progress=False).effect
        right, _ = naive_effects(model, pairs, [[node] for node in nodes], resolve("nll", pairs))
        assert (exact - right).abs().max() <= LIMIT * right.abs().max()
    refused = {"mlp_out": "layer 2 adds 2 writes of MLPs"}
    assert engine.plug.inspection.refused == (refused if model_type == "granitemoehybrid" else {})


@pytest.mark.parametrize(("model_type", "skip"), [("granite", 1.0), ("beam", 0.6**0.5)])
def test_writes_in_half_precision(model_type: str, skip: float) -> None:
    """A few numbers that are very large, as trained models have them, do not hide which modules' outputs are added."""
    settings = {"residual_multiplier": 0.3} if model_type == "granite" else {}
    model = tiny_models.build(model_type, **settings)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 7] = 2000
    engine = Engine(model.to(torch.bfloat16), "reference")
    assert not engine.plug.inspection.refused
    layer = engine.plug.layers[1]
    names = {module: name for name, module in layer.module.named_modules()}
    parts = [names[module] for module in (layer.attn_write, layer.mlp_write) if module is not None]
    norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
    assert parts == (norms if model_type == "beam" else ["self_attn", "mlp"])
    assert abs(layer.skip - skip) < 2e-3
