"""The walk over autograd's graph against torch.autograd.grad, one cotangent at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from atp_fast import Engine
from atp_fast.attribution import adjoint
from atp_fast.attribution.adjoint import Adjoint
from atp_fast.ops import Norm
from atp_fast.ops.functions import norm, rotate
from atp_fast.ops.linear import linear

W, V, B = (torch.randn(shape, dtype=torch.float64) for shape in ((8, 6), (6, 8), (8,)))
ROWS = torch.randn(3, 1, dtype=torch.float64)
TURNS = torch.polar(torch.ones(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64))
TABLE = torch.randn(1, 3, 4, dtype=torch.float64)


def swap(x: Tensor) -> Tensor:
    return x.view(-1, 3, 2, 3).transpose(1, 2).transpose(-2, -1).reshape(-1, 2, 9)


def heads(x: Tensor) -> Tensor:
    q = rotate(
        F.linear(x, W).view(-1, 3, 2, 4).transpose(1, 2),
        TABLE.expand(len(x), -1, -1),
        TABLE.expand(len(x), -1, -1),
        "cpp",
    )
    return q.transpose(1, 2).reshape(-1, 3, 8)


def split(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, -1)
    return a * 2 + b.exp() * c


def block(x: Tensor) -> Tensor:
    n = norm(x, V[:, 0], V[:, 1], Norm(1e-5, centred=True), "cpp")
    gated = F.silu(F.linear(n, W, B)) * F.linear(n, W)
    return x + F.linear(gated, V) + F.gelu(F.linear(n, W), approximate="tanh") @ V.t()


def alike(x: Tensor) -> Tensor:
    y = x + x
    return y + norm(y, V[:, 0], None, Norm(1e-6), "reference") + y.clone()


def shared(x: Tensor) -> Tensor:
    """One gradient goes two ways, on each of which another is added."""
    a, b = x * 2, x.exp()
    return F.linear(a + b, W) + F.linear(a, W, B) * 3 + F.linear(b, W) * 4


SCALE = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)


def tiles(x: Tensor) -> Tensor:
    flat = x.reshape(-1, 6)
    return torch.cat([part.tanh() for part in flat.split(4)]).view(x.shape)


def chosen(x: Tensor) -> Tensor:
    found, some = x.clone(), x[..., 0] > 0
    found[some] = x[some].tanh()
    return found


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, power, x):
        ctx.save_for_backward(x)
        ctx.power = power
        return x**power

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return None, ctx.power * x ** (ctx.power - 1) * grad


GRAPHS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, W, B),
    "own linear": lambda x: linear(x, W.t().contiguous(), B),
    "addmm": lambda x: torch.addmm(B, x.view(-1, 6), W.t()).view(-1, 3, 8),
    "scaled addmm": lambda x: torch.addmm(B, x.view(-1, 6), W.t(), alpha=2),
    "product of two": lambda x: x @ x.transpose(1, 2),
    "axes": swap,
    "heads": heads,
    "split": split,
    "part of a split": lambda x: x.chunk(3, -1)[1] * 3,
    "broadcast": lambda x: x[:1] + ROWS * x + x.sum(1, keepdim=True),
    "subtraction": lambda x: torch.sub(x, x * x, alpha=3),
    "block": block,
    "sums of one": alike,
    "one gradient two ways": shared,
    "scaled sum": lambda x: torch.add(x, x * x, alpha=3),
    "float32 between": lambda x: (x.float() * 2).double() + x,
    "complex rotation": lambda x: (
        torch.view_as_real(torch.view_as_complex(x.view(-1, 3, 3, 2)) * TURNS).flatten(2) * 2
    ),
    "gate": lambda x: F.silu(F.linear(x, W)) * F.linear(x, W, B),
    "gate behind": lambda x: F.linear(x, W) * F.gelu(F.linear(x, W, B), approximate="tanh"),
    "gate of one": lambda x: F.silu(x) * x + F.silu(x * 2) * F.silu(x + 1),
    "gate used twice": lambda x: (lambda a: a * F.linear(x, W) + a.exp())(F.silu(F.linear(x, W))),
    "wide gate": lambda x: F.silu(x[:, :1]) * x + x * F.silu(ROWS) + F.gelu(x) * x.exp(),
    "activations": lambda x: F.silu(x) + F.gelu(x) + x.relu() + x.tanh() + x.pow(3) + x**2,
    "parts side by side": lambda x: torch.cat([x[..., :2] * 3, x[:, 1:2, :3].expand(-1, 3, 3)], -1),
    "axes moved": lambda x: x.permute(1, 2, 0).exp().permute(2, 0, 1),
    "rows in tiles": tiles,
    "rows one by one": lambda x: torch.stack([row * 1.5 for row in x]),
    "chosen entries": chosen,
    "rows turned": lambda x: F.linear(x.transpose(0, 1), W).transpose(0, 1).relu(),
    "rows among others": lambda x: (
        x.transpose(0, 1).reshape(-1, 6).exp().view(3, -1, 6).transpose(0, 1)
    ),
    "number on the graph": lambda x: F.silu(x) * SCALE,
    "vector on the graph": lambda x: x.exp() * SCALE.view(1, 1, 1),
    "other groups of rows": lambda x: x.reshape(2, -1, 6).exp().view(x.shape),
    "along axes": lambda x: (
        x.softmax(-1).cumsum(1)
        - x.mean(-1, keepdim=True) / torch.where(x > 0, x, 2.0).unsqueeze(1).sum(1)
    ),
    "mean of all": lambda x: x * x.mean(0, keepdim=True) + x.sum(),
    "foreign function": lambda x: Cube.apply(3, x) + torch.softmax(x, -1),
}


# where a row's output is made of other rows
MIXING = ("broadcast", "mean of all")
# where rows stay apart by steps that do not show it
UNKNOWN = (
    *("product of two", "parts side by side", "complex rotation", "foreign function", "axes moved"),
    *("rows in tiles", "rows one by one", "chosen entries", "rows turned", "rows among others"),
    *(
        "number on the graph",
        "vector on the graph",
        "other groups of rows",
    ),
)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_is_autograds(name: str, count: int) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    out = GRAPHS[name](x)
    cotangents = torch.randn(count, *out.shape, dtype=torch.float64)
    before = cotangents.clone()
    wanted = [torch.autograd.grad(out, x, c, retain_graph=True)[0] for c in cotangents]
    walk = Adjoint([out], [x])
    for _ in range(2):  # the graph stays
        (got,) = walk([cotangents])
        torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-6, atol=1e-6)
    ahead = torch.randn_like(got)
    (summed,) = walk([cotangents], [ahead.clone()])
    torch.testing.assert_close(summed, torch.stack(wanted) + ahead, rtol=1e-6, atol=1e-6)
    assert torch.equal(cotangents, before)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_cotangents_of_the_first_rows_alone(name: str, count: int) -> None:
    x = torch.randn(6, 3, 6, dtype=torch.float64, requires_grad=True)
    out = GRAPHS[name](x)
    rows = len(out) // 3
    cotangents = torch.randn(count, rows, *out.shape[1:], dtype=torch.float64)
    before = torch.randn(count, 2, *x.shape[1:], dtype=torch.float64)
    whole = torch.cat([cotangents, cotangents.new_zeros(count, 2 * rows, *out.shape[1:])], 1)
    wanted = torch.stack([torch.autograd.grad(out, x, c, retain_graph=True)[0] for c in whole])
    apart = name not in MIXING
    assert not apart or not wanted[:, 2:].any()
    walk = Adjoint([out], [x], parts=3)
    assert walk.keeps_rows == (apart and name not in UNKNOWN)
    (got,) = walk([cotangents], [before.clone()])
    torch.testing.assert_close(got, wanted[:, :2] + before, rtol=1e-6, atol=1e-6)
    other = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    (zeros,) = Adjoint([out], [other], parts=3)([cotangents])
    assert torch.equal(zeros, cotangents.new_zeros(count, 2, 5))


def test_an_engine_sees_a_walk_that_is_not_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its opening, for every kind of layer, before any number is given."""
    Engine(zoo.build("llama"))
    monkeypatch.setattr(adjoint.ops, "gate_vjp", lambda gate, up, grad, **_: (grad, grad))
    Engine(zoo.build("gpt2"))
    reason = "LlamaForCausalLM is not served: cotangents through layer 0 differ from autograd's by"
    with pytest.raises(NotImplementedError, match=reason):
        Engine(zoo.build("llama"))


def assert_autograds(
    got: list[Tensor], out: Tensor, tensors: list[Tensor], cotangents: Tensor
) -> None:
    """Gradients of each cotangent."""
    for n, c in enumerate(cotangents):
        wanted = torch.autograd.grad(out, tensors, c, retain_graph=True)
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours[n], theirs)


def test_what_lies_between_is_handed_out_whole() -> None:
    """Gradients of a value and of what it is made of, and of what does not matter."""
    x, z, other = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    inner = F.linear(x, W) * 2
    flat = inner.reshape(2, 3, 8)
    out = F.linear(flat, V) + x + z * z
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    got = Adjoint([out], [z, flat, x, other])([cotangents])
    assert_autograds(got[:3], out, [z, flat, x], cotangents)
    assert got[3].shape == (3, 2, 3, 6)
    assert not got[3].any()


def test_an_activation_between_is_handed_out() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    inner = F.silu(x * 2)
    out = inner * x.exp()
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    got = Adjoint([out], [inner, x])([cotangents])
    assert_autograds(got, out, [inner, x], cotangents)


def test_what_was_handed_out_is_not_written_to() -> None:
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    inner = x * 2
    moved = inner + 1
    out = F.linear(moved, W) + F.linear(inner, W) * 3
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    got = Adjoint([out], [moved, x])([cotangents])
    assert_autograds(got, out, [moved, x], cotangents)


def test_several_outputs_at_once() -> None:
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    first, second = F.linear(x, W), x * 3
    given = [torch.randn(2, *y.shape, dtype=torch.float64) for y in (first, second)]
    (got,) = Adjoint([first, second], [x])(given)
    for n in range(2):
        wanted = torch.autograd.grad([first, second], x, [g[n] for g in given], retain_graph=True)
        torch.testing.assert_close(got[n], wanted[0])


def test_no_step_of_a_recognised_layer_is_vmaps(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    out = block(x)
    monkeypatch.setattr(torch.func, "vmap", None)
    Adjoint([out], [x])([torch.randn(4, *out.shape, dtype=torch.float64)])
