"""Every op on random inputs, and calls timed in turns, for whoever times the backends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from atp_fast import ops
from atp_fast.ops.reference import accumulation_dtype

Name = TypeVar("Name")
Found = TypeVar("Found")


class Inputs(NamedTuple):
    """Queries, keys, values and corrupted twins (batch, heads, positions, dim), and cotangents (C, ...)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_corrupted: Tensor
    k_corrupted: Tensor
    grad_z: Tensor


def random_inputs(
    shape: tuple[int, int, int, int],
    cotangents: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kv_heads: int | None = None,
) -> Inputs:
    """Normally distributed, the same for the same shape and device; shape: (batch, heads, positions, head_dim).

    kv_heads: of keys and values, as many as queries have when None.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    grouped = (shape[0], kv_heads or shape[1], *shape[2:])
    q, k, v, q_corrupted, k_corrupted = (
        random(*size) for size in (shape, grouped, grouped, shape, grouped)
    )
    return Inputs(q, k, v, q_corrupted, k_corrupted, random(cotangents, *shape))


def calls_of(x: Inputs) -> dict[str, Callable[..., Any]]:
    """Each op on these inputs; what is left to give is its backend."""
    stats = ops.attention(x.q, x.k, x.v)[1]
    weights = torch.ones(len(x.grad_z), device=x.q.device)
    moved: dict[str, Any] = {"q_corrupted": x.q_corrupted, "grad_z": x.grad_z}
    vjp: dict[str, Any] = {"stats": stats, "grad_z": x.grad_z}
    qkv = (x.q, x.k, x.v)
    # values as the sweep has them, heads behind positions
    clean, corrupted = x.q.transpose(1, 2), x.q_corrupted.transpose(1, 2)
    wide = accumulation_dtype(x.q)
    score = torch.zeros(clean.shape[1:3], dtype=wide, device=x.q.device)
    how = ops.Norm(1e-6)
    weight = torch.ones(x.q.shape[-1], dtype=x.q.dtype, device=x.q.device)
    rstd = ops.norm(x.q, weight, how=how)[2]
    even = x.q.shape[-1] // 2 * 2
    cos, sin = (x.q[:, 0, :, :even], x.q_corrupted[:, 0, :, :even])
    return {
        "attention": partial(ops.attention, *qkv),
        "attention_vjp": partial(ops.attention_vjp, *qkv, **vjp),
        "query_patch_effects": partial(ops.query_patch_effects, *qkv, **moved),
        "key_patch_effects": partial(ops.key_patch_effects, *qkv, k_corrupted=x.k_corrupted, **vjp),
        "attention_vjp_effects": partial(
            ops.attention_vjp_effects, *qkv, k_corrupted=x.k_corrupted, **moved, stats=stats
        ),
        "node_effects": partial(ops.node_effects, x.q, x.grad_z, weights=weights),
        "add_effects": partial(
            ops.add_effects,
            x.grad_z.transpose(2, 3),
            weights=weights.to(wide),
            score=score,
            clean=clean,
            corrupted=corrupted,
        ),
        "norm": partial(ops.norm, x.q, weight, how=how),
        "norm_vjp": partial(
            ops.norm_vjp, x.q, weight, mean=None, rstd=rstd, grad=x.grad_z, how=how
        ),
        "rotate": partial(ops.rotate, x.q, cos, sin),
        "gate_vjp": partial(ops.gate_vjp, x.q, x.q_corrupted, x.grad_z),
    }


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of a call, its work on the GPU included."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int,
    measure: Callable[[Callable[[], object]], Found],
    *,
    warmup: int = 1,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[Name, list[Found]]:
    """Measure every call once per round, so that a slow spell of the machine falls on all of them.

    warmup: rounds that are not counted; around: a context that each round runs in.
    """
    found: dict[Name, list[Found]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        with around():
            for name, call in calls.items():
                result = measure(call)
                if number >= warmup:
                    found[name].append(result)
    return found
