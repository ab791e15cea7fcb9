"""One real number per pair from the logits: the named metrics, and any callable."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from atp_fast.prompts.pairs import PromptPairs

MetricFunction = Callable[[Tensor, PromptPairs, Tensor | None], Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric and what it needs to be computed.

    fn: (logits, pairs, source_logits) -> (pairs,), differentiable in logits. logits: (pairs, n, vocab), with n = 1,
    each pair's last real position, when positions is "last", else every column of the pairs' own layout;
    source_logits: the same of the run whose activations are patched in (the corrupted one when noising), or None.
    needs_source_logits: fn reads source_logits; all_pairs_at_once: fn must see all pairs in one call;
    mixes_pairs: a pair's value may depend on the others' logits, which is an error otherwise (`check_rows`).
    """

    name: str
    fn: MetricFunction
    positions: Literal["last", "all"] = "last"
    needs_source_logits: bool = False
    all_pairs_at_once: bool = False
    mixes_pairs: bool = False

    def __post_init__(self) -> None:
        if self.positions not in ("last", "all"):
            raise ValueError(f"positions must be 'last' or 'all', got {self.positions!r}")

    def columns(self, pairs: PromptPairs) -> int:
        """How many of each pair's positions it looks at."""
        return pairs.clean_ids.shape[1] if self.positions == "all" else 1

    def __call__(
        self, logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None = None
    ) -> Tensor:
        """The metric of each pair, (pairs,); the named ones in float32, or float64 for float64 logits.

        Raises TypeError or ValueError if logits or the metric's own result have the wrong shape, or if the result
        is NaN or infinite.
        """
        _check_logits("logits", logits, pairs, self.positions)
        if self.needs_source_logits:
            if source_logits is None:
                raise ValueError(f"metric {self.name!r} needs source_logits, got None")
            if source_logits.shape != logits.shape:
                raise ValueError(
                    f"source_logits must have shape {tuple(logits.shape)} as logits has, "
                    f"got {tuple(source_logits.shape)}"
                )
        values = self.fn(logits, pairs, source_logits)
        if not isinstance(values, Tensor):
            raise TypeError(
                f"metric {self.name!r} must return a tensor, got {type(values).__name__}"
            )
        if tuple(values.shape) != (len(pairs),):
            raise ValueError(
                f"metric must return shape ({len(pairs)},), got {tuple(values.shape)} from {self.name!r}: "
                "one value per pair, not their mean"
            )
        if not values.is_floating_point():
            raise ValueError(f"metric {self.name!r} must return real numbers, got {values.dtype}")
        wrong = (~torch.isfinite(values.detach())).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"metric {self.name!r} must be finite, got {values[wrong[0]].item()} for pair {wrong[0]}"
            )
        return values


def check_rows(metric: Metric, values: Tensor, logits: Tensor) -> None:
    """Raises ValueError where the first or the last pair's value depends on another pair's logits.

    values: the metric of logits (pairs, positions, vocab), of which it has the graph. Effects are those of a pair on its own
    metric: a pair's value minus the mean of all, say, has none, for its sum over pairs never changes.
    """
    if len(values) < 2 or metric.mixes_pairs or metric in METRICS_BY_NAME.values():
        return
    for row in (0, len(values) - 1):
        (gradient,) = torch.autograd.grad(
            values[row], logits, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        largest = gradient.abs().amax((1, 2))
        largest[row] *= torch.finfo(gradient.dtype).eps ** 0.5
        other = int(largest.argmax())
        if other != row and float(largest[other]) > 0:
            raise ValueError(
                f"metric {metric.name!r} must give each pair the value of its own logits, the value of pair {row} depends "
                f"on the logits of pair {other}"
            )


MetricLike = str | Metric | Callable[..., Any]
"""A metric's name, a Metric, or a callable as `resolve` takes it."""


def nll(logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None = None) -> Tensor:
    """-log p(answer): the paper's loss. Grows when the answer becomes less likely."""
    return -_log_probs(logits).gather(1, _answers(pairs.answer_ids, logits)).squeeze(1)


def logit_diff(logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None = None) -> Tensor:
    """logit(answer) - logit(wrong answer)."""
    return _difference(_wide(logits[:, -1]), pairs, logits)


def prob_diff(logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None = None) -> Tensor:
    """p(answer) - p(wrong answer)."""
    return _difference(_log_probs(logits).exp(), pairs, logits)


def kl(logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None = None) -> Tensor:
    """KL(source || run): how far the run's next-token distribution is from that of the run patched in.

    Against the clean run itself the divergence is at its minimum, and its gradient there is zero.
    """
    if source_logits is None:
        raise ValueError("metric 'kl' needs source_logits, got None")
    source, run = _log_probs(source_logits).detach(), _log_probs(logits)
    impossible = source == -torch.inf
    return (source.exp() * (source - run).masked_fill(impossible, 0)).sum(-1)


METRICS_BY_NAME = {
    "nll": Metric("nll", nll),
    "logit_diff": Metric("logit_diff", logit_diff),
    "prob_diff": Metric("prob_diff", prob_diff),
    "kl": Metric("kl", kl, needs_source_logits=True),
}
METRICS = tuple(METRICS_BY_NAME)


def resolve(metric: MetricLike, pairs: PromptPairs) -> Metric:
    """The Metric of a name, a Metric, or a callable, checked against the pairs.

    A callable is called, by the number of its required positional arguments, as
      f(logits)          with all pairs' logits at once, (pairs, positions, vocab);
      f(logits, pairs)   with the logits and pairs of a batch;
      f(logits, clean_logits, input_length, labels)   as EAP-IG does, with mean=False and loss=False where it has
                         them: input_length is each pair's last column + 1, labels is (pairs, 2) with answer and wrong
                         answer, (pairs,) without wrong answers, and clean_logits are those of the run whose
                         activations are patched in, so that a divergence has a gradient.
    It gets every position, or only each pair's last one if it has an attribute `positions = "last"`. It returns one
    value per pair. Raises ValueError for an unknown name or signature and for a metric that needs wrong answers
    where there are none, or every position where the prompts of a pair differ in length, TypeError for anything that is
    not a metric.
    """
    chosen = _chosen(metric, pairs)
    if chosen.positions == "all" and not pairs.aligned:
        raise ValueError(
            f"metric {chosen.name!r} looks at every position, which the prompts of a pair must then share: give it "
            'positions="last", or prompts of equal length'
        )
    return chosen


def _chosen(metric: MetricLike, pairs: PromptPairs) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS_BY_NAME:
            raise ValueError(
                f"metric must be among {', '.join(METRICS)}, or a callable, got {metric!r}"
            )
        if metric in ("logit_diff", "prob_diff") and pairs.wrong_answer_ids is None:
            raise ValueError(
                f"metric {metric!r} needs wrong_answer_ids (wrong_answers in from_text), got pairs without them; "
                "'nll' needs none"
            )
        return METRICS_BY_NAME[metric]
    if not callable(metric):
        raise TypeError(f"metric must be a name or a callable, got {type(metric).__name__}")
    return _from_callable(metric)


def _from_callable(function: Callable[..., Any]) -> Metric:
    inner = function
    while isinstance(inner, functools.partial):  # options fixed beforehand
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    positions: Literal["last", "all"] = getattr(function, "positions", "all")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise ValueError(f"metric {name!r} must have a signature: {error}") from error
    required = [p for p in parameters if p.default is p.empty]
    named_only = [p.name for p in required if p.kind is p.KEYWORD_ONLY]
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required)
    if named_only or count not in (1, 2, 4):
        raise ValueError(
            f"metric {name!r} must take (logits), (logits, pairs) or (logits, clean_logits, input_length, labels), "
            f"got ({', '.join(p.name for p in parameters)})"
        )
    if count == 1:
        return Metric(
            name, lambda logits, _, __: function(logits), positions, all_pairs_at_once=True
        )
    if count == 2:
        return Metric(name, lambda logits, pairs, _: function(logits, pairs), positions)
    options = {p.name: False for p in parameters if p.name in ("mean", "loss")}

    def as_eap_ig(logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None) -> Any:
        columns = torch.ones_like(pairs.last) if positions == "last" else pairs.last + 1
        wrong = pairs.wrong_answer_ids
        labels = pairs.answer_ids if wrong is None else torch.stack((pairs.answer_ids, wrong), 1)
        with warnings.catch_warnings():  # MIB's metrics make a tensor of their labels
            warnings.filterwarnings("ignore", "To copy construct from a tensor")
            return function(logits, source_logits, columns, labels.to(logits.device), **options)

    return Metric(name, as_eap_ig, positions, needs_source_logits=True)


def _check_logits(name: str, logits: Tensor, pairs: PromptPairs, positions: str) -> None:
    columns = 1 if positions == "last" else pairs.clean_ids.shape[1]
    if logits.ndim != 3 or tuple(logits.shape[:2]) != (len(pairs), columns):
        raise ValueError(
            f"{name} must have shape ({len(pairs)}, {columns}, vocab), got {tuple(logits.shape)}"
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_probs(logits: Tensor) -> Tensor:
    return _wide(logits[:, -1]).log_softmax(-1)


def _answers(ids: Tensor, logits: Tensor) -> Tensor:
    vocab = logits.shape[-1]
    if int(ids.max()) >= vocab:
        raise ValueError(
            f"answer_ids and wrong_answer_ids must be below the model's vocabulary size {vocab}, "
            f"got {int(ids.max())}"
        )
    return ids.to(logits.device)[:, None]


def _difference(scores: Tensor, pairs: PromptPairs, logits: Tensor) -> Tensor:
    if pairs.wrong_answer_ids is None:
        raise ValueError("logit_diff and prob_diff need wrong_answer_ids, got pairs without them")
    answer = scores.gather(1, _answers(pairs.answer_ids, logits))
    return (answer - scores.gather(1, _answers(pairs.wrong_answer_ids, logits))).squeeze(1)
