"""Prompts in words, as far as a result keeps them for its report."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from atp_fast.prompts.pairs import PromptPairs

KEPT = 4000
"""Tokens of prompts that a result keeps: whole pairs, and always the first."""


class Prompt(NamedTuple):
    """The texts of one pair.

    tokens: of the prompt that is run; columns: the place of each on the results' position axis, -1 for a token outside all
    spans; other_tokens, other_columns: the same of the prompt whose values are patched in.
    """

    tokens: list[str]
    columns: list[int]
    other_tokens: list[str]
    other_columns: list[int]


def kept_prompts(pairs: PromptPairs) -> list[Prompt] | None:
    """The first pairs' prompts; None where the pairs have no token texts.

    pairs: as they are run, the first prompt being the one that is patched.
    """
    if pairs.tokens is None or pairs.corrupted_tokens is None:
        return None
    kept: list[Prompt] = []
    total = 0
    for row, (tokens, other) in enumerate(zip(pairs.tokens, pairs.corrupted_tokens, strict=True)):
        total += len(tokens) + len(other)
        if kept and total > 2 * KEPT:
            break
        columns, other_columns = (
            _columns(pairs, row, len(texts), ranges)
            for texts, ranges in (
                (tokens, pairs.spans and pairs.spans.clean[row]),
                (other, pairs.spans and pairs.spans.corrupted[row]),
            )
        )
        kept.append(Prompt(list(tokens), columns, list(other), other_columns))
    return kept


def _columns(pairs: PromptPairs, row: int, length: int, ranges: Tensor | None) -> list[int]:
    if ranges is None:
        first = int(pairs.starts[row])
        return list(range(first, first + length))
    columns = [-1] * length
    for span, (begin, end) in enumerate(ranges.tolist()):
        columns[begin:end] = [span] * (end - begin)
    return columns
