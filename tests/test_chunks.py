"""Attention in chunks of positions, as llama4's: folded into the batch axis, beside the dense formula under the mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import served_models
import tiny_models
import zoo
from atp_fast import Engine, ops
from atp_fast.hf import AttentionOptions
from atp_fast.hf.attention import _mask
from atp_fast.metrics import resolve
from naive_attribution import naive_attribution
from naive_patching import naive_effects

LIMIT = 1e-9
B, HEADS, KV, D, COTANGENTS = 2, 4, 2, 5, 3


def dense(q: Tensor, k: Tensor, v: Tensor, chunk: int, sinks: Tensor) -> Tensor:
    """z by the definition: softmax under the mask of causal chunks; queries stand at the end of the keys."""
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    j = torch.arange(k.shape[2])
    allowed = (j <= i) & (j // chunk == i // chunk)
    k, v = (x.repeat_interleave(HEADS // KV, 1) for x in (k, v))
    scores = (0.7 * q @ k.mT).masked_fill(~allowed, -torch.inf)
    sink = sinks[:, None, None].expand(B, HEADS, q.shape[2], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("chunk", "queries", "keys"),
    [(3, 8, 8), (4, 8, 8), (4, 5, 11), (4, 3, 11), (4, 3, 7), (5, 1, 9), (1, 4, 6), (9, 7, 8)],
)
def test_chunks(backend: str, chunk: int, queries: int, keys: int) -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    q, q_corrupted = random(B, HEADS, queries, D), random(B, HEADS, queries, D)
    k, k_corrupted, v = (random(B, KV, keys, D) for _ in range(3))
    grad_z, sinks = random(COTANGENTS, B, HEADS, queries, D), random(HEADS)
    options = AttentionOptions(0.7, None, None, sinks, chunk)
    z, stats = options.attention(q, k, v, statistics=True, backend=backend)
    right = dense(q, k, v, chunk, sinks)
    torch.testing.assert_close(z, right, atol=1e-12, rtol=0)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = dense(*leaves, chunk, sinks)
    wanted = [torch.autograd.grad(whole, leaves, g, retain_graph=True) for g in grad_z]
    grads = options.attention_vjp(q, k, v, stats=stats, grad_z=grad_z, backend=backend)
    found = options.attention_vjp_effects(
        q,
        k,
        v,
        q_corrupted=q_corrupted,
        k_corrupted=k_corrupted,
        stats=stats,
        grad_z=grad_z,
        backend=backend,
    )
    for n in range(3):
        own = torch.stack([w[n] for w in wanted])
        torch.testing.assert_close(grads[n], own, atol=1e-12, rtol=0)
        torch.testing.assert_close(found[n], own, atol=1e-12, rtol=0)
    moved = dense(q_corrupted, k, v, chunk, sinks) - right
    torch.testing.assert_close(
        found.effect_q, (grad_z * moved).sum(-1).transpose(-1, -2), atol=1e-12, rtol=0
    )
    for j in range(keys):
        patched = k.clone()
        patched[:, :, j] = k_corrupted[:, :, j]
        moved = dense(q, patched, v, chunk, sinks) - right
        by_head = (grad_z * moved).sum((-1, -2)).unflatten(-1, (KV, -1)).sum(-1)
        torch.testing.assert_close(found.effect_k[:, :, j], by_head, atol=1e-12, rtol=0)


def test_a_prompt_of_one_chunk_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: seen.append(a[0].shape) or own(*a, **k))
    x = torch.ones(2, 2, 6, 4)
    for chunk in (5, 6):
        AttentionOptions(1.0, None, None, None, chunk).attention(
            x, x, x, statistics=False, backend="reference"
        )
    assert seen == [(4, 2, 5, 4), (2, 2, 6, 4)]


@pytest.mark.parametrize("width", [2, 3, 4096])
def test_masks_of_chunks(width: int) -> None:
    def found(**options: object) -> int:
        def rule(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            wide = options.get("width", width)
            return (kv <= q) & (kv // wide == q // wide)

        return int(_mask(mask_function=rule, local_size=options.get("said", width)))

    assert found() == -2 - width
    assert found(width=width + 1) == -1
    assert found(said=None) == -1


SETTINGS = {"attention_chunk_size": 4, "attn_temperature_tuning": False}


@pytest.mark.parametrize("shared", [0, 5])
def test_a_model_in_chunks(shared: int) -> None:
    """Two layers of three attend in chunks; a prefix that the pairs share ends in a chunk's middle."""
    model = tiny_models.build("llama4_text", **SETTINGS)
    kinds = ["q", "k", "v", "z", "resid_pre"]
    with served_models._Wide():
        engine = Engine(model, "reference")
        assert engine.plug.moves
        pairs = zoo.random_pairs(model, 3, 10, shared_prefix=shared)
        contribution, effect = naive_attribution(model, pairs, resolve("nll", pairs), kinds)
        for own in (engine, Engine(model, "cpp", memory_budget=1)):
            found = own.attribute(pairs, "nll", nodes=kinds, progress=False)
            for ours, table in ((found.contribution, contribution), (found.effect, effect)):
                for kind, right in table.items():
                    assert (ours[kind] - right).abs().max() <= LIMIT * right.abs().max()
        nodes = [node for node in found.space if node.position in (6, 8)][::5]
        exact = engine.patch(pairs, nodes, "nll", progress=False).effect
        right, _ = naive_effects(model, pairs, [[node] for node in nodes], resolve("nll", pairs))
        assert (exact - right).abs().max() <= LIMIT * right.abs().max()


def test_positions_counted_from_0() -> None:
    """Queries are scaled by where they stand in what the layer is given: a prefix is not run alone."""
    model = tiny_models.build("llama4_text", floor_scale=8192)  # 8 tokens do not show it
    with served_models._Wide():
        assert not Engine(model, "reference").plug.moves
