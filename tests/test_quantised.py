"""Quantised weights: the dequantised model's effects, by weights that are made for a product and freed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import quantised_layers as layers
import zoo
from atp_fast import Engine
from atp_fast.attribution import memory
from atp_fast.attribution.replay import model_state
from atp_fast.hf.formats import maker_of, scaled
from atp_fast.nodes import KINDS, Node
from atp_fast.ops.linear import made_linear
from atp_fast.results import Attribution

NAMES = (*layers.LINEARS, *layers.EXPERTS)
QUICK = ("gptq-standin", *layers.EXPERTS)
NODES = [Node(kind, 1, 5, 0) for kind in KINDS]


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that a call must leave as it was."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        kept = vars(module)
        found[path] = (
            type(module),
            kept.get("forward"),
            kept.get("linear"),
            kept.get("_old_forward"),
        )
        found[path] += len(module._forward_hooks), len(module._forward_pre_hooks), module.training
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                content: Any = None
                if not value.is_meta:
                    own = type(value).dequantize is not Tensor.dequantize
                    plain = (value.dequantize() if own else value).detach().contiguous()
                    content = plain.flatten().view(torch.uint8).tolist()
                found[f"{path}.{name}"] = (
                    *(id(value), value.dtype, value.device, value.requires_grad),
                    *(type(value), content),
                )
    return found


def assert_close(found: Attribution, wanted: Attribution, share: float = 1e-5) -> None:
    for kind, right in wanted.contribution.items():
        assert float(right.abs().max()) > 0
        for ours, theirs in (
            (found.contribution[kind], right),
            (found.effect[kind], wanted.effect[kind]),
        ):
            assert float((ours - theirs).abs().max()) <= share * float(theirs.abs().max()), kind


@pytest.mark.parametrize("name", NAMES)
def test_effects_are_those_of_the_dequantised_model(name: str) -> None:
    model, plain = layers.build(name)
    pairs = zoo.random_pairs(model, 3, 9, shared_prefix=2)
    before = state(model)
    engine, right = Engine(model), Engine(plain)
    exactly = Engine(copy.deepcopy(plain).double())
    assert model_state(engine.plug) is None  # weights that are made are in no recording
    assert engine.plug.space(9, KINDS) == right.plug.space(9, KINDS)
    for method in ("atp", "atp*"):
        asked: dict[str, Any] = {"method": method, "nodes": KINDS, "progress": False}
        found, own, truth = (e.attribute(pairs, **asked) for e in (engine, right, exactly))
        for kind, table in truth.effect.items():
            largest = float(table.abs().max())
            # both round: where a softmax is saturated, by more than 1e-5
            allowed = max(1e-5 * largest, 2 * float((own.effect[kind] - table).abs().max()))
            assert largest > 0
            assert float((found.effect[kind] - table).abs().max()) <= allowed, kind
            scores = found.contribution[kind] - truth.contribution[kind]
            assert float(scores.abs().max()) <= allowed, kind
    exact, wanted = (e.patch(pairs, NODES, progress=False).effect for e in (engine, right))
    assert float((exact - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert found.metadata["dtype"] == "float32"
    assert state(model) == before


@pytest.mark.parametrize("name", QUICK)
def test_the_model_is_left_as_it_was_by_an_error(name: str) -> None:
    model, _ = layers.build(name)
    pairs, engine, before = zoo.random_pairs(model, 2, 6), Engine(model), state(model)

    def fails(logits: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        engine.attribute(pairs, fails, progress=False)
    assert state(model) == before


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    model, plain = layers.build(name, dtype)
    pairs = zoo.random_pairs(model, 2, 7)
    found, right = (Engine(m).attribute(pairs, progress=False) for m in (model, plain))
    assert found.metadata["dtype"] == str(dtype).removeprefix("torch.")
    # in bfloat16 weights are rounded once, products and their sums are the same
    assert_close(found, right, 1e-5 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("name", QUICK)
def test_cotangents_in_bfloat16(name: str) -> None:
    model, plain = layers.build(name)
    pairs = zoo.random_pairs(model, 2, 7)
    found, right = (
        Engine(m, precision="bf16").attribute(pairs, progress=False) for m in (model, plain)
    )
    wide = Engine(plain).attribute(pairs, progress=False)
    assert_close(found, right)
    assert not torch.equal(found.contribution["q"], wide.contribution["q"])


def test_both_prompts_in_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = layers.build("gptq-standin")
    pairs = zoo.random_pairs(model, 2, 7)
    right = Engine(plain).attribute(pairs, progress=False)
    monkeypatch.setattr(memory, "saves_starts", lambda device, rows: True)
    assert_close(Engine(model, memory_budget="1GiB").attribute(pairs, progress=False), right)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_layouts(bits: int, version: int, ordered: bool) -> None:
    layer, weight = layers.gptq(nn.Linear(96, 64), bits, version, ordered)
    torch.testing.assert_close(maker_of(layer)(torch.float32), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(48, 64), (40, 64), (48, 70)], ids=str)
@pytest.mark.parametrize("scales", ["one", "rows", "blocks", "powers"])
def test_fp8_scales(shape: tuple[int, int], scales: str) -> None:
    rows, columns = shape
    data = torch.randn(shape).to(torch.float8_e4m3fn)
    grid = {"one": (), "rows": (rows, 1), "blocks": (-(-rows // 16), -(-columns // 16))}
    block = (16, 16) if scales in ("blocks", "powers") else None
    scale = torch.rand(grid.get(scales, grid["blocks"])) + 0.5
    wanted = scale
    if scales == "powers":
        scale = torch.randint(120, 130, grid["blocks"]).to(torch.uint8)
        wanted = 2.0 ** (scale.float() - 127)
    if block is not None:
        wanted = wanted.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
    found = scaled(data, scale, block, False, torch.float32)
    torch.testing.assert_close(found, data.float() * wanted, rtol=0, atol=0)


def test_fp4_in_pairs() -> None:
    """As transformers' experts hold them, by transformers' own way back."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    data = torch.randint(-128, 128, (24, 32), dtype=torch.int8)
    scale = torch.rand(24, 2)
    wanted = Fp8Dequantize(None)._dequantize_one(data, scale, torch.float32)
    torch.testing.assert_close(
        scaled(data, scale, None, True, torch.float32), wanted, rtol=0, atol=0
    )


def test_bitsandbytes_weights_that_its_own_code_has_repacked() -> None:
    """On some CPUs its first forward pass changes the layout, and rounds the scales to bfloat16."""
    sizes = {**layers.SIZES, "intermediate_size": 128}
    plain = zoo.build("llama", torch.float32, **sizes)
    model, plain = layers.quantise(plain, layers.bitsandbytes4, skip=("lm_head",))
    pairs = zoo.random_pairs(model, 2, 7)
    for layer in model.model.layers:
        layer.mlp.up_proj(torch.zeros(1, 64))
    weight = model.model.layers[0].mlp.up_proj.weight
    before = state(model)
    found, right = (
        Engine(m).attribute(pairs, method="atp", nodes=["resid_pre"], progress=False)
        for m in (model, plain)
    )
    repacked = weight.quant_state.dtype == torch.bfloat16
    assert_close(found, right, 0.05 if repacked else 1e-5)
    assert state(model) == before


def test_biases_keep_their_type() -> None:
    """bitsandbytes' own code casts them to that of its products."""
    model, _ = layers.build("bitsandbytes-nf4")
    bias = model.model.layers[1].mlp.up_proj.bias
    bias.data = bias.data.to(torch.bfloat16)
    before = state(model)
    Engine(model)
    assert state(model) == before


# ---- adapters, embeddings, weights that are fetched


def test_adapters_around_quantised_layers() -> None:
    peft = pytest.importorskip("peft")
    how = layers.bitsandbytes4
    model, plain = layers.quantise(zoo.build("llama", torch.float32, **layers.SIZES), how)
    adapted = []
    for each in (model, plain):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted.append(peft.get_peft_model(each, config).eval())
    pairs = zoo.random_pairs(plain, 2, 7)
    found, right = (Engine(m).attribute(pairs, progress=False) for m in adapted)
    assert_close(found, right)


def test_a_model_whose_first_weights_are_packed() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Embedding

    model, plain = layers.build("fp8")
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    table = plain.model.embed_tokens.weight.detach()
    embedding = FP8Embedding(*table.shape)
    embedding.weight.data = (table * 8).to(torch.float8_e4m3fn)
    embedding.weight_scale.data.fill_(1 / 8)
    plain.model.embed_tokens.weight.data = embedding.weight.data.float() / 8
    model.model.embed_tokens = embedding.eval()
    engine = Engine(model)
    assert engine.plug.dtype == torch.float32 and engine.plug.vocabulary == zoo.VOCAB
    pairs = zoo.random_pairs(model, 2, 7)
    found, right = (e.attribute(pairs, progress=False) for e in (engine, Engine(plain)))
    assert found.metadata["dtype"] == "float32"
    assert_close(found, right)


@pytest.mark.parametrize("name", ["fp8", "gptq-standin", "bitsandbytes-int8"])
def test_quantised_weights_that_accelerate_fetches(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = layers.build(name)
    pairs = zoo.random_pairs(model, 2, 7)
    for layer in model.requires_grad_(False).model.layers:
        accelerate.cpu_offload(layer, torch.device("cpu"), offload_buffers=True)
    before = state(model)
    engine = Engine(model)
    assert engine.plug.offloaded
    assert_close(
        engine.attribute(pairs, progress=False), Engine(plain).attribute(pairs, progress=False)
    )
    after = state(model)
    assert {k: v[1:] for k, v in after.items()} == {k: v[1:] for k, v in before.items()}


def test_four_bits_that_accelerate_cannot_fetch_are_refused() -> None:
    """The model does not run by itself either: what bitsandbytes needs beside the weights stays on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    model, _ = layers.build("bitsandbytes-nf4")
    for layer in model.model.layers:
        accelerate.cpu_offload(layer, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM raises NotImplementedError"):
        Engine(model)


# ---- what is refused, before anything runs


class Unknown(nn.Module):
    """A format that nobody knows."""

    def __init__(self, linear: nn.Linear, buffer: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.zeros(linear.out_features, linear.in_features // 2, dtype=torch.uint8)
        if buffer:
            self.register_buffer("words", packed)
        else:
            self.words = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it must not run")


@pytest.mark.parametrize("buffer", [False, True], ids=["parameter", "buffer"])
@pytest.mark.parametrize("path", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_unknown_formats_are_refused(path: str, buffer: bool) -> None:
    model = zoo.build("llama", torch.float32)
    model.set_submodule(path, Unknown(model.get_submodule(path), buffer).eval())
    before = state(model)
    message = (
        rf"LlamaForCausalLM is not served: {path} must hold .* got Unknown .*words: torch.uint8"
    )
    with pytest.raises(NotImplementedError, match=message):
        Engine(model)
    assert state(model) == before


def test_a_layer_whose_own_code_computes_something_else_is_refused() -> None:
    model, _ = layers.build("gptq-standin")
    model.model.layers[1].mlp.up_proj.version = 2  # its zero points are the first version's
    message = r"model.layers.1.mlp.up_proj must compute .*GptqStandIn, GPTQ.* differs by"
    with pytest.raises(NotImplementedError, match=message):
        Engine(model)


def test_a_layer_whose_own_code_fails_is_refused() -> None:
    model, _ = layers.build("awq-standin")
    model.model.layers[2].self_attn.q_proj.kept.clear()
    message = r"model.layers.2.self_attn.q_proj must compute .*AwqStandIn, AWQ.* fails \(IndexError"
    with pytest.raises(NotImplementedError, match=message):
        Engine(model)


# ---- memory


def test_weights_are_made_again_for_gradients_and_kept_by_nobody() -> None:
    weight, calls = torch.randn(5, 4, dtype=torch.float64), []

    def make(dtype: torch.dtype) -> Tensor:
        calls.append(dtype)
        return weight.to(dtype)

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        out = made_linear(x, make, bias, False)
    assert held == [] and len(calls) == 1
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(found, grad @ weight)
    assert calls == [torch.float64] * 2


def test_the_plan_has_room_for_the_largest_weight() -> None:
    model, plain = layers.build("gptq-standin")
    plugs = Engine(model).plug, Engine(plain).plug
    largest = 96 * 64 * (4 + 4)
    assert [plug.made_bytes for plug in plugs] == [largest, 0]
    size = memory.SweepSize(8, 0, 4, ("q", "neuron"), 1)
    plan = memory.SweepPlan(1, 1, 3)
    first, second = (memory.estimate_sweep(plug, plan, size) for plug in plugs)
    assert first - second == largest
    rooms = [memory.patched_rows(plug, 200_000, 8, 0, 1) for plug in plugs]
    assert rooms[0] < rooms[1]
    assert rooms[0] == memory.patched_rows(plugs[1], 200_000 - largest, 8, 0, 1)


def test_a_call_takes_less_than_one_layer_in_floats() -> None:
    """Six layers of 4.2 million numbers in fp8, every one of which keeps its tape."""
    worker = Path(__file__).parent / "quantised_peak.py"
    # freed blocks go back to the system at once
    settings = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    quiet = {**os.environ, **settings, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, str(worker)], env=quiet, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["taped_from"] == 0
    assert max(found["sweep"], found["patch"], found["open"]) < found["layer"]
