"""Exact effects and the bound on missed ones, checked against the run that they are shown with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from atp_fast.patching.diagnostics import MissedBound
from atp_fast.results.agreement import Agreement, agreement
from atp_fast.results.patch_effects import PatchEffects
from atp_fast.results.scores import NodeScores


class Bound(NamedTuple):
    """levels: confidence in words, and the bound; nodes: how many were not patched, of these kinds."""

    levels: list[tuple[str, float]]
    nodes: int
    kinds: list[str]
    forwards: int
    assumptions: str


def checked(found: NodeScores, exact: PatchEffects) -> Agreement:
    """The run's scores beside the exact ones. Raises ValueError for effects of another question."""
    if exact.nodes is None:
        raise ValueError("exact must hold effects of single nodes, got those of subsets")
    _check_question("exact", found, exact.metric, exact.direction, exact.metadata)
    return agreement(found.scored(exact.nodes), exact, found.method)


def bounded(found: NodeScores, bound: MissedBound | Mapping[str, Any]) -> Bound:
    """The bound, or what its file holds. Raises ValueError for what is no bound, or one of another question."""
    words: Mapping[str, Any]
    if isinstance(bound, MissedBound):
        words = bound.to_dict() | {"kinds": dict.fromkeys(node.kind for node in bound.nodes)}
    else:
        words = bound
    try:
        result = Bound(
            [(f"{100 * float(c):g} %", float(value)) for c, value in words["bounds"].items()],
            int(words["nodes"]),
            list(words.get("kinds", ())),  # and the question: files of early versions have neither
            int(words["forwards"]),
            str(words["assumptions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"bound must hold what atp-fast diagnose writes, got {error!r}") from error
    metric, direction = words.get("metric", found.metric), words.get("direction", found.direction)
    _check_question("bound", found, metric, direction, words)
    return result


def _check_question(
    name: str, found: NodeScores, metric: str, direction: str, metadata: Mapping[str, Any]
) -> None:
    if (metric, direction) != (found.metric, found.direction):
        raise ValueError(
            f"{name} must be of {found.metric}, {found.direction}, as the scores are, got {metric}, {direction}"
        )
    own, other = (x.get("pairs_digest") for x in (found.metadata, metadata))
    if None not in (own, other) and own != other:
        raise ValueError(f"{name} must be of the pairs of the scores, got those of other pairs")
