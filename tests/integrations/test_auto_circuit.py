"""auto-circuit: PruneScores by their names and shapes, and against the library where it is installed."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hooked_models import hooked

import zoo
from atp_fast import Engine
from atp_fast.integrations.auto_circuit import prune_scores
from atp_fast.integrations.eap import node_importances
from atp_fast.integrations.eap_faithfulness import evaluate
from atp_fast.integrations.graph_shape import NODES, GraphShape, source_scores
from tokenizers_for_tests import bpe

LENGTH = 6


def attributed(family, dtype=torch.float64, **options):
    model = zoo.build(family, dtype=dtype)
    pairs = zoo.random_pairs(model, 3, LENGTH)
    engine = Engine(model)
    options = {"method": "atp", "nodes": NODES, "progress": False} | options
    return model, pairs, engine, engine.attribute(pairs, **options), GraphShape.of(engine)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_every_edge_has_the_score_of_the_node_that_it_leaves(family):
    _, _, _, found, shape = attributed(family)
    scores = node_importances(found, shape).nodes.double()
    result = prune_scores(found, shape)
    assert list(result)[:4] == [
        *("blocks.0.hook_q_input", "blocks.0.hook_k_input", "blocks.0.hook_v_input"),
        "blocks.0.hook_mlp_in",
    ]
    assert list(result)[-1] == "blocks.2.hook_resid_post"
    assert len(result) == 3 * 4 + 1
    for layer in range(3):
        before = 1 + 5 * layer
        for letter in "qkv":
            into = result[f"blocks.{layer}.hook_{letter}_input"]
            assert into.shape == (4, before)  # query heads, though llama's keys have two
            torch.testing.assert_close(into, scores[:before].expand(4, -1), rtol=1e-6, atol=0)
        into = result[f"blocks.{layer}.hook_mlp_in"]
        assert into.shape == (before + 4 * (family == "llama"),)
        torch.testing.assert_close(into, scores[: len(into)], rtol=1e-6, atol=0)
    torch.testing.assert_close(result["blocks.2.hook_resid_post"], scores, rtol=1e-6, atol=0)


def test_positions_heads_read_together_and_tensors_of_their_own():
    _, _, _, found, shape = attributed("llama")
    by_position = prune_scores(found, shape, by_position=True, separate_qkv=False)
    assert by_position["blocks.1.hook_attn_in"].shape == (LENGTH, 4, 6)
    assert by_position["blocks.1.hook_mlp_in"].shape == (LENGTH, 10)
    assert not any("_q_" in name for name in by_position)
    table = source_scores(found, shape)
    assert table.shape == (LENGTH, 16)
    assert torch.equal(by_position["blocks.2.hook_resid_post"], table)
    head = -found.effect["z"][1, :, 3]
    assert torch.equal(by_position["blocks.2.hook_mlp_in"][:, 1 + 5 + 3], head)
    whole = prune_scores(found, shape)
    for name, x in whole.items():
        if "mlp" in name:
            torch.testing.assert_close(by_position[name].sum(0), x)
    whole["blocks.0.hook_q_input"][0] = 9.0
    assert float(whole["blocks.0.hook_q_input"][1, 0]) != 9.0


def test_a_run_that_does_not_fit_is_told():
    _, _, _, found, _ = attributed("llama")
    with pytest.raises(ValueError, match="found must have 2 heads a layer, as shape has, got 4"):
        prune_scores(found, GraphShape(3, 2, 32, False))


def test_the_page_s_example_runs(monkeypatch, tmp_path, capsys):
    page = Path(__file__).parents[2] / "docs" / "integrations" / "auto_circuit.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    tokenizer = bpe()
    small = zoo.build("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    monkeypatch.setattr("atp_fast.load_model", lambda name: (small, tokenizer))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(block, "auto_circuit.md", "exec"), scope)
    assert capsys.readouterr().out == "torch.Size([4, 6])\n"
    saved = torch.load("prune_scores.pt")
    assert all(torch.equal(saved[name], x) for name, x in scope["scores"].items())


# ---- the library itself


def patchable(model, seq_len=None, separate_qkv=True):
    pytest.importorskip("auto_circuit")
    from auto_circuit.utils.graph_utils import patchable_model

    split = {"use_split_qkv_input" if separate_qkv else "use_attn_in": True}
    return patchable_model(
        hooked(model, **split),
        factorized=True,
        slice_output="last_seq",
        seq_len=seq_len,
        separate_qkv=separate_qkv,
    )


def loader(pairs, seq_len):
    from auto_circuit.data import PromptDataLoader, PromptDataset

    data = PromptDataset(
        pairs.clean_ids, pairs.corrupted_ids, list(pairs.answer_ids[:, None]), list(pairs.wrong_answer_ids[:, None])
    )  # fmt: skip
    return PromptDataLoader(data, seq_len=seq_len, diverge_idx=0, batch_size=len(pairs))


@pytest.mark.parametrize("seq_len", [None, LENGTH])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_library_s_own_mask_gradients_add_up_to_our_scores(family, seq_len):
    """Its score of an edge is the part of the source's effect that goes through it, so a node's edges add up."""
    pytest.importorskip("auto_circuit")
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

    model, pairs, _, found, shape = attributed(family)
    theirs = patchable(model, seq_len)
    expected = mask_gradient_prune_scores(
        theirs, loader(pairs, seq_len), None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
    )  # fmt: skip
    ours = prune_scores(found, shape, by_position=seq_len is not None)
    blank = theirs.new_prune_scores()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in blank.items()}  # fmt: skip
    total = torch.zeros((seq_len, 16) if seq_len else (16,), dtype=torch.float64)
    for x in expected.values():
        into = x.sum(-2) if x.ndim == (3 if seq_len else 2) else x
        total[..., : into.shape[-1]] += into
    scores = ours["blocks.2.hook_resid_post"]
    assert float((total - scores).abs().max()) <= 1e-5 * float(scores.abs().max())
    edge = next(e for e in theirs.edges if e.name == "A0.1->A2.3.K" and e.seq_idx == (seq_len and 2))  # fmt: skip
    node = ours["blocks.2.hook_resid_post"][..., shape.sources.index("a0.h1")]
    assert float(edge.prune_score(ours)) == float(node[2] if seq_len else node)


@pytest.mark.parametrize("separate_qkv", [False, True])
def test_a_parallel_model_has_the_same_names_and_shapes(separate_qkv):
    pytest.importorskip("auto_circuit")
    from auto_circuit.utils.graph_utils import patchable_model
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    split = {"use_split_qkv_input" if separate_qkv else "use_attn_in": True}
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=32, n_heads=4, d_head=8, d_mlp=40, d_vocab=48, n_ctx=32, act_fn="gelu", parallel_attn_mlp=True,
        use_attn_result=True, use_hook_mlp_in=True, device="cpu", **split,
    )  # fmt: skip
    theirs = patchable_model(HookedTransformer(cfg), factorized=True, separate_qkv=separate_qkv)
    _, _, _, found, shape = attributed("gpt_neox")
    ours = prune_scores(found, shape, separate_qkv=separate_qkv)
    blank = theirs.new_prune_scores()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in blank.items()}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_its_circuits_of_our_scores_are_those_we_evaluate(family):
    pytest.importorskip("auto_circuit")
    from auto_circuit.prune import run_circuits
    from auto_circuit.types import PatchType

    model, pairs, engine, found, shape = attributed(family, torch.float32)
    found.effect["resid_pre"][0] *= 50  # the input among the best
    importances = node_importances(found, shape)
    evaluation = evaluate(engine, pairs, importances)
    outgoing = Counter(row for _, row, _ in shape.edges())
    best = importances.nodes.abs().sort(descending=True).indices.tolist()
    theirs, data = patchable(model), loader(pairs, None)
    for size, faithfulness in zip(evaluation.by_size.sizes, evaluation.by_size.values, strict=True):
        if size == 0:
            continue
        edges = sum(outgoing[row] for row in best[:size])
        result = run_circuits(
            theirs, data, [edges], prune_scores(found, shape), PatchType.TREE_PATCH
        )
        assert list(result) == [edges]
        (logits,) = result[edges].values()
        rows = torch.arange(len(pairs))
        value = (logits[rows, pairs.answer_ids] - logits[rows, pairs.wrong_answer_ids]).mean()
        own = evaluation.empty + faithfulness * (evaluation.full - evaluation.empty)
        assert float(value) == pytest.approx(own, abs=1e-4)
