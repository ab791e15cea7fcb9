"""Normalisation, rotation and their adjoints by every backend, against the reference and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from atp_fast import ops
from atp_fast.hf.attention import LayerRun, running
from atp_fast.hf.norms import find_norms, own_norms
from atp_fast.ops import Norm, reference, triton
from test_add_effects import BACKENDS, DTYPES

DEVICE = "cuda" if torch.cuda.is_available() and not triton.INTERPRETED else "cpu"
HOW = {
    "layer": Norm(1e-5, centred=True),
    "rms": Norm(1e-6),
    "llama": Norm(1e-6, rounded=True),
    "gemma": Norm(1e-6, offset=1.0),
}
SHAPES = [(1, 1), (3, 17), (2, 5, 64), (2, 3, 4, 16), (40, 3, 100), (2, 0, 8), (1, 2, 1030)]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, how: Norm) -> Tensor:
    """What the docstring says, in float64."""
    x = x - x.mean(-1, keepdim=True) if how.centred else x
    y = x / (x.square().mean(-1, keepdim=True) + how.eps).sqrt() * (weight + how.offset)
    return y if bias is None else y + bias


def assert_as_good(got: Tensor, same: Tensor, truth: Tensor) -> None:
    """At most twice the error of the same-dtype reference, and a few eps of the row's largest number."""
    assert got.dtype == same.dtype
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    largest = truth.abs().amax(-1, keepdim=True)
    allowed = 2 * (same.double() - truth).abs().amax(-1, keepdim=True) + 4 * eps * largest
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_norm_and_its_adjoint(
    backend: str, dtype: str, shape: tuple[int, ...], name: str, transposed: bool
) -> None:
    how, kind, width = HOW[name], DTYPES[dtype], shape[-1]
    x = random(*shape, seed=1) * 3 + 1
    weight, bias = random(width, seed=2) + 1, random(width, seed=3)
    grad, before = random(3, *shape, seed=4), random(3, *shape, seed=5)
    if transposed and len(shape) > 2:
        x = x.transpose(-3, -2).contiguous().transpose(-3, -2)
        grad = grad.transpose(-3, -2).contiguous().transpose(-3, -2)
    x, weight, bias, grad, before = (t.to(kind).to(DEVICE) for t in (x, weight, bias, grad, before))
    given = bias if how.centred else None
    wide = x.double().requires_grad_()
    truth = formula(wide, weight.double(), None if given is None else given.double(), how)
    y, mean, rstd = ops.norm(x, weight, given, how=how, backend=backend)
    plain = reference.norm(x, weight, given, how)[0]
    assert_as_good(y, plain, truth.detach())
    if how.rounded and kind.itemsize == 2 and y.numel() > 500:
        # rounded where the model rounds: but for ties, the same bits; rounded once, a fifth are others
        assert (y == plain).double().mean() > 0.97
    slopes = [torch.autograd.grad(truth, wide, g.double(), retain_graph=True)[0] for g in grad]
    for ahead in (None, before):
        got = ops.norm_vjp(
            x, weight, mean=mean, rstd=rstd, grad=grad, how=how, before=ahead, backend=backend
        )
        same = reference.norm_vjp(
            x, weight, *reference.norm(x, weight, given, how)[1:], grad, how, ahead
        )
        wanted = torch.stack(slopes) + (0 if ahead is None else ahead.double())
        scale = grad.double().abs().amax(-1, keepdim=True) * (weight.double().abs().max() + 1)
        scale = scale / x.double().square().mean(-1, keepdim=True).add(how.eps).sqrt()
        eps = torch.finfo(kind if dtype == "f64" else torch.float32).eps
        error = (got.double() - wanted).abs()
        allowed = 2 * (same.double() - wanted).abs().amax(-1, keepdim=True)
        allowed = allowed + 64 * eps * scale + 2 * torch.finfo(kind).eps * wanted.abs()
        assert got.dtype == kind
        assert (error <= allowed).all()


@pytest.mark.parametrize("layout", ["contiguous", "side by side", "sliced"])
@pytest.mark.parametrize("rotated", [4, 12, 16])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_rotation_and_its_adjoint(backend: str, dtype: str, rotated: int, layout: str) -> None:
    kind = DTYPES[dtype]
    x, grad = random(2, 3, 5, 16, seed=1), random(4, 2, 3, 5, 16, seed=2)
    if layout == "side by side":
        x, grad = (t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in (x, grad))
    elif layout == "sliced":
        x, grad = (torch.cat([t, t, t], -1).chunk(3, -1)[1] for t in (x, grad))
    # one angle per element, unlike the models', so that no two are taken for each other
    cos, sin = random(1, 5, rotated, seed=3).expand(2, -1, -1), random(2, 5, rotated, seed=4)
    x, grad, cos, sin = (t.to(kind).to(DEVICE) for t in (x, grad, cos, sin))
    wide = x.double().requires_grad_()
    truth = reference.rotate(wide, cos.double(), sin.double(), adjoint=False)
    got = ops.rotate(x, cos, sin, backend=backend)
    same = reference.rotate(x, cos, sin, adjoint=False)
    assert_as_good(got, same, truth.detach())
    if kind.itemsize == 2:
        assert torch.equal(got, same)  # rounded where the models round
    wanted = [torch.autograd.grad(truth, wide, g.double(), retain_graph=True)[0] for g in grad]
    slopes = ops.rotate(grad, cos, sin, adjoint=True, backend=backend)
    assert_as_good(
        slopes, reference.rotate(grad, cos, sin, adjoint=True), torch.stack(wanted).detach()
    )


def test_bad_input_is_named() -> None:
    x, weight = torch.zeros(2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(3,\)"):
        ops.norm(x, weight[:3], how=HOW["rms"])
    with pytest.raises(ValueError, match="x must have two to four axes"):
        ops.norm(weight, weight, how=HOW["rms"])
    with pytest.raises(ValueError, match="mean must be given where rows are centred only"):
        ops.norm_vjp(x, weight, mean=None, rstd=x[..., 0], grad=x[None], how=HOW["layer"])
    with pytest.raises(ValueError, match="cos must have an even width up to 4, got 3"):
        ops.rotate(x[None], x[:, :, :3], x[:, :, :3])
    with pytest.raises(ValueError, match=r"cos must have shape \(1, 3, 2\), got \(2, 3, 2\)"):
        ops.rotate(x[None], x[:, :, :2], x[:, :, :2])


def test_a_norm_with_a_gate_keeps_its_own_code_where_it_is_given() -> None:
    """As in Mamba's mixers: without the gate it is an RMSNorm, and is recognised as one."""

    class Gated(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            if gate is not None:
                hidden_states = hidden_states * gate.sigmoid()
            return super().forward(hidden_states)

    module = Gated(6).requires_grad_(False)
    module.weight.uniform_(0.5, 2)
    (found,) = find_norms(module)
    x, gate = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    wanted = module(x), module(x, gate), module(x, gate=gate)
    assert not torch.allclose(wanted[0], wanted[1])
    with own_norms([found], "cpp"):
        assert "forward" in vars(module)
        assert torch.equal(module(x), wanted[0])  # no layer runs: its own
        token = running.set(LayerRun())
        torch.testing.assert_close((module(x), module(x, gate), module(x, gate=gate)), wanted)
        running.reset(token)
    assert "forward" not in vars(module)
