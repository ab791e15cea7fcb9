"""bfloat16: cotangents taken in it (precision="bf16"), models that are in it, and how products are switched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import zoo
from atp_fast import Attribution, Engine, PromptPairs, tasks
from atp_fast.attribution.adjoint import Adjoint
from atp_fast.attribution.precision import NarrowCotangents
from atp_fast.attribution.question import METHODS
from atp_fast.nodes import KINDS

TRAINED = ["tiny_gpt2_3L", "tiny_llama_2L"]
# What the Engine's docstring states; measured: 0.019, and 0.012 for trained weights in bfloat16.
NARROW_ERROR = 0.03
MODEL_ERROR = 0.02
# Random weights in bfloat16, by the norm of all contributions together; measured: 0.066, where rounding turns ReLUs on
# and off, and 0.053, where it changes experts; 0.028 elsewhere.
RANDOM_MODEL_ERROR = 0.1


def trained(name: str, task: str) -> tuple[PreTrainedModel, PromptPairs]:
    path = Path(__file__).parent / "data" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, tasks.load_task(task, AutoTokenizer.from_pretrained(path), n_pairs=6)


def all_contributions(found: Attribution) -> Tensor:
    return torch.cat([x.flatten() for x in found.contribution.values()])


def assert_same_ranking(one: Attribution, other: Attribution, best: int, rho: float) -> None:
    """At least so many of the 20 best nodes in common, and this rank correlation of all that are not exactly 0."""
    tops = [{tuple(node) for node in found.top(20)} for found in (one, other)]
    assert len(tops[0] & tops[1]) >= best
    a, b = all_contributions(one), all_contributions(other)
    assert spearmanr(a[a > 0], b[a > 0]).statistic >= rho


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_narrow_cotangents(family: str) -> None:
    """The metric's values stay the same bits, with tapes kept and without; effects are within the stated error."""
    model = zoo.build(family, dtype=torch.float32)
    pairs = zoo.random_pairs(model, 3, 8, ragged=True, shared_prefix=1)
    options: dict[str, Any] = {"nodes": KINDS, "progress": False}
    exact = Engine(model).attribute(pairs, **options)
    for budget in (1, "8GiB"):
        plain = Engine(model, memory_budget=budget).attribute(pairs, **options)
        found = Engine(model, precision="bf16", memory_budget=budget).attribute(pairs, **options)
        assert torch.equal(found.clean_value, plain.clean_value)
        assert torch.equal(found.corrupted_value, plain.corrupted_value)
        for kind in exact.effect:
            assert found.effect[kind].dtype == torch.float32
            for a, b in (
                (exact.effect[kind], found.effect[kind]),
                (exact.contribution[kind], found.contribution[kind]),
            ):
                error = float((a - b).abs().max() / a.abs().max())
                assert 0 < error <= NARROW_ERROR, (kind, error)


@pytest.mark.parametrize("task", ["induction", "ioi"])
@pytest.mark.parametrize("name", TRAINED)
def test_narrow_cotangents_keep_the_ranking(name: str, task: str) -> None:
    model, pairs = trained(name, task)
    for metric in ("logit_diff", "nll"):
        exact = Engine(model).attribute(pairs, metric, nodes=KINDS, progress=False)
        found = Engine(model, precision="bf16").attribute(
            pairs, metric, nodes=KINDS, progress=False
        )
        assert torch.equal(exact.clean_value, found.clean_value)
        assert torch.equal(exact.corrupted_value, found.corrupted_value)
        assert_same_ranking(exact, found, 20, 0.999)
        for kind in KINDS:
            error = (exact.effect[kind] - found.effect[kind]).abs().max()
            assert error <= NARROW_ERROR * exact.effect[kind].abs().max(), kind


def in_bfloat16(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model in bfloat16, and a float32 one of the same rounded weights."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    return narrow, copy.deepcopy(narrow).float()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_bfloat16_model(family: str) -> None:
    narrow, wide = in_bfloat16(zoo.build(family, dtype=torch.float32))
    pairs = zoo.random_pairs(narrow, 3, 8, ragged=True, shared_prefix=1)
    exact, found = (
        Engine(model).attribute(pairs, nodes=KINDS, progress=False) for model in (wide, narrow)
    )
    a, b = all_contributions(exact), all_contributions(found)
    assert b.dtype == torch.float32
    assert float((a - b).norm() / a.norm()) <= RANDOM_MODEL_ERROR


@pytest.mark.parametrize("task", ["induction", "ioi"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_bfloat16_model(name: str, task: str) -> None:
    """Errors by the largest effect of all: a kind whose own effects are tiny has noise of the others' size.

    Its own precision already is bfloat16: asking for it changes no bit.
    """
    model, pairs = trained(name, task)
    narrow, wide = in_bfloat16(model)
    exact, found, same = (
        engine.attribute(pairs, nodes=KINDS, progress=False)
        for engine in (Engine(wide), Engine(narrow), Engine(narrow, precision="bf16"))
    )
    assert_same_ranking(exact, found, 18, 0.9)
    largest = max(float(x.abs().max()) for x in exact.effect.values())
    for kind in KINDS:
        error = float((exact.effect[kind] - found.effect[kind]).abs().max())
        assert error <= MODEL_ERROR * largest, kind
        assert torch.equal(found.effect[kind], same.effect[kind])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_identical_prompts_give_exact_zeros(family: str, dtype: torch.dtype, method: str) -> None:
    model = zoo.build(family, dtype=dtype)
    pairs = zoo.random_pairs(model, 2, 6)
    corrupted = torch.stack([pairs.clean_ids[0], pairs.corrupted_ids[1]])
    with pytest.warns(UserWarning, match="identical"):
        pairs = PromptPairs(pairs.clean_ids, corrupted, pairs.answer_ids, pairs.wrong_answer_ids)
        found = Engine(model, precision="bf16").attribute(
            pairs, method=method, nodes=KINDS, per_pair=True, progress=False
        )
    assert found.per_pair is not None
    for kind, scores in found.per_pair.items():
        assert not scores[0].any(), kind
        assert scores[1].any(), kind


@pytest.mark.parametrize("given", ["fp16", "bfloat16", 16, torch.bfloat16])
def test_an_unknown_precision_is_named(given: Any) -> None:
    with pytest.raises(ValueError, match="precision must be None or 'bf16', got "):
        Engine(zoo.build("gpt2"), precision=given)


# ---- what is recorded


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


X, WEIGHT, BIAS, GRAD = tensors((2, 3, 32), (16, 32), (16,), (2, 3, 16))


def recorded(call: Any) -> tuple[Tensor, Tensor]:
    """The output and the input's gradient of a call recorded by NarrowCotangents."""
    x = X.clone().requires_grad_()
    with NarrowCotangents():
        out = call(x)
    return out.detach(), torch.autograd.grad(out, x, GRAD)[0]


def rounded_gradient(weight: Tensor) -> Tensor:
    """GRAD @ weight, both rounded to bfloat16, and the product too."""
    wide = GRAD.bfloat16().double() @ weight.bfloat16().double()
    return wide.float()


LINEAR_CALLS: dict[str, Any] = {
    "positional": lambda x: F.linear(x, WEIGHT, BIAS),
    "without bias": lambda x: F.linear(x, WEIGHT),
    "bias None": lambda x: F.linear(x, WEIGHT, None),
    "keyword bias": lambda x: F.linear(x, WEIGHT, bias=BIAS),
    "keyword weight": lambda x: F.linear(x, weight=WEIGHT, bias=BIAS),
    "keywords swapped": lambda x: F.linear(x, bias=BIAS, weight=WEIGHT),
    "all keywords": lambda x: F.linear(weight=WEIGHT, bias=None, input=x),
    "Conv1D": lambda x: conv1d()(x),
    "addmm": lambda x: torch.addmm(BIAS, x.view(6, 32), WEIGHT.T).view(2, 3, 16),
}


def conv1d() -> Conv1D:
    module = Conv1D(16, 32)
    module.weight, module.bias = (
        torch.nn.Parameter(WEIGHT.T.clone(), False),
        torch.nn.Parameter(BIAS, False),
    )
    return module


@pytest.mark.parametrize("case", LINEAR_CALLS)
def test_linear_maps_are_recorded_however_they_are_called(case: str) -> None:
    call = LINEAR_CALLS[case]
    out, grad = recorded(call)
    assert torch.equal(out, call(X))
    exact = GRAD.double() @ WEIGHT.double()
    assert float((grad - rounded_gradient(WEIGHT)).abs().max()) <= 2**-8 * float(exact.abs().max())
    assert not torch.allclose(grad.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.linear(x, WEIGHT.clone().requires_grad_(), BIAS),
        lambda x: torch.addmm(BIAS, x.view(6, 32), WEIGHT.T.clone().requires_grad_()).view(
            2, 3, 16
        ),
        lambda x: torch.addmm(BIAS, x.view(6, 32), WEIGHT.T, beta=1).view(2, 3, 16),
        lambda x: x @ WEIGHT.T,
    ],
    ids=["trained weight", "trained addmm", "scaled addmm", "matmul"],
)
def test_other_products_stay_as_they_are(call: Any) -> None:
    out, grad = recorded(call)
    assert torch.equal(out, call(X))
    assert torch.allclose(grad, GRAD @ WEIGHT, rtol=1e-5, atol=1e-5)


def test_a_trained_weight_gets_its_gradient() -> None:
    weight = WEIGHT.clone().requires_grad_()
    with NarrowCotangents():
        out = F.linear(X, weight)
    assert torch.allclose(
        torch.autograd.grad(out, weight, GRAD)[0], GRAD.view(6, 16).T @ X.view(6, 32), atol=1e-4
    )


def test_many_cotangents_at_once_are_the_same_as_one_by_one() -> None:
    x = X.clone().requires_grad_()
    with NarrowCotangents():
        out = F.linear(x, WEIGHT, BIAS)
    grads = torch.stack([GRAD, 2 * GRAD, -GRAD])

    def grad(g: Tensor) -> Tensor:
        return torch.autograd.grad(out, x, g, retain_graph=True)[0]

    (together,) = Adjoint([out], [x])([grads])
    assert torch.equal(together, torch.stack([grad(g) for g in grads]))
