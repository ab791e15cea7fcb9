"""Metrics of other libraries: functions of logits (batch, positions, vocab) of which nothing else is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atp_fast.metrics import Metric
from atp_fast.prompts.pairs import PromptPairs

LogitsMetric = Callable[[Tensor], Tensor]


def reads_last_only(metric: LogitsMetric, batch: int, positions: int, vocab: int) -> bool:
    """Whether a metric looks at the last position alone: then nothing that stands at the others changes a bit of it.

    It is asked with made-up logits, of which the others become NaN, then other numbers. The metric must be a function of
    the logits alone.
    """
    if positions == 1:
        return True
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(0.5, 1.5, batch * positions).view(batch, positions, 1)
    logits = row * factors  # no two positions alike
    with torch.no_grad():
        value = torch.as_tensor(metric(logits))
        for factor in (torch.nan, -3.0):
            logits[:, :-1] *= factor
            try:
                if not torch.equal(torch.as_tensor(metric(logits)), value):
                    return False
            except (ValueError, RuntimeError):  # it checks what it reads
                return False
            logits = row * factors
    return True


def of_one_row(metric: LogitsMetric, positions: int, vocab: int) -> Metric:
    """A metric of one prompt's logits (1, positions, vocab) to a number, as a metric of every pair by itself."""

    def fn(logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None) -> Tensor:
        wide = logits.expand(-1, positions, -1)
        return torch.stack([_number(metric(wide[i : i + 1])) for i in range(len(wide))])

    last = reads_last_only(metric, 1, positions, vocab)
    return Metric(_name(metric), fn, "last" if last else "all")


def of_batch(metric: LogitsMetric, batch: int, positions: int, vocab: int, per_row: bool) -> Metric:
    """A metric of the whole batch's logits; per_row: it gives (batch,), else one number, which every pair then has."""
    if batch == 1 and not per_row:
        return of_one_row(metric, positions, vocab)

    def fn(logits: Tensor, pairs: PromptPairs, source_logits: Tensor | None) -> Tensor:
        value = torch.as_tensor(metric(logits.expand(-1, positions, -1)))
        if not per_row:
            return _number(value).expand(batch)
        if tuple(value.shape) != (batch,):
            raise ValueError(
                f"patching_metric {_name(metric)!r} must return shape ({batch},) unless reduce is 'scalar', got "
                f"{tuple(value.shape)}"
            )
        return value

    last = reads_last_only(metric, batch, positions, vocab)
    return Metric(
        _name(metric),
        fn,
        "last" if last else "all",
        all_pairs_at_once=True,
        mixes_pairs=not per_row,
    )


def _number(value: Tensor) -> Tensor:
    value = torch.as_tensor(value)
    if value.ndim:
        raise ValueError(f"the metric must return a scalar, got shape {tuple(value.shape)}")
    return value


def _name(metric: LogitsMetric) -> str:
    return getattr(metric, "__name__", type(metric).__name__)
