"""EAP-IG: graphs, files and scores against their definitions, and against the library where it is installed.

EAP-IG and MIB are not on PyPI: put EAP-IG/src and MIB-circuit-track on PYTHONPATH, with transformer-lens 3, matplotlib,
pandas and datasets installed.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from hooked_models import batches, eap_on_token_ids, hooked, logit_diff_of

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.integrations import eap
from atp_fast.integrations.eap import GraphShape, Importances
from tokenizers_for_tests import bpe

SHAPE = GraphShape(2, 3, 4, parallel_attn_mlp=False)


def pairs_of(padding="right"):
    return zoo.mixed_pairs(zoo.build("gpt2"), padding)


def attributed(family="llama", dtype=torch.float64, pairs=None, **options):
    engine = Engine(zoo.build(family, dtype=dtype))
    options = {"method": "atp", "nodes": eap.NODES, "progress": False} | options
    return engine, engine.attribute(pairs_of() if pairs is None else pairs, **options)


def random_importances(neurons=False):
    generator = torch.Generator().manual_seed(0)
    shape = (9, 4) if neurons else (9,)
    return Importances(
        SHAPE, **{"neurons" if neurons else "nodes": torch.randn(shape, generator=generator)}
    )


# ---- the graph


def test_nodes_and_edges_of_a_graph():
    assert SHAPE.sources == [
        "input",
        "a0.h0",
        "a0.h1",
        "a0.h2",
        "m0",
        "a1.h0",
        "a1.h1",
        "a1.h2",
        "m1",
    ]
    assert SHAPE.destinations[:4] == ["a0.h0<q>", "a0.h1<q>", "a0.h2<q>", "a0.h0<k>"]
    assert SHAPE.destinations[8:11] == ["a0.h2<v>", "m0", "a1.h0<q>"]
    assert SHAPE.destinations[-2:] == ["m1", "logits"]
    edges = {name: place for name, *place in SHAPE.edges()}
    assert len(edges) == 9 * 1 + 4 + 9 * 5 + 8 + 9
    assert edges["m0->a1.h2<v>"] == [4, 18]
    assert "a0.h1->m0" in edges
    assert not {"m0->a0.h1<q>", "a1.h0->a1.h1<q>", "m1->m0", "input->input"} & set(edges)
    parallel = {name for name, *_ in GraphShape(2, 3, 4, parallel_attn_mlp=True).edges()}
    assert set(edges) - parallel == {
        f"a{layer}.h{head}->m{layer}" for layer in (0, 1) for head in range(3)
    }


@pytest.mark.parametrize(("family", "parallel"), [("gpt2", False), ("gpt_neox", True), ("llama", False), ("phi", True)])  # fmt: skip
def test_the_shape_of_a_model(family, parallel):
    assert GraphShape.of(Engine(zoo.build(family))) == GraphShape(3, 4, 32, parallel)
    assert GraphShape.of(Engine(zoo.build("gpt_neox", use_parallel_residual=False))) == GraphShape(3, 4, 32, False)  # fmt: skip


def test_bad_shapes_are_told():
    with pytest.raises(ValueError, match="n_heads must be a whole number above 0, got 0"):
        GraphShape(2, 0, 4, False)
    with pytest.raises(ValueError, match="cfg must have n_layers, .*, got no d_model"):
        GraphShape.from_cfg({"n_layers": 1, "n_heads": 1})
    with pytest.raises(ValueError, match=r"nodes must have shape \(9,\), got \(8,\)"):
        Importances(SHAPE, nodes=torch.zeros(8))
    with pytest.raises(ValueError, match="must have one of nodes, neurons, edges"):
        Importances(SHAPE)


# ---- scores

PLACES = {  # layers, projection behind the attention, what the MLP writes
    "gpt2": ("transformer.h", "attn.c_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp"),
    "llama": ("model.layers", "self_attn.o_proj", "mlp"),
    "gemma2": ("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
}


def naive_neurons(family, pairs, loss):
    """Corrupted minus clean write times the gradient of the loss, every pair alone, by hooks on the plain model."""
    model = zoo.build(family)
    layers, projection, write = PLACES[family]
    layers = model.get_submodule(layers)
    heads = model.config.num_attention_heads

    def run(ids):
        seen = {}
        hooks = []
        for number, layer in enumerate(layers):
            for name in (projection, write):

                def note(module, args, out, key=(number, name)):
                    out.retain_grad()
                    seen[key] = args[0], out

                hooks.append(layer.get_submodule(name).register_forward_hook(note))

        def first(module, args, kwargs):
            seen["input"] = args[0] if args else kwargs["hidden_states"]
            seen["input"].retain_grad()

        hooks.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
        logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        return seen, logits

    total = torch.zeros(1 + len(layers) * (heads + 1), 32, dtype=torch.float64)
    for row in range(len(pairs)):
        real = pairs.attention_mask[row]
        clean, logits = run(pairs.clean_ids[row, real][None])
        corrupted, _ = run(pairs.corrupted_ids[row, real][None])
        loss(logits[0, -1], pairs[row : row + 1]).backward()
        with torch.no_grad():
            x, y = clean["input"], corrupted["input"]
            total[0] += ((y - x) * x.grad).sum((0, 1))
            for number, layer in enumerate(layers):
                (z, out), (z_corrupted, _) = (s[number, projection] for s in (clean, corrupted))
                module, dim = layer.get_submodule(projection), z.shape[-1] // heads
                for head in range(heads):
                    part = torch.zeros_like(z)
                    mine = slice(head * dim, (head + 1) * dim)
                    part[..., mine] = (z_corrupted - z)[..., mine]
                    moved = module(part) - module(torch.zeros_like(z))
                    total[1 + number * (heads + 1) + head] += (moved * out.grad).sum((0, 1))
                x, y = clean[number, write][1], corrupted[number, write][1]
                total[(number + 1) * (heads + 1)] += ((y - x) * x.grad).sum((0, 1))
    return total / len(pairs)


def loss_of(logits, pair):
    return logits[pair.wrong_answer_ids[0]] - logits[pair.answer_ids[0]]


def nll_of(logits, pair):
    return -logits.log_softmax(-1)[pair.answer_ids[0]]


def close(found, expected, tolerance=2e-6):
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    ("family", "padding"), [*((family, "right") for family in PLACES), ("llama", "all left")]
)
def test_scores_are_difference_times_gradient_of_each_write(family, padding):
    pairs = pairs_of(padding)
    expected = naive_neurons(family, pairs, loss_of)
    engine, found = attributed(family, pairs=pairs)
    nodes = eap.node_importances(found, GraphShape.of(engine))
    neurons = eap.neuron_importances(engine, pairs)
    assert nodes.nodes.dtype == neurons.neurons.dtype == torch.float32
    assert close(neurons.neurons, expected)
    assert close(nodes.nodes, expected.sum(1))
    assert nodes.by_name()["a1.h2"] == float(nodes.nodes[1 + 5 + 2])


def test_positive_is_what_supports_the_task_whatever_the_metric():
    pairs = pairs_of()
    expected = naive_neurons("llama", pairs, nll_of)
    engine, found = attributed(metric="nll")
    shape = GraphShape.of(engine)
    assert close(eap.node_importances(found, shape).nodes, expected.sum(1))
    assert close(eap.neuron_importances(engine, pairs, "nll").neurons, expected)

    def skill(logits, pairs):
        return -nll_rows(logits, pairs)

    skill.positions = "last"
    own = engine.attribute(pairs, skill, "atp", eap.NODES, progress=False)
    with pytest.raises(ValueError, match="higher_is_better must be given for metric 'skill'"):
        eap.node_importances(own, shape)
    with pytest.raises(ValueError, match="higher_is_better must be given for metric 'skill'"):
        eap.neuron_importances(engine, pairs, skill)
    nodes = eap.node_importances(own, shape, higher_is_better=True)
    neurons = eap.neuron_importances(engine, pairs, skill, higher_is_better=True)
    assert close(nodes.nodes, expected.sum(1))
    assert close(neurons.neurons, expected)


def nll_rows(logits, pairs):
    return -logits[:, -1].log_softmax(-1).gather(1, pairs.answer_ids[:, None])[:, 0]


def test_scores_of_spans_of_unequal_prompts():
    """Sums over the tokens that a corrupted one stands for: the two ways to the scores mask the others apart."""
    tokenizer = bpe()
    pairs = PromptPairs.from_template(
        tokenizer,
        "When {A} went to the bar, {B} gave",
        clean=[{"A": "Michael and Jessica", "B": "Mary"}, {"A": "David", "B": "John"}],
        corrupted=[{"A": "Ashley", "B": "John"}, {"A": "Sarah and Mary", "B": "David"}],
        answers=[" a", " drink"],
        wrong_answers=[" drink", " a"],
    )
    engine = Engine(zoo.build("llama", vocab_size=len(tokenizer)))
    found = engine.attribute(pairs, method="atp", nodes=eap.NODES, progress=False)
    nodes = eap.node_importances(found, GraphShape.of(engine)).nodes
    assert close(eap.neuron_importances(engine, pairs).neurons.sum(1), nodes)


def test_contributions_are_sums_of_mean_absolute_effects():
    engine, found = attributed(method="atp*", per_pair=True)
    shape = GraphShape.of(engine)
    scores = eap.node_importances(found, shape, scores="contribution").by_name()
    expected = found.per_pair["z"][:, 2, :, 1].abs().sum(1).mean()
    assert scores["a2.h1"] == pytest.approx(float(expected), rel=1e-6)
    assert scores["input"] == pytest.approx(float(found.per_pair["resid_pre"][:, 0].abs().sum((1, 2)).mean()), rel=1e-6)  # fmt: skip
    assert min(scores.values()) >= 0


def test_runs_that_do_not_fit_are_told():
    engine, found = attributed("llama")
    shape = GraphShape.of(engine)
    with pytest.raises(ValueError, match="found must have 2 heads a layer, as shape has, got 4"):
        eap.node_importances(found, GraphShape(3, 2, 32, False))
    with pytest.raises(ValueError, match="found must have 4 layers, as shape has, got 3"):
        eap.node_importances(found, GraphShape(4, 4, 32, False))
    with pytest.raises(
        ValueError, match="scores must be 'contribution' or 'effect', got 'per_pair'"
    ):
        eap.node_importances(found, shape, scores="per_pair")
    _, grouped = attributed("llama", nodes=("k", "v", "z"))
    with pytest.raises(
        ValueError, match="found must score z, mlp_out, resid_pre nodes, got no mlp_out, resid_pre"
    ):
        eap.node_importances(grouped, shape)
    _, reverse = attributed("llama", direction="denoising")
    with pytest.raises(
        ValueError, match="found must be a noising run, as EAP-IG's are, got denoising"
    ):
        eap.node_importances(reverse, shape)
    with pytest.raises(ValueError, match="must have node scores, these have none"):
        random_importances(neurons=True).by_name()


# ---- files


def test_the_json_file_is_what_the_library_reads(tmp_path):
    one = Importances(GraphShape(1, 1, 2, True), nodes=torch.tensor([0.5, torch.nan, -2.0]))
    one.save(tmp_path / "importances.json")
    off = {"score": 0.0, "in_graph": False}
    found = json.loads((tmp_path / "importances.json").read_text())
    assert found["nodes"].pop("a0.h0")["score"] != 0.0  # NaN
    assert found == {
        "cfg": {"n_layers": 1, "n_heads": 1, "d_model": 2, "parallel_attn_mlp": True},
        "nodes": {
            "input": {"in_graph": False, "score": 0.5},
            "m0": {"in_graph": False, "score": -2.0},
            "logits": {"in_graph": True},
        },
        "edges": dict.fromkeys(
            (
                *("input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>", "input->m0"),
                *("input->logits", "a0.h0->logits", "m0->logits"),
            ),
            off,
        ),
    }


@pytest.mark.parametrize("suffix", ["json", "pt"])
@pytest.mark.parametrize("what", ["nodes", "neurons", "edges"])
def test_files_give_back_what_was_written(tmp_path, suffix, what):
    path = tmp_path / f"importances.{suffix}"
    if what == "edges":
        table = torch.zeros(9, 21)
        for number, (_, row, column) in enumerate(SHAPE.edges()):
            table[row, column] = number + 0.5
        given = Importances(SHAPE, edges=table)
    else:
        given = random_importances(neurons=what == "neurons")
        getattr(given, what)[3] = torch.nan
    if (what, suffix) == ("neurons", "json"):
        with pytest.raises(ValueError, match="neuron scores must go into a .pt file, got .json"):
            given.save(path)
        assert not path.exists()
        return
    given.save(path)
    found = Importances.load(path)
    assert found.shape == SHAPE
    for name in ("nodes", "neurons", "edges"):
        one, other = getattr(found, name), getattr(given, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert torch.equal(one.nan_to_num(nan=9), other.nan_to_num(nan=9))


def test_the_library_s_own_neuron_json_is_read(tmp_path):
    """It writes all heads of a layer under each of them."""
    neurons = random_importances(neurons=True).neurons
    nodes = {}
    for row, name in enumerate(SHAPE.sources):
        mine = slice(row - row % 4 + 1, row - row % 4 + 4)
        first = 1 + (row - 1) // 4 * 4
        mine = neurons[first : first + 3] if ".h" in name else neurons[row]
        nodes[name] = {"in_graph": False, "neurons": [], "neurons_scores": mine.tolist()}
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"cfg": SHAPE.cfg, "nodes": nodes, "edges": {}}))
    assert torch.equal(Importances.load(path).neurons, neurons)


def test_bad_files_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .json or .pt, got .*x.csv"):
        random_importances().save(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"path must end in .json or .pt, got .*x.csv"):
        Importances.load(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError):
        Importances.load(tmp_path / "none.pt")
    for suffix in ("json", "pt"):
        bad = tmp_path / f"bad.{suffix}"
        bad.write_bytes(b"nothing")
        with pytest.raises(
            ValueError, match=rf"bad.{suffix} must be an importances file of EAP-IG's"
        ):
            Importances.load(bad)
    path = tmp_path / "a.json"
    random_importances().save(path)
    record = json.loads(path.read_text())
    for change, message in (
        ({"nodes": {"a0.h7": {"score": 1.0}}}, "nodes must be those of its cfg, got 'a0.h7'"),
        ({"edges": {"m1->m0": {"score": 1.0}}}, "edges must be those of its cfg, got 'm1->m0'"),
        ({"cfg": {"n_layers": 2}}, "cfg must have n_layers, n_heads"),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            Importances.load(path)
    del record["edges"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="KeyError\\('edges'\\)"):
        Importances.load(path)
    random_importances().save(tmp_path / "a.pt")
    tensors = torch.load(tmp_path / "a.pt") | {"src_nodes": ["input"]}
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match="a.pt must be an importances file .* src_nodes must be those"
    ):
        Importances.load(tmp_path / "a.pt")


class FakeGraph:
    def __init__(self, cfg, nodes=False, neurons=False):
        self.cfg = cfg
        self.nodes_scores = torch.zeros(9) if nodes else None
        self.neurons_scores = torch.zeros(9, 4) if neurons else None
        self.scores = torch.zeros(9, 21)


def test_a_graph_of_another_shape_is_told():
    with pytest.raises(ValueError, match="graph must have n_heads 3, got n_heads 2"):
        random_importances().to_graph(FakeGraph(SHAPE.cfg | {"n_heads": 2}, nodes=True))
    with pytest.raises(
        ValueError,
        match="graph must have n_layers 2, parallel_attn_mlp False, got n_layers 5, parallel",
    ):
        random_importances().to_graph(
            FakeGraph(SHAPE.cfg | {"n_layers": 5, "parallel_attn_mlp": True})
        )
    with pytest.raises(
        ValueError, match="graph must be built with node_scores=True for these scores"
    ):
        random_importances().to_graph(FakeGraph(SHAPE.cfg, neurons=True))
    with pytest.raises(ValueError, match="graph must be built with neuron_level=True"):
        random_importances(neurons=True).to_graph(FakeGraph(SHAPE.cfg, nodes=True))
    graph = FakeGraph(SHAPE.cfg | {"more": 1}, nodes=True)
    assert random_importances().to_graph(graph) is graph
    assert torch.equal(graph.nodes_scores, random_importances().nodes)


def test_a_missing_library_is_one_error(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "eap.graph", None)
    with pytest.raises(
        ImportError,
        match="a new graph needs EAP-IG, which is not on PyPI: install github.com/hannamw",
    ):
        random_importances().to_graph()


# ---- the library itself


@pytest.fixture
def library(monkeypatch):
    return eap_on_token_ids(monkeypatch)


@pytest.mark.parametrize("neuron", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_the_library_s_own_attribution_with_our_call_in_its_place(library, family, neuron):
    from eap.attribute_node import attribute_node

    model, pairs = zoo.build(family), pairs_of()
    theirs = hooked(model, use_split_qkv_input=True)
    graph = library.Graph.from_model(theirs, node_scores=not neuron, neuron_level=neuron)
    for node in graph.nodes.values():
        if node.name.startswith("m"):  # the release takes the gradient where the MLP reads
            node.in_hook = node.out_hook
    metric = partial(logit_diff_of, mean=True, loss=True)
    attribute_node(theirs, graph, batches(pairs), metric, "EAP", quiet=True, neuron=neuron)

    engine = Engine(model)
    if neuron:
        ours = eap.neuron_importances(engine, pairs, logit_diff_of, higher_is_better=True)
        expected, found = graph.neurons_scores.clone(), ours.neurons
    else:
        run = engine.attribute(pairs, logit_diff_of, "atp", eap.NODES, progress=False)
        ours = eap.node_importances(run, GraphShape.of(engine), higher_is_better=True)
        expected, found = graph.nodes_scores.clone(), ours.nodes
    # its metric is a mean over the batch, which it divides by the number of pairs once more
    assert close(found, expected * len(pairs), 1e-5)
    ours.to_graph(graph)
    assert torch.equal(graph.neurons_scores if neuron else graph.nodes_scores, found)
    assert graph.forward_index(graph.nodes["a1.h2"], attn_slice=False) == ours.shape.sources.index("a1.h2")  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_the_library_reads_our_files(library, tmp_path, suffix):
    engine, found = attributed("llama")
    ours = eap.node_importances(found, GraphShape.of(engine))
    ours.save(tmp_path / f"importances.{suffix}")
    read = library.Graph.from_json if suffix == "json" else library.Graph.from_pt
    graph = read(str(tmp_path / f"importances.{suffix}"))
    scores = ours.by_name()
    assert {name for name in graph.nodes if name != "logits"} == set(scores)
    for name, score in scores.items():
        assert float(graph.nodes[name].score) == score
    assert set(graph.edges) == {name for name, *_ in ours.shape.edges()}
    assert all(
        edge.matrix_index[0] == row and edge.matrix_index[1] % graph.n_backward == column
        for name, row, column in ours.shape.edges()
        for edge in [graph.edges[name]]
    )
    graph.apply_topn(4, True, level="node")
    best = sorted(scores, key=lambda name: -abs(scores[name]))[:4]
    assert {name for name, node in graph.nodes.items() if name != "logits" and node.in_graph} == set(best)  # fmt: skip


def test_the_library_reads_our_neurons_and_we_read_its_files(library, tmp_path):
    ours = random_importances(neurons=True)
    ours.save(tmp_path / "a.pt")
    graph = library.Graph.from_pt(str(tmp_path / "a.pt"))
    assert torch.equal(graph.neurons_scores, ours.neurons)
    graph.apply_topn(5, True, level="neuron")
    assert int(graph.neurons_in_graph.sum()) <= 5
    graph.to_pt(str(tmp_path / "b.pt"))
    assert torch.equal(Importances.load(tmp_path / "b.pt").neurons, ours.neurons)
    made = random_importances().to_graph()
    made.to_pt(str(tmp_path / "c.pt"))
    assert torch.equal(Importances.load(tmp_path / "c.pt").nodes, random_importances().nodes)
    edges = library.Graph.from_model(SHAPE.cfg)
    edges.edges["a0.h1->a1.h2<k>"].score = 2.5
    edges.to_json(str(tmp_path / "d.json"))
    found = Importances.load(tmp_path / "d.json")
    assert found.nodes is None
    assert float(found.edges[2, SHAPE.destinations.index("a1.h2<k>")]) == 2.5
    assert int((found.edges != 0).sum()) == 1
    assert torch.equal(edges.scores, Importances.load(tmp_path / "d.json").to_graph().scores)


def test_its_four_argument_metrics(recwarn):
    """A metric as EAP-IG's notebooks and MIB write them, with their options fixed by partial."""
    pairs = pairs_of()
    engine = Engine(zoo.build("gpt2"))
    named = engine.attribute(pairs, "logit_diff", "atp", ("z",), progress=False)

    def converted(logits, clean_logits, input_length, labels, mean=True, prob=False, loss=False):
        labels = torch.tensor(labels, dtype=torch.long, device=logits.device)  # as MIB's
        return logit_diff_of(logits, clean_logits, input_length, labels, mean, loss)

    for metric in (
        logit_diff_of,
        partial(converted, mean=True, loss=True),
        partial(converted, prob=False),
    ):
        found = engine.attribute(pairs, metric, "atp", ("z",), progress=False)
        assert close(found.effect["z"], named.effect["z"])
    assert found.metric == "converted"
    assert not recwarn.list
