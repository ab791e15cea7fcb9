"""What an attribution is asked for, with every default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atp_fast.nodes import NODE_KINDS

if TYPE_CHECKING:  # the command line's help does without torch
    from atp_fast.metrics import MetricLike
    from atp_fast.prompts.directions import Direction


PAPER_METRIC = "nll"
"""The paper's loss, for studies beside its figures."""


@dataclass(frozen=True)
class Method:
    """Which of AtP*'s two repairs are made."""

    qk_fix: bool
    graddrop: bool


METHODS = {
    "atp": Method(qk_fix=False, graddrop=False),
    "atp+qk": Method(qk_fix=True, graddrop=False),
    "atp+graddrop": Method(qk_fix=False, graddrop=True),
    "atp*": Method(qk_fix=True, graddrop=True),
}


def check_method(method: str) -> Method:
    if method not in METHODS:
        raise ValueError(f"method must be among {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


@dataclass(frozen=True)
class Question:
    """What is asked of each pair: the options of Engine.attribute and their defaults."""

    metric: MetricLike = "logit_diff"
    method: str = "atp*"
    nodes: Sequence[str] = NODE_KINDS
    direction: Direction = "noising"
    per_pair: bool = False
