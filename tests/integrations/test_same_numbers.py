"""One IOI run through every door: the engine, the command line, TransformerLens and nnsight give the same numbers."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from atp_fast import Attribution, Engine, load_model
from atp_fast.cli import app
from atp_fast.nodes import KINDS
from atp_fast.prompts.tasks import load_task
from tokenizers_for_tests import TINY

MODEL = TINY.parent / "tiny_llama_2L"


@pytest.fixture(scope="module")
def run():
    model, tokenizer = load_model(str(MODEL))
    pairs = load_task("ioi", tokenizer, n_pairs=3, seed=1)
    found = Engine(model).attribute(pairs, nodes=KINDS, progress=False)
    assert all(bool(x.abs().max() > 1e-6) for x in found.effect.values())
    return pairs, found


def same(found, expected):
    assert set(found.effect) == set(expected.effect) == set(KINDS)
    for kind, effect in expected.effect.items():
        assert torch.equal(found.effect[kind], effect), kind
        assert torch.equal(found.contribution[kind], expected.contribution[kind]), kind


def test_from_the_command_line(run, tmp_path):
    asked = ["attribute", "--model", MODEL, "--task", "ioi", "--n-pairs", 3, "--seed", 1]
    asked += ["--nodes", ",".join(KINDS), "--out", tmp_path / "run"]
    done = CliRunner().invoke(app, [str(x) for x in asked], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    same(Attribution.load(tmp_path / "run" / "run.safetensors"), run[1])


def test_through_transformer_lens(run):
    pytest.importorskip(
        "transformer_lens.model_bridge", reason="TransformerLens 4 is not installed"
    )
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from atp_fast.integrations import transformer_lens as ours

    pairs, expected = run
    model, _ = load_model(str(MODEL))
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config).eval()
    with ours.engine(bridge) as engine:
        found = engine.attribute(pairs, nodes=KINDS, progress=False)
    same(found, expected)
    cache = ours.to_activation_cache(found, bridge)
    for kind in ("q", "k", "v", "z"):
        assert torch.equal(cache.stack_activation(kind), expected.effect[kind]), kind


def test_through_nnsight(run):
    pytest.importorskip("nnsight")
    from nnsight import NNsight

    from atp_fast.integrations import nnsight as ours

    pairs, expected = run
    model, _ = load_model(str(MODEL))
    wrapped = NNsight(model)
    found = ours.attribute(wrapped, pairs, nodes=KINDS, progress=False)
    same(found, expected)
    by_path = ours.by_module(found, wrapped)
    for layer in range(2):
        heads = by_path[f"model.layers.{layer}.self_attn.o_proj"]["z"]
        assert torch.equal(heads, expected.effect["z"][layer])
