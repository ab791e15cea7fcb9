"""What a page says in words: the question, the prompts with each token's best nodes, the table of nodes."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from atp_fast.nodes import Node, name_of
from atp_fast.prompts.directions import sign_text
from atp_fast.results.figures import visible
from atp_fast.results.patch_effects import PatchEffects
from atp_fast.results.prompts import Prompt
from atp_fast.results.scores import NodeScores

ROWS = 1000
SHOWN = 1000
"""Tokens of prompts on a page: whole prompts, and always the first, if need be without its beginning."""
_NAMED = 5
"""Best nodes that a token names."""


class Piece(NamedTuple):
    """text: a token, or all neighbouring tokens of a span; column: -1 for text that is not scored; share: of the largest
    total, or, in the prompt that is patched in, 1 where it differs; name: the span's.
    """

    text: str
    column: int
    share: float
    name: str


class ShownPrompt(NamedTuple):
    pieces: list[Piece]
    other: list[Piece]
    skipped: int


class ShownPrompts(NamedTuple):
    """prompts: what is shown; tips: by column, the total and the best nodes there, in words; pairs: of the run."""

    prompts: list[ShownPrompt]
    tips: dict[int, str]
    pairs: int


class NodeRow(NamedTuple):
    node: Node
    token: str
    contribution: str
    effect: str
    exact_contribution: str
    exact_effect: str


def question(found: NodeScores) -> str:
    """What was asked."""
    pairs = len(found.clean_value)
    clean, corrupted = found.metric_means
    return (
        f"{len(found):,} nodes ({', '.join(found.space.kinds)}) on {pairs} pair{'s' * (pairs != 1)} of prompts, "
        f"{found.direction}; {sign_text(found.direction)}. The metric is {clean:.5g} on the clean and "
        f"{corrupted:.5g} on the corrupted prompts (mean)."
    )


def provenance(found: NodeScores) -> dict[str, str]:
    return {"backend": found.backend, **found.metadata}


def shown_prompts(found: NodeScores) -> ShownPrompts:
    """The prompts, coloured by the contributions of all nodes at a token."""
    totals = _totals(found)
    live = found.counts > 0
    largest = float(totals[live].max()) if bool(live.any()) else 0.0
    shares = [float(total) / largest if largest else 0.0 for total in totals]
    prompts: list[ShownPrompt] = []
    room = SHOWN
    for prompt in _prompts(found):
        if prompts and len(prompt.tokens) > room:
            break
        skipped = max(0, len(prompt.tokens) - room)
        room -= len(prompt.tokens) - skipped
        prompts.append(_shown(found, prompt, shares, skipped))
    columns = {p.column for prompt in prompts for p in prompt.pieces if p.column >= 0}
    best = _best(found, sorted(columns))
    tips = {
        column: "\n".join([f"{_place(found, column)}: {float(totals[column]):.4g} in all", *names])
        for column, names in best.items()
    }
    return ShownPrompts(prompts, tips, len(found.clean_value))


def _prompts(found: NodeScores) -> list[Prompt]:
    """The prompts that the result keeps; where it keeps none, the labels of its position axis."""
    if found.prompts:
        return found.prompts
    if found.tokens is None:
        return []
    columns = found.counts.nonzero().flatten().tolist()
    return [Prompt([found.tokens[i] for i in columns], columns, [], [])]


def _shown(found: NodeScores, prompt: Prompt, shares: list[float], skipped: int) -> ShownPrompt:
    own = dict(_grouped(prompt.tokens, prompt.columns))
    other = dict(_grouped(prompt.other_tokens, prompt.other_columns))
    differs = [float(own.get(i) != other.get(i)) for i in range(found.space.positions)]
    kept = len(prompt.tokens) - skipped
    return ShownPrompt(
        _pieces(found, prompt.tokens[-kept:], prompt.columns[-kept:], shares),
        _pieces(found, prompt.other_tokens[-kept:], prompt.other_columns[-kept:], differs),
        skipped,
    )


def _grouped(tokens: list[str], columns: list[int]) -> list[tuple[int, list[str]]]:
    """Neighbours of one column together: the tokens of a span, or one token each."""
    pairs = zip(columns, tokens, strict=True)
    return [
        (column, [token for _, token in group]) for column, group in groupby(pairs, itemgetter(0))
    ]


def _pieces(
    found: NodeScores, tokens: list[str], columns: list[int], shares: list[float]
) -> list[Piece]:
    names = found.tokens if found.axis == "span" else None
    pieces = []
    for column, group in _grouped(tokens, columns):
        text = "".join(map(visible, group))
        scored = column >= 0
        name = names[column] if scored and names and names[column] != text.strip() else ""
        pieces.append(Piece(text, column, shares[column] if scored else 0.0, name))
    return pieces


def _totals(found: NodeScores) -> Tensor:
    """(positions,): the contributions of all nodes at each."""
    totals = torch.zeros(found.space.positions, dtype=torch.float64)
    for kind in found.space.kinds:
        table = found.totals(kind, by="contribution", over="position")
        totals += table.double().nan_to_num(0, 0, 0).sum(0)
    return totals


def _best(found: NodeScores, columns: list[int]) -> dict[int, list[str]]:
    """The best nodes of each column, among all of them."""
    best: dict[int, list[tuple[float, str]]] = {column: [] for column in columns}
    for kind in found.space.kinds:
        width, layers = found.space.widths[kind], found.space.layers_of(kind)
        table = found.contribution[kind].nan_to_num(-1, -1, -1)
        for column in columns:
            flat = table[:, column].flatten()
            values, places = flat.topk(min(_NAMED, len(flat)))
            for value, place in zip(values.tolist(), places.tolist(), strict=True):
                if value > 0:
                    node = Node(kind, layers[place // width], column, place % width)
                    best[column].append((value, name_of(node)))
    return {
        column: [
            f"{name}: {value:.4g}" for value, name in sorted(nodes, key=lambda x: -x[0])[:_NAMED]
        ]
        for column, nodes in best.items()
    }


def _place(found: NodeScores, column: int) -> str:
    if found.axis == "span" and found.tokens is not None:
        return f"span {found.tokens[column]}"
    return f"position {column}"


def node_rows(found: NodeScores, exact: PatchEffects | None) -> list[NodeRow]:
    """The best nodes, with the exact scores of those that were patched."""
    patched: dict[Node, tuple[float, float]] = {}
    if exact is not None and exact.nodes is not None:
        values = zip(exact.mean_abs.tolist(), exact.mean.tolist(), strict=True)
        patched = dict(zip(exact.nodes, values, strict=True))
    rows = []
    for node in found.top(min(ROWS, len(found))) if len(found) else []:
        own = patched.get(node)
        rows.append(
            NodeRow(
                node,
                "" if node.token is None else visible(node.token),
                f"{node.contribution:.5g}",
                f"{node.effect:+.5g}",
                "" if own is None else f"{own[0]:.5g}",
                "" if own is None else f"{own[1]:+.5g}",
            )
        )
    return rows
