"""The exact key and query fix: brute force, saturated rows, and the literal formula that fails on them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import op_cases
from atp_fast import ops
from atp_fast.ops import reference

BACKENDS = ["reference", "cpp"]


def literal_key_effects(x: op_cases.Inputs) -> Tensor:
    """(a' - a)/(1 - a) (r - D) as it stands on paper, a' from the sum of the other exponentials."""
    s = reference.logits(x.q, x.k, x.scoring)
    moved = reference.logits(x.q, x.k_corrupted, x.scoring)
    a, z = s.softmax(-1), s.softmax(-1) @ x.v
    total = s.exp().sum(-1, keepdim=True)
    moved_a = moved.exp() / (total - s.exp() + moved.exp())
    r, mean = x.grad_z @ x.v.transpose(-1, -2), (x.grad_z * z).sum(-1, keepdim=True)
    return ((moved_a - a) / (1 - a) * (r - mean)).sum(-2).transpose(-1, -2)


def brute_force(x: op_cases.Inputs) -> Tensor:
    """g . (z with key j replaced - z), one softmax per key."""
    sink, values = reference.sink_logits(x.q, x.scoring), reference.grouped(x.v, x.q.shape[1])
    s = reference.logits(x.q, x.k, x.scoring)
    moved = reference.logits(x.q, x.k_corrupted, x.scoring)
    z = reference.softmax_and_logsumexp(s, sink)[0] @ values
    effects = []
    for j in range(x.k.shape[2]):
        patched = torch.cat([s[..., :j], moved[..., j : j + 1], s[..., j + 1 :]], -1)
        change = reference.softmax_and_logsumexp(patched, sink)[0] @ values - z
        effects.append((x.grad_z * change).sum((-1, -2)))
    return reference.ungrouped(torch.stack(effects, -1), x.k.shape[1], 2).transpose(-1, -2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["T31", "gqa", "everything", "masked-sinks", "window5", "spread20"]
)
def test_brute_force(backend: str, name: str) -> None:
    case = next(case for case in op_cases.CASES if case.name == name)
    x = op_cases.make_inputs(case, torch.float64)
    got = op_cases.run("key_patch_effects", x, backend)["effect_k"]
    torch.testing.assert_close(got, brute_force(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [1.0, 6.0, 20.0, 60.0])
def test_saturated_rows(backend: str, spread: float) -> None:
    """In float32 the literal formula is far off from spread 6 on, or NaN; ours keeps its bound."""
    case = op_cases.Case(
        "saturated", queries=128, keys=128, head_dim=64, spread=spread, shift=spread, cotangents=2
    )
    x = op_cases.make_inputs(case, torch.float32)
    got = op_cases.run("key_patch_effects", x, backend)["effect_k"].double()
    truth = op_cases.run("key_patch_effects", x.to(torch.float64), "reference")["effect_k"]
    top_key = op_cases.run("attention", x, backend)["stats.top_key"]
    bound = (
        op_cases.FEW * torch.finfo(torch.float32).eps * op_cases.magnitudes(x, top_key)["effect_k"]
    )
    assert ((got - truth).abs() <= bound).all()
    assert (got - truth).norm() <= 3e-6 * max(spread, 1) * truth.norm()
    literal = literal_key_effects(x).double()
    if spread >= 6:
        assert not ((literal - truth).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_where_the_literal_form_fails(backend: str) -> None:
    """Logits [0, -20, -25], key 0 moved by -40, r = [1, -1, 0.5]: the effect is -1.98996."""

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[None, None, :, None]

    q, g = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    k, moved, v = column(0, -20, -25), column(-40, -20, -25), column(1, -1, 0.5)
    got = ops.key_patch_effects(q, k, v, k_corrupted=moved, grad_z=g, scale=1.0, backend=backend)
    assert got[0, 0, :, 0].tolist() == [pytest.approx(-1.98996, abs=1e-5), 0, 0]
    literal = literal_key_effects(
        op_cases.Inputs(
            q,
            k,
            v,
            q,
            moved,
            g,
            dict(scale=1.0, causal=True, window=None, softcap=None, sinks=None, key_mask=None),
        )
    )
    assert not abs(literal[0, 0, 0, 0] + 1.98996) < 1  # NaN: a rounds to 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", op_cases.DTYPES)
@pytest.mark.parametrize("name", ["T67", "gqa", "everything", "spread60"])
def test_identical_prompts_have_no_effect(backend: str, dtype: str, name: str) -> None:
    case = next(case for case in op_cases.CASES if case.name == name)
    x = op_cases.make_inputs(case, op_cases.DTYPES[dtype])
    x = x._replace(q_corrupted=x.q.clone(), k_corrupted=x.k.clone())
    effects = op_cases.run("attention_vjp_effects", x, backend)
    assert (effects["effect_q"] == 0).all()
    assert (effects["effect_k"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lone_key_has_no_effect(backend: str) -> None:
    x = op_cases.make_inputs(op_cases.Case("lone", queries=1, keys=1), torch.float32)
    assert (op_cases.run("key_patch_effects", x, backend)["effect_k"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_key_has_no_effect(backend: str) -> None:
    x = op_cases.make_inputs(op_cases.Case("hidden", key_mask="padding"), torch.float32)
    effect = op_cases.run("key_patch_effects", x, backend)["effect_k"]
    assert (effect[:, 0, -5:] == 0).all()
    assert (effect[:, 0, :-5] != 0).all()


def test_without_the_extension_everything_else_works() -> None:
    """A process that has no atp_fast._C imports the ops, falls back on auto and says what is missing."""
    program = """
import sys
sys.modules["atp_fast._C"] = None
import torch
from atp_fast import ops
x = torch.ones(1, 1, 2, 4)
assert ops.backend_for(x) == "reference"
ops.attention(x, x, x)
assert "_C" in ops.availability()["cpp"]
for _ in range(2):
    try:
        ops.attention(x, x, x, backend="cpp")
    except ImportError as error:
        assert "backend 'cpp' is not available" in str(error) and "_C" in str(error), error
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
