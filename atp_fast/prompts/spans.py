"""Spans: named groups of neighbouring tokens, which are scored and patched as one.

A span's score is made of the signed sum of its positions' effects. Where the two prompts of a pair need different numbers
of tokens for a span, its positions are aligned from its end: the last token stands for the last, the one before it for
the one before, and a token that has no counterpart keeps its own value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[int, int]
Named = Mapping[str, Range]
"""Name -> first token and one past the last, counted from a prompt's first real token."""


class Spans(NamedTuple):
    """Spans of many pairs.

    names: of all spans, in the order of the results' position axis; clean, corrupted: token ranges in the two prompts,
    (pairs, names, 2), first and one past the last, counted from the prompt's first real token; 0, 0 where a pair has no
    such span.
    """

    names: tuple[str, ...]
    clean: Tensor
    corrupted: Tensor

    @classmethod
    def of(cls, clean: Sequence[Named], corrupted: Sequence[Named]) -> Spans:
        """Spans given pair by pair; names in the order in which they are first met."""
        names = tuple(dict.fromkeys(name for row in clean for name in row))

        def table(rows: Sequence[Named]) -> Tensor:
            ranges = [[list(row.get(name, (0, 0))) for name in names] for row in rows]
            return torch.tensor(ranges, dtype=torch.int64).reshape(len(rows), len(names), 2)

        return cls(names, table(clean), table(corrupted))

    def named(self, pair: int, corrupted: bool = False) -> dict[str, Range]:
        """The spans of one pair, by name."""
        rows = (self.corrupted if corrupted else self.clean)[pair].tolist()
        return {
            name: (first, end)
            for name, (first, end) in zip(self.names, rows, strict=True)
            if end > first
        }

    @property
    def present(self) -> Tensor:
        """(pairs, names) bool: the pair has the span."""
        return self.clean[..., 1] > self.clean[..., 0]

    def swapped(self) -> Spans:
        return Spans(self.names, self.corrupted, self.clean)

    def take(self, rows: Tensor) -> Spans:
        return Spans(self.names, self.clean[rows], self.corrupted[rows])

    def to(self, device: torch.device | str) -> Spans:
        return Spans(self.names, self.clean.to(device), self.corrupted.to(device))

    def members(self, positions: int) -> Tensor:
        """(pairs, names, positions) bool: the position, counted from the first real token, lies in the span."""
        t = torch.arange(positions, device=self.clean.device)
        return (t >= self.clean[..., :1]) & (t < self.clean[..., 1:])

    def sources(self, positions: int) -> Tensor:
        """(pairs, positions): the corrupted position that stands for each clean one, -1 where none does."""
        t = torch.arange(positions, device=self.clean.device)
        place = t + (self.corrupted[..., 1:] - self.clean[..., 1:])
        has = self.members(positions) & (place >= self.corrupted[..., :1])
        return torch.where(has, place, -1).amax(1) if self.names else t.new_full((1, 1), -1)


def check_spans(spans: Spans, clean_lengths: Tensor, corrupted_lengths: Tensor) -> Spans:
    """ValueError, naming pair and span, for a span that is empty, lies outside its prompt or overlaps another."""
    pairs, names = len(clean_lengths), len(spans.names)
    if not names:
        raise ValueError("spans must name at least one span, got none")
    for side, table, lengths in (
        ("clean", spans.clean, clean_lengths),
        ("corrupted", spans.corrupted, corrupted_lengths),
    ):
        if tuple(table.shape) != (pairs, names, 2):
            raise ValueError(
                f"spans.{side} must have shape {(pairs, names, 2)}, got {tuple(table.shape)}"
            )
        for pair in range(pairs):
            _check_row(
                f"{side} prompt of pair {pair}", spans.names, table[pair], int(lengths[pair])
            )
    one_sided = (
        (spans.present != (spans.corrupted[..., 1] > spans.corrupted[..., 0])).nonzero().tolist()
    )
    if one_sided:
        pair, name = one_sided[0]
        raise ValueError(
            f"span {spans.names[name]!r} must be in both prompts of pair {pair}, it is in one"
        )
    return spans


def _check_row(where: str, names: Sequence[str], ranges: Tensor, length: int) -> None:
    found = sorted(
        (first, end, name)
        for name, (first, end) in zip(names, ranges.tolist(), strict=True)
        if (first, end) != (0, 0)
    )
    for first, end, name in found:
        if first >= end:
            raise ValueError(
                f"span {name!r} must not be empty in the {where}, got [{first}, {end})"
            )
        if first < 0 or end > length:
            raise ValueError(
                f"span {name!r} must lie in the {length} tokens of the {where}, got [{first}, {end})"
            )
    for (_, end, one), (first, _, other) in pairwise(found):
        if first < end:
            raise ValueError(f"spans must not overlap, got {one!r} and {other!r} in the {where}")


def token_spans(
    where: str, text: str, offsets: Sequence[Range], first: int, spans: Named
) -> dict[str, Range]:
    """Token ranges of spans given by characters.

    offsets: characters of each token of `text`; first: number of the first of these tokens in the prompt, after what is
    put before the text. White space around a token does not count: " Mary" belongs to a span of "Mary".
    Raises ValueError, naming prompt and span, for a span outside the text, without a token, or that cuts one.
    """
    found: dict[str, Range] = {}
    for name, (begin, stop) in spans.items():
        if not 0 <= begin < stop <= len(text):
            raise ValueError(
                f"span {name!r} must be characters [first, end) of the {len(text)} in the {where}, got "
                f"[{begin}, {stop})"
            )
        inside = []
        for i, offset in enumerate(offsets):
            a, b = _trim(text, *offset)
            blank = not text[a:b].strip()
            within = begin <= a and b <= stop
            if within:
                inside.append(i)
            elif not blank and a < stop and b > begin:
                raise ValueError(
                    f"span {name!r} must not cut a token in the {where}: {text[begin:stop]!r} ends inside "
                    f"{text[slice(*offset)]!r}"
                )
        if not inside:
            raise ValueError(
                f"span {name!r} must hold a token in the {where}, got {text[begin:stop]!r}"
            )
        found[name] = (first + inside[0], first + inside[-1] + 1)
    return found


def _trim(text: str, begin: int, end: int) -> Range:
    """The range without white space at its ends; as it is where it holds nothing else."""
    part = text[begin:end]
    if not part.strip():
        return begin, end
    return begin + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def found_spans(where: str, text: str, spans: Mapping[str, Range | str]) -> dict[str, Range]:
    """Character ranges of spans, some of which are given by their text, which must stand there once."""
    if not isinstance(spans, Mapping):
        raise TypeError(
            f"spans of the {where} must map names to ranges, got {type(spans).__name__}"
        )
    ranges: dict[str, Range] = {}
    for name, value in spans.items():
        if isinstance(value, str):
            if not value or text.count(value) != 1:
                raise ValueError(
                    f"span {name!r} must stand once in the {where}, got {value!r}, which stands there "
                    f"{text.count(value) if value else 0} times: give its characters (first, end)"
                )
            ranges[name] = (text.index(value), text.index(value) + len(value))
            continue
        try:
            begin, stop = (int(number) for number in value)
        except (TypeError, ValueError):
            raise ValueError(
                f"span {name!r} of the {where} must be a text or two numbers (first, end), got {value!r}"
            ) from None
        ranges[name] = (begin, stop)
    return ranges
