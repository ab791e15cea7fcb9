"""Metrics: values worked out by hand, what each callable is given, and what a wrong one is told."""

from __future__ import annotations

import math

import pytest
import torch

from atp_fast import Metric, PromptPairs
from atp_fast.metrics import METRICS, resolve

ANSWERS, WRONG = torch.tensor([0, 2]), torch.tensor([1, 0])
# softmax of these logs is (1/2, 1/4, 1/4) and (1/8, 3/4, 1/8)
LOGITS = torch.tensor([[[2.0, 1.0, 1.0]], [[1.0, 6.0, 1.0]]]).log()


@pytest.fixture
def pairs():
    clean = torch.tensor([[3, 1, 2, 0], [0, 3, 2, 1]])
    corrupted = torch.tensor([[3, 2, 2, 0], [0, 3, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    return PromptPairs(clean, corrupted, ANSWERS, WRONG, attention_mask=mask)


@pytest.fixture
def without_wrong(pairs):
    return PromptPairs(
        pairs.clean_ids, pairs.corrupted_ids, ANSWERS, attention_mask=pairs.attention_mask
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("nll", [math.log(2), math.log(8)]),
        ("logit_diff", [math.log(2), 0.0]),
        ("prob_diff", [0.25, 0.0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_named_metrics_by_hand(pairs, name, values, dtype):
    metric = resolve(name, pairs)
    assert (metric.name, metric.positions, metric.needs_source_logits) == (name, "last", False)
    found = metric(LOGITS.to(dtype), pairs)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = 1e-6 if dtype != torch.bfloat16 else 2**-7
    torch.testing.assert_close(
        found.double(), torch.tensor(values).double(), rtol=close, atol=close
    )


def test_named_metrics_are_invariant_to_a_shift_and_have_gradients(pairs):
    for name in ("nll", "logit_diff", "prob_diff"):
        logits = LOGITS.double().requires_grad_()
        values = resolve(name, pairs)(logits, pairs)
        shifted = resolve(name, pairs)(logits + 5, pairs)
        torch.testing.assert_close(values, shifted)
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert gradient[0].abs().sum() > 0
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, 1).double())


def test_kl_is_from_the_source_by_hand_and_has_a_gradient(pairs):
    metric = resolve("kl", pairs)
    assert metric.needs_source_logits
    logits = LOGITS.double().requires_grad_()
    source = LOGITS.flip(0).double()
    # KL((1/8, 3/4, 1/8) || (1/2, 1/4, 1/4)), and the other way round
    first = math.log(1 / 4) / 8 + 3 / 4 * math.log(3) + math.log(1 / 2) / 8
    second = math.log(4) / 2 + math.log(1 / 3) / 4 + math.log(2) / 4
    values = metric(logits, pairs, source)
    torch.testing.assert_close(values, torch.tensor([first, second]).double(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(gradient, LOGITS.double().softmax(-1) - source.softmax(-1))
    assert metric(source, pairs, source).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="metric 'kl' needs source_logits, got None"):
        metric(logits, pairs)


def test_kl_with_impossible_tokens_is_finite(pairs):
    masked = LOGITS.clone()
    masked[:, :, 2] = -torch.inf
    logits = masked.requires_grad_()
    values = resolve("kl", pairs)(logits, pairs, masked.detach())
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["logit_diff", "prob_diff"])
def test_differences_need_wrong_answers(without_wrong, name):
    with pytest.raises(ValueError, match=f"metric '{name}' needs wrong_answer_ids"):
        resolve(name, without_wrong)


def test_unknown_names_and_things_that_are_no_metric(pairs):
    with pytest.raises(
        ValueError, match="metric must be among nll, logit_diff, prob_diff, kl, or a"
    ):
        resolve("accuracy", pairs)
    with pytest.raises(TypeError, match="metric must be a name or a callable, got int"):
        resolve(3, pairs)  # type: ignore[arg-type]
    assert METRICS == ("nll", "logit_diff", "prob_diff", "kl")


def test_an_answer_outside_the_vocabulary_is_named(pairs):
    with pytest.raises(ValueError, match="below the model's vocabulary size 2, got 2"):
        resolve("nll", pairs)(LOGITS[:, :, :2], pairs)


def test_a_plain_callable_sees_all_positions_of_all_pairs(pairs):
    metric = resolve(lambda logits: logits[:, 1, 0], pairs)
    assert (metric.positions, metric.all_pairs_at_once) == ("all", True)
    logits = torch.arange(24.0).reshape(2, 4, 3)
    assert metric(logits, pairs).tolist() == [3.0, 15.0]
    with pytest.raises(
        ValueError, match=r"logits must have shape \(2, 4, vocab\), got \(2, 1, 3\)"
    ):
        metric(LOGITS, pairs)


def test_a_callable_can_ask_for_the_last_position_only(pairs):
    def answer_logit(logits, batch):
        return logits[torch.arange(len(batch)), 0, batch.answer_ids]

    answer_logit.positions = "last"
    metric = resolve(answer_logit, pairs)
    assert (metric.name, metric.positions) == ("answer_logit", "last")
    assert not metric.all_pairs_at_once
    assert metric(LOGITS, pairs).tolist() == LOGITS[[0, 1], 0, [0, 2]].tolist()
    assert metric(LOGITS[1:], pairs[1]).tolist() == LOGITS[1, 0, [2]].tolist()


@pytest.mark.parametrize("positions", ["all", "last"])
def test_eap_igs_metric_gets_what_eap_ig_gives_it(pairs, positions):
    seen = {}

    def metric(logits, clean_logits, input_length, labels, mean=True, loss=False):
        seen.update(mean=mean, loss=loss, labels=labels, clean=clean_logits)
        last = logits[torch.arange(len(logits)), input_length - 1]
        difference = last.gather(-1, labels)
        result = difference[:, 0] - difference[:, 1]
        return result.mean() if mean else result

    metric.positions = positions
    resolved = resolve(metric, pairs)
    assert resolved.needs_source_logits and resolved.positions == positions
    logits = LOGITS
    if positions == "all":
        logits = torch.full((2, 4, 3), float("nan"))
        logits[0, 2], logits[1, 3] = LOGITS[0, 0], LOGITS[1, 0]
    values = resolved(logits, pairs, torch.zeros_like(logits))
    torch.testing.assert_close(values, resolve("logit_diff", pairs)(LOGITS, pairs))
    assert seen["mean"] is False and seen["loss"] is False
    assert seen["labels"].tolist() == [[0, 1], [2, 0]]
    assert not seen["clean"].any()


def test_eap_ig_labels_without_wrong_answers_are_the_answers(without_wrong):
    metric = resolve(lambda logits, clean, length, labels: labels.float(), without_wrong)
    logits = torch.zeros(2, 4, 3)
    assert metric(logits, without_wrong, logits).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda: 0, r"got \(\)"),
        (lambda a, b, c: 0, r"got \(a, b, c\)"),
        (lambda a, *, scale: 0, r"got \(a, scale\)"),
    ],
)
def test_other_signatures_are_refused(pairs, function, got):
    with pytest.raises(ValueError, match=r"must take \(logits\), \(logits, pairs\) or .*" + got):
        resolve(function, pairs)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: x.mean(), ValueError, r"metric must return shape \(2,\), got \(\)"),
        (lambda x: x[:, 0], ValueError, r"metric must return shape \(2,\), got \(2, 3\)"),
        (lambda x: x[:1, 0, 0], ValueError, r"metric must return shape \(2,\), got \(1,\)"),
        (lambda x: 1.0, TypeError, "must return a tensor, got float"),
        (lambda x: x[:, 0, 0].long(), ValueError, "must return real numbers, got torch.int64"),
        (
            lambda x: x[:, 0, 0] / 0 * torch.tensor([0, 1]),
            ValueError,
            "must be finite, got nan for pair 0",
        ),
        (lambda x: x[:, 0, 0] * torch.tensor([1, torch.inf]), ValueError, "got inf for pair 1"),
    ],
)
def test_what_a_metric_returns_is_checked(pairs, result, error, message):
    metric = resolve(result, pairs)
    with pytest.raises(error, match=message):
        metric(torch.ones(2, 4, 3), pairs)


def test_a_metric_passes_through_and_checks_its_positions(pairs):
    metric = Metric("mine", lambda logits, pairs, source: logits[:, 0, 0])
    assert resolve(metric, pairs) is metric
    with pytest.raises(ValueError, match="positions must be 'last' or 'all', got 'first'"):
        Metric("mine", metric.fn, positions="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"source_logits must have shape \(2, 1, 3\)"):
        resolve("kl", pairs)(LOGITS, pairs, LOGITS[:1])
