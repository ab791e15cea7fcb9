"""The adjoint of gated units by every backend, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from atp_fast import Engine, ops
from atp_fast.ops import reference
from test_add_effects import BACKENDS, DTYPES
from test_norm import DEVICE, SHAPES, random

ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def assert_as_good(got: Tensor, same: Tensor, truth: Tensor, scale: Tensor) -> None:
    """At most twice the error of the same-dtype reference, and a few eps of what the number is a product of."""
    assert got.dtype == same.dtype
    assert got.shape == truth.shape
    eps = torch.finfo(got.dtype).eps
    wide_eps = torch.finfo(torch.float32 if got.itemsize < 8 else torch.float64).eps
    allowed = 2 * (same.double() - truth).abs() + eps * truth.abs() + 16 * wide_eps * scale
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("layout", ["plain", "parts of one", "turned"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gate_vjp(
    backend: str, dtype: str, shape: tuple[int, ...], activation: str, layout: str
) -> None:
    kind = DTYPES[dtype]
    both = random(*shape[:-1], 2 * shape[-1], seed=1) * 4
    both[..., :1] *= 30  # where an exponential has no number any more
    grad = random(3, *shape, seed=2)
    both, grad = (t.to(kind).to(DEVICE) for t in (both, grad))
    gate, up = both.chunk(2, -1)
    if layout == "plain":
        gate, up = gate.contiguous(), up.contiguous()
    elif layout == "turned":
        gate, grad = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (gate, grad))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    y = ACTIVATIONS[activation](wide[0]) * wide[1]
    wanted = [torch.autograd.grad(y, wide, g.double(), retain_graph=True) for g in grad]
    truth = [torch.stack(x) for x in zip(*wanted, strict=True)]
    got = ops.gate_vjp(gate, up, grad, activation=activation, backend=backend)
    same = reference.gate_vjp(gate, up, grad, activation)
    size = grad.double().abs() * (1 + gate.double().abs())
    assert_as_good(got[0], same[0], truth[0], size * up.double().abs())
    assert_as_good(got[1], same[1], truth[1], size)


def test_what_does_not_fit_is_named() -> None:
    x, grad = torch.zeros(2, 3), torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="activation must be among silu, gelu_tanh, got 'relu'"):
        ops.gate_vjp(x, x, grad, activation="relu")
    with pytest.raises(ValueError, match=r"up must have shape \(2, 3\), got \(2, 2\)"):
        ops.gate_vjp(x, x[:, :2], grad)
    with pytest.raises(ValueError, match=r"grad must have shape \(4, 2, 3\), got \(4, 3, 2\)"):
        ops.gate_vjp(x, x, grad.transpose(1, 2))
    with pytest.raises(ValueError, match="grad must be torch.float32 on cpu as gate is"):
        ops.gate_vjp(x, x, grad.double())
    with pytest.raises(ValueError, match="gate must have two to four axes"):
        ops.gate_vjp(x[0], x[0], grad[:, 0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gated_layers_are_recognised(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(zoo.build(family), "cpp")
    pairs = zoo.random_pairs(engine.model, 1, 5)
    engine.attribute(
        pairs, method="atp", progress=False
    )  # the first also measures what layers take
    calls: list[str] = []
    own = ops.gate_vjp

    def noting(*args: Any, activation: str, backend: str) -> Any:
        calls.append(activation)
        assert backend == "cpp"
        return own(*args, activation=activation, backend=backend)

    monkeypatch.setattr(ops, "gate_vjp", noting)
    engine.attribute(pairs, method="atp", progress=False)
    activation = {"llama": "silu", "gemma3": "gelu_tanh"}[family]
    assert calls == [activation] * len(engine.plug.layers)
