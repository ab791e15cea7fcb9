"""The table that prompt pairs are: token ids, masks, answers and spans, what follows from them, and parts of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from atp_fast.prompts.checks import check_ids, check_labels, check_mask
from atp_fast.prompts.spans import Spans, check_spans


class PairTable:
    """What PromptPairs holds; see there."""

    def __init__(
        self,
        clean_ids: Tensor,
        corrupted_ids: Tensor,
        answer_ids: Tensor,
        wrong_answer_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        corrupted_attention_mask: Tensor | None = None,
        tokens: Sequence[Sequence[str]] | None = None,
        corrupted_tokens: Sequence[Sequence[str]] | None = None,
        spans: Spans | None = None,
    ) -> None:
        self.clean_ids = check_ids("clean_ids", clean_ids)
        if self.clean_ids.ndim != 2:
            raise ValueError(
                f"clean_ids must be (pairs, positions), got shape {tuple(clean_ids.shape)}"
            )
        if 0 in self.clean_ids.shape:
            raise ValueError(
                f"clean_ids must hold at least one pair and one position, got shape {tuple(clean_ids.shape)}"
            )
        pairs, positions = self.clean_ids.shape
        like = self.clean_ids
        self.corrupted_ids = check_ids("corrupted_ids", corrupted_ids, (pairs, positions), like)
        self.answer_ids = check_ids("answer_ids", answer_ids, (pairs,), like)
        self.wrong_answer_ids = (
            None
            if wrong_answer_ids is None
            else check_ids("wrong_answer_ids", wrong_answer_ids, (pairs,), like)
        )
        if self.wrong_answer_ids is not None:
            same = (self.answer_ids == self.wrong_answer_ids).nonzero().flatten().tolist()
            if same:
                raise ValueError(
                    f"wrong_answer_ids must differ from answer_ids, got {int(self.answer_ids[same[0]])} for both "
                    f"in pair {same[0]}"
                )
        self.attention_mask = check_mask("attention_mask", attention_mask, self.clean_ids)
        self.corrupted_attention_mask = (
            self.attention_mask
            if corrupted_attention_mask is None
            else check_mask("corrupted_attention_mask", corrupted_attention_mask, self.clean_ids)
        )
        if spans is None and not self.aligned:
            unequal = (self.attention_mask != self.corrupted_attention_mask).any(1).nonzero()
            raise ValueError(
                "corrupted_attention_mask must be attention_mask unless spans say which tokens stand for which, it "
                f"differs in pair {int(unequal[0])}"
            )
        self.spans = (
            None
            if spans is None
            else check_spans(spans.to(like.device), self.lengths, self.corrupted_lengths)
        )
        self.tokens = check_labels("tokens", tokens, self.lengths)
        self.corrupted_tokens = check_labels(
            "corrupted_tokens", corrupted_tokens, self.corrupted_lengths
        )
        identical = (self.split >= self.lengths).nonzero().flatten().tolist()
        if identical:
            which = ", ".join(str(i) for i in identical[:8]) + (
                ", ..." if len(identical) > 8 else ""
            )
            warnings.warn(
                f"clean and corrupted prompt are identical in {len(identical)} of {pairs} pairs ({which}): "
                "every effect there is zero",
                stacklevel=2,
            )

    @property
    def lengths(self) -> Tensor:
        return self.attention_mask.sum(1)

    @property
    def corrupted_lengths(self) -> Tensor:
        return self.corrupted_attention_mask.sum(1)

    @property
    def starts(self) -> Tensor:
        return self.attention_mask.int().argmax(1)

    @property
    def last(self) -> Tensor:
        return self.starts + self.lengths - 1

    @property
    def aligned(self) -> bool:
        """Whether the two prompts of each pair take the same columns."""
        return torch.equal(self.attention_mask, self.corrupted_attention_mask)

    @property
    def split(self) -> Tensor:
        if self.spans is None:
            differs = (self.clean_ids != self.corrupted_ids) & self.attention_mask
            first = differs.int().argmax(1) - self.starts
            return torch.where(differs.any(1), first, self.lengths)
        rows = self.right_padded()
        columns = torch.arange(rows.clean_ids.shape[1], device=self.device)
        differs = (rows.clean_ids != rows.corrupted_ids) | (
            rows.attention_mask != rows.corrupted_attention_mask
        )
        first = torch.where(differs, columns, columns.shape[0]).amin(1)
        source = self.sources(len(columns))
        shifted = (source >= 0) & (source != columns)
        lowest = torch.where(shifted, torch.minimum(source, columns), columns.shape[0]).amin(1)
        # a prompt that goes on where the other one ends, and is not looked at there
        return torch.minimum(torch.minimum(first, lowest), self.lengths)

    def sources(self, positions: int) -> Tensor:
        """(pairs, positions): the position, from the prompt's first token, whose corrupted values stand for each; -1
        where none does."""
        if self.spans is not None:
            return self.spans.sources(positions)
        return torch.arange(positions, device=self.device).expand(len(self), -1)

    @property
    def width(self) -> int:
        """Entries of the position axis of results: spans where there are any, else columns."""
        return self.clean_ids.shape[1] if self.spans is None else len(self.spans.names)

    @property
    def present(self) -> Tensor:
        """(pairs, width) bool: the pair has this column's token, or this span."""
        return self.attention_mask if self.spans is None else self.spans.present

    @property
    def moving(self) -> Tensor:
        """(pairs, width) bool: patching can change something there, as it cannot before the first differing token."""
        if self.spans is None:
            columns = torch.arange(self.width, device=self.device)
            return (columns >= (self.starts + self.split)[:, None]) & (
                columns <= self.last[:, None]
            )
        positions = int(self.lengths.max())
        columns = torch.arange(positions, device=self.device)
        live = (columns >= self.split[:, None]) & (self.sources(positions) >= 0)
        return (self.spans.members(positions) & live[:, None]).any(2)

    @property
    def device(self) -> torch.device:
        return self.clean_ids.device

    def __len__(self) -> int:
        return self.clean_ids.shape[0]

    def __repr__(self) -> str:
        pairs, positions = self.clean_ids.shape
        wrong = "with" if self.wrong_answer_ids is not None else "without"
        spans = "" if self.spans is None else f", {len(self.spans.names)} spans"
        return f"PromptPairs({pairs} pairs, {positions} positions{spans}, {wrong} wrong answers)"

    def __iter__(self) -> Iterator[Self]:
        """Each pair, as PromptPairs of one."""
        return (self[[i]] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        """Some of the pairs, in the order given; an int gives PromptPairs of one pair."""
        numbers = torch.arange(len(self))
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index must be in [0, {len(self)}), got {index}")
            index = [index]
        if isinstance(index, (slice, Tensor)):
            chosen = numbers[index.cpu() if isinstance(index, Tensor) else index]
        else:
            chosen = numbers[torch.tensor(list(index), dtype=torch.long)]
        if chosen.numel() == 0:
            raise ValueError("index must choose at least one pair, got none")
        rows, at = chosen.tolist(), chosen.to(self.device)
        return self._with(
            clean_ids=self.clean_ids[at],
            corrupted_ids=self.corrupted_ids[at],
            answer_ids=self.answer_ids[at],
            wrong_answer_ids=None if self.wrong_answer_ids is None else self.wrong_answer_ids[at],
            attention_mask=self.attention_mask[at],
            corrupted_attention_mask=self.corrupted_attention_mask[at],
            tokens=None if self.tokens is None else [self.tokens[i] for i in rows],
            corrupted_tokens=None
            if self.corrupted_tokens is None
            else [self.corrupted_tokens[i] for i in rows],
            spans=None if self.spans is None else self.spans.take(at),
        )

    def swapped(self) -> Self:
        """Clean and corrupted exchanged, answers kept: what denoising runs on."""
        return self._with(
            clean_ids=self.corrupted_ids,
            corrupted_ids=self.clean_ids,
            attention_mask=self.corrupted_attention_mask,
            corrupted_attention_mask=self.attention_mask,
            tokens=self.corrupted_tokens,
            corrupted_tokens=self.tokens,
            spans=None if self.spans is None else self.spans.swapped(),
        )

    def right_padded(self, width: int = 0) -> Self:
        """The same pairs, real tokens starting at column 0, as wide as the longest, or `width` if that is more; padding holds
        token 0."""
        positions = self.clean_ids.shape[1]
        longest = int(torch.maximum(self.lengths, self.corrupted_lengths).max())
        columns = torch.arange(max(longest, width), device=self.device)

        def moved(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            real = columns < mask.sum(1)[:, None]
            source = (mask.int().argmax(1)[:, None] + columns).clamp(max=positions - 1)
            return ids.gather(1, source).masked_fill(~real, 0), real

        clean, mask = moved(self.clean_ids, self.attention_mask)
        corrupted, corrupted_mask = moved(self.corrupted_ids, self.corrupted_attention_mask)
        return self._with(
            clean_ids=clean,
            corrupted_ids=corrupted,
            attention_mask=mask,
            corrupted_attention_mask=corrupted_mask,
        )

    def without_spans(self) -> Self:
        """The same pairs, scored position by position. Raises ValueError where the prompts of a pair are not aligned."""
        if not self.aligned:
            raise ValueError(
                "pairs must have prompts of equal length to be scored by position, these are aligned by spans alone"
            )
        return self._with(spans=None)

    def to(self, device: torch.device | str) -> Self:
        moved = {
            name: getattr(self, name).to(device)
            for name in (
                "clean_ids",
                "corrupted_ids",
                "answer_ids",
                "attention_mask",
                "corrupted_attention_mask",
            )
        }
        wrong = None if self.wrong_answer_ids is None else self.wrong_answer_ids.to(device)
        spans = None if self.spans is None else self.spans.to(device)
        return self._with(**moved, wrong_answer_ids=wrong, spans=spans)

    def digest(self) -> str:
        """sha256, in hex, of all ids and spans; the same whatever the padding side, width, device and labels."""
        rows = self.right_padded()
        hasher = hashlib.sha256()
        for i in range(len(self)):
            length, other = int(rows.lengths[i]), int(rows.corrupted_lengths[i])
            wrong = -1 if rows.wrong_answer_ids is None else int(rows.wrong_answer_ids[i])
            numbers = [length, int(rows.answer_ids[i]), wrong]
            numbers += rows.clean_ids[i, :length].tolist() + rows.corrupted_ids[i, :other].tolist()
            hasher.update(b"".join(number.to_bytes(8, "little", signed=True) for number in numbers))
            if rows.spans is not None:
                named = [rows.spans.named(i), rows.spans.named(i, corrupted=True)]
                hasher.update(json.dumps(named).encode())
        return hasher.hexdigest()

    def column_tokens(self) -> list[str] | None:
        """Labels of the position axis: the spans' names, or for each column the token that all pairs with a real token
        there have, "·" where they differ.

        None when the pairs carry neither spans nor token texts.
        """
        if self.spans is not None:
            return list(self.spans.names)
        if self.tokens is None:
            return None
        seen: list[set[str]] = [set() for _ in range(self.clean_ids.shape[1])]
        for start, tokens in zip(self.starts.tolist(), self.tokens, strict=True):
            for column, token in enumerate(tokens, start=start):
                seen[column].add(token)
        return [next(iter(texts)) if len(texts) == 1 else "·" for texts in seen]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """All pairs of several; parts of different widths are padded on the right, to the widest."""
        if not parts:
            raise ValueError("parts must hold at least one PromptPairs, got none")
        for what, given in (
            ("wrong answers", [part.wrong_answer_ids for part in parts]),
            ("spans", [part.spans for part in parts]),
        ):
            if len({value is None for value in given}) > 1:
                raise ValueError(f"parts must all have {what}, or none of them, got both")
        width = max(part.clean_ids.shape[1] for part in parts)
        if any(part.clean_ids.shape[1] != width for part in parts):
            parts = [part.right_padded() for part in parts]

        def joined(name: str) -> Tensor:
            wide = [getattr(part, name) for part in parts]
            if wide[0].ndim == 2:
                wide = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in wide]
            return torch.cat(wide)

        def labels(name: str) -> list[list[str]] | None:
            lists = [getattr(part, name) for part in parts]
            return (
                None
                if any(part is None for part in lists)
                else [row for part in lists for row in part]
            )

        def spans() -> Spans | None:
            all_spans = [(part.spans, i) for part in parts for i in range(len(part))]
            clean = [found.named(i) for found, i in all_spans if found is not None]
            corrupted = [
                found.named(i, corrupted=True) for found, i in all_spans if found is not None
            ]
            return Spans.of(clean, corrupted).to(parts[0].device) if clean else None

        return parts[0]._with(
            clean_ids=joined("clean_ids"),
            corrupted_ids=joined("corrupted_ids"),
            answer_ids=joined("answer_ids"),
            wrong_answer_ids=None
            if parts[0].wrong_answer_ids is None
            else joined("wrong_answer_ids"),
            attention_mask=joined("attention_mask"),
            corrupted_attention_mask=joined("corrupted_attention_mask"),
            tokens=labels("tokens"),
            corrupted_tokens=labels("corrupted_tokens"),
            spans=spans(),
        )

    def _with(self, **fields: Any) -> Self:
        """A copy with some fields replaced, without checking (and warning) again."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(fields)
        return copy
