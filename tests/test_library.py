"""The ops as torch operators: schemas, fake rules, and a compiled graph that holds them."""

from __future__ import annotations

import pytest
import torch

import op_cases
from atp_fast import ops
from atp_fast.ops import library
from atp_fast.ops.reference import AttentionStats

CASE = op_cases.Case(
    "library", batch=2, heads=4, kv_heads=2, queries=7, keys=9, value_dim=12, sinks=True
)


def arguments(
    op: str, backend: str, dtype: torch.dtype
) -> tuple[tuple[object, ...], dict[str, object]]:
    if op == "node_effects":
        rng = torch.Generator().manual_seed(0)
        delta, grad = (torch.randn(s, generator=rng).to(dtype) for s in ((3, 5, 8), (2, 3, 5, 8)))
        return (delta, grad), {"weights": torch.ones(2), "backend": backend}
    x = op_cases.make_inputs(CASE, dtype)
    stats = ops.attention(x.q, x.k, x.v, backend=backend, **x.options)[1]
    own: dict[str, tuple[torch.Tensor, ...]] = {
        "attention": (),
        "attention_vjp": (*stats, x.grad_z),
        "query_patch_effects": (x.q_corrupted, x.grad_z),
        "key_patch_effects": (x.k_corrupted, x.grad_z, *stats),
        "attention_vjp_effects": (x.q_corrupted, x.k_corrupted, *stats, x.grad_z),
    }
    return (x.q, x.k, x.v, *own[op]), {**x.options, "backend": backend}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "op", [*(o for o in op_cases.OPS if o != "attention_alone"), "node_effects"]
)
def test_opcheck(op: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args, kwargs = arguments(op, backend, dtype)
        torch.library.opcheck(getattr(torch.ops.atp_fast, op).default, args, kwargs)


def test_signed_node_effects() -> None:
    (delta, grad), _ = arguments("node_effects", "auto", torch.float32)
    torch.library.opcheck(torch.ops.atp_fast.node_effects.default, (delta, grad), {})


def test_one_compiled_graph() -> None:
    """fullgraph: no op breaks the graph; its results are those of the plain functions."""

    def everything(namespace: object, x: op_cases.Inputs) -> list[torch.Tensor]:
        z, stats = namespace.attention(x.q, x.k, x.v, **x.options)
        common = {"stats": stats, "grad_z": x.grad_z, **x.options}
        grads = namespace.attention_vjp(x.q, x.k, x.v, **common)
        key = namespace.key_patch_effects(x.q, x.k, x.v, k_corrupted=x.k_corrupted, **common)
        query = namespace.query_patch_effects(
            x.q, x.k, x.v, q_corrupted=x.q_corrupted, grad_z=x.grad_z, **x.options
        )
        both = namespace.attention_vjp_effects(
            x.q, x.k, x.v, q_corrupted=x.q_corrupted, k_corrupted=x.k_corrupted, **common
        )
        return [
            z,
            *AttentionStats(*stats),
            *grads,
            key,
            query,
            *both,
            namespace.node_effects(z, x.grad_z),
        ]

    x = op_cases.make_inputs(CASE, torch.float32)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(library, x), everything(ops, x), strict=True):
        assert torch.equal(got, want)


def test_errors_are_those_of_the_functions() -> None:
    x = torch.ones(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"k must have shape \(1, 1, 3, 4\), got \(1, 1, 3, 5\)"):
        library.attention(x, torch.ones(1, 1, 3, 5), x)
