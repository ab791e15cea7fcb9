"""What a model's own code may do to its attention scores, and what is refused: hf/scores.py, one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_models
from atp_fast import ops
from atp_fast.hf import Plug
from atp_fast.hf.attention import LayerRun
from atp_fast.hf.modules import node_places
from atp_fast.hf.scores import taken_over

B, H, T, D = 2, 3, 7, 4
LOWEST = torch.finfo(torch.float64).min
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
WINDOW = CAUSAL & ~CAUSAL.tril(-3)
SLOPES = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
ALIBI = SLOPES[:, None, None] * torch.arange(T)  # (heads, 1, keys)


def qkv(heads: int = H, kv: int = H) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, heads, T, D), (B, kv, T, D), (B, kv, T, D))
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return q, k, v


def mask(allowed: Tensor) -> Tensor:
    return torch.zeros(T, T, dtype=torch.float64).masked_fill(~allowed, LOWEST)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D) + mask(CAUSAL)
    return torch.matmul(F.dropout(F.softmax(s, dim=-1), 0.5, training=False), v)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.3
    s = s.masked_fill(~CAUSAL[None, None], LOWEST)
    return s.float().double().softmax(-1).type_as(v) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s /= 2.0
    s.masked_fill_(~WINDOW, LOWEST)
    return s.softmax(-1) @ v


def two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt_neo's: a window by where, then the model's causal mask."""
    s = torch.where(WINDOW, torch.matmul(q, k.mT), torch.tensor(LOWEST, dtype=q.dtype))
    return torch.matmul(F.softmax(s + mask(CAUSAL), dim=-1), v)


def multiplied_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """openai-gpt's: zero where a key is kept out, then -1e4 there."""
    b = CAUSAL.to(q.dtype)
    return ((q @ k.mT) * b + -1e4 * (1 - b)).softmax(-1) @ v


def masked_before_scaling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q @ k.mT) + mask(CAUSAL)) / 3).softmax(-1) @ v


def heads_and_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xglm's: rows and heads are one axis, and back."""
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    s = torch.bmm(q, k.transpose(1, 2)).view(B, H, T, T) + mask(CAUSAL).expand(B, 1, T, T)
    s = torch.max(s, torch.tensor(LOWEST, dtype=q.dtype)).view(B * H, T, T)
    p = F.softmax(s, dim=-1).view(B, H, T, T).view(B * H, T, T)
    return torch.bmm(p, v).view(B, H, T, D)


def alibi_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bloom's: baddbmm on a bias of rows and heads, which may be of more rows than run."""
    bias = ALIBI.repeat(2 * B, 1, 1)
    q, k, w = (x.reshape(B * H, T, D) for x in (q, k, v))
    if type(q @ k.mT) is Tensor:  # outside, rows must fit
        bias = bias[: B * H]
    s = bias.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=0.5, alpha=0.7)
    s = s.view(B, H, T, T) + mask(CAUSAL)
    return torch.bmm(s.softmax(-1).view(B * H, T, T), w).view(B, H, T, D)


def alibi_in_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = ALIBI.expand(H, T, T).masked_fill(~CAUSAL, LOWEST)
    return ((q @ k.mT) * 0.5 + bias[None]).softmax(-1) @ v


def alibi_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """falcon's: the bias is added before the scale."""
    return (((q @ k.mT) + ALIBI) * 0.5 + mask(CAUSAL)).softmax(-1) @ v


WRITTEN = (plain, filled, in_place, two_masks, multiplied_mask, masked_before_scaling)
WRITTEN += (heads_and_rows, alibi_first, alibi_in_the_mask, alibi_scaled)


def run_of(
    write: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
) -> tuple[LayerRun, Tensor]:
    run = LayerRun("reference")
    with taken_over(run, B):
        z = write(q, k, v)
    return run, z


@pytest.mark.parametrize("write", WRITTEN)
def test_attention_as_it_is_written(write: Callable[..., Tensor]) -> None:
    """z is what the code computes by itself, through one call of our attention and no matrix of scores."""
    q, k, v = qkv()
    run, z = run_of(write, q, k, v)
    assert run.calls == 1
    assert run.options is not None
    assert run.options.window == (3 if write in (in_place, two_masks) else None)
    wanted = write(q, k, v)
    assert wanted.shape == z.shape
    assert (z - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # `filled` goes through float32


def test_one_key_head_for_all_queries() -> None:
    q, k, v = qkv(kv=1)
    run, z = run_of(plain, q, k, v)
    assert run.k is not None and run.k.shape[1] == 1
    assert (z - plain(q, k, v)).abs().max() <= 1e-12


def test_the_bias_is_one_more_dimension() -> None:
    """Queries and keys keep their own numbers ahead of it, so that effects of patching them are theirs."""
    q, k, v = qkv()
    run, _ = run_of(alibi_scaled, q, k, v)
    assert run.q is not None and run.k is not None
    assert torch.equal(run.q[..., :D], q) and torch.equal(run.k[..., :D], k)
    assert run.q.shape[-1] == D + 1
    z, _ = ops.attention(run.q, run.k, v, scale=0.5, backend="reference")
    assert (z - alibi_scaled(q, k, v)).abs().max() <= 1e-12


def relative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return ((q @ k.mT) + distance.double().square() + mask(CAUSAL)).softmax(-1) @ v


def tanh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tanh() + mask(CAUSAL)).softmax(-1) @ v


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) + mask(CAUSAL | CAUSAL.mT)).softmax(-1) @ v


def holes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = CAUSAL.clone()
    kept[5, 2] = False
    return ((q @ k.mT) + mask(kept)).softmax(-1) @ v


def per_query_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * torch.arange(1.0, T + 1)[:, None] + mask(CAUSAL)).softmax(-1) @ v


def zeros_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * CAUSAL.double()).softmax(-1) @ v


def negative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * -1.0 + mask(CAUSAL)).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) + mask(CAUSAL)).softmax(-2) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q @ k.mT) + mask(CAUSAL)).softmax(-1) * 0.5) @ v


def filled_with_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~CAUSAL, 0.0).softmax(-1) @ v


def another_bias_per_prompt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(B, dtype=torch.float64)[:, None, None, None] * torch.arange(T)
    return ((q @ k.mT) + bias + mask(CAUSAL)).softmax(-1) @ v


REFUSED: dict[Any, str] = {
    relative: "not one per key",
    tanh: "uses its attention scores in tanh",
    unmasked: "does not mask",
    bidirectional: "no causal mask or causal sliding window",
    holes: "no causal mask or causal sliding window",
    per_query_scale: "multiplies its attention scores by a tensor",
    zeros_left: "a softmax of another kind",
    negative: "multiplies its attention scores by -1",
    over_queries: "a softmax of another kind",
    gated: "changes its attention probabilities",
    filled_with_zero: "replaces attention scores by others",
    another_bias_per_prompt: "another bias to each prompt",
}


@pytest.mark.parametrize("write", REFUSED)
def test_what_is_refused(write: Callable[..., Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=REFUSED[write]):
        run_of(write, *qkv())


def test_a_bias_per_query_head_of_one_key() -> None:
    with pytest.raises(NotImplementedError, match="another bias to each query head of one key"):
        run_of(alibi_scaled, *qkv(kv=1))


def test_other_products_are_left_alone() -> None:
    """Two-dimensional products, and everything outside."""
    x = torch.randn(3, 3)
    with taken_over(LayerRun("reference"), B):
        assert torch.equal(x @ x, torch.mm(x, x))
    q, k, _ = qkv()
    assert type(q @ k.mT) is Tensor


def test_places_in_models_that_write_out_their_softmax() -> None:
    """Projections ahead of a rotation or not, and one fused one, whose heads have no dimension more."""
    found = node_places(Plug(tiny_models.build("gptj"), "reference"))
    for kind in "qkv":
        assert found[kind, 1] == (f"transformer.h.1.attn.{kind}_proj", "output")
    assert found["z", 1] == ("transformer.h.1.attn.out_proj", "input")
    plug = Plug(tiny_models.build("bloom"), "reference")
    assert (plug.inspection.heads, plug.inspection.head_dim) == (4, 8)
    assert node_places(plug)["q", 2] == (
        "transformer.h.2.self_attention.query_key_value",
        "output",
    )
