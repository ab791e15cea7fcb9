"""Prompt pairs: clean and corrupted token ids of equal length, their answers, and where they come from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from atp_fast.files import written_whole
from atp_fast.prompts.checks import check_ids, check_labels, check_mask
from atp_fast.prompts.encoding import EncodedPair, Encoder, Tokenizer, all_encoded, encode_pairs
from atp_fast.prompts.pair_files import read_csv, read_jsonl

PaddingSide = Literal["right", "left"]


class PromptPairs:
    """Pairs of prompts with equal token counts, and the token each clean prompt should be followed by.

    clean_ids, corrupted_ids: token ids, (pairs, positions), integer;
    answer_ids, wrong_answer_ids: one token id per pair, (pairs,); wrong answers may be left out;
    attention_mask: (pairs, positions), True (or 1) on real tokens, which must be one run per row; both prompts of a
    pair share it; all real when None;
    tokens, corrupted_tokens: for each pair the text of its real tokens, for labels.
    Derived, all (pairs,): lengths, real tokens; starts and last, columns of the first and last real token;
    split, leading real tokens that both prompts share (the length when the prompts are identical).
    Raises TypeError or ValueError naming what does not fit; warns when a pair's prompts are identical.
    """

    def __init__(
        self,
        clean_ids: Tensor,
        corrupted_ids: Tensor,
        answer_ids: Tensor,
        wrong_answer_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        tokens: Sequence[Sequence[str]] | None = None,
        corrupted_tokens: Sequence[Sequence[str]] | None = None,
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
        self.attention_mask = check_mask(attention_mask, self.clean_ids)
        self.tokens = check_labels("tokens", tokens, self.lengths)
        self.corrupted_tokens = check_labels("corrupted_tokens", corrupted_tokens, self.lengths)
        identical = (self.split == self.lengths).nonzero().flatten().tolist()
        if identical:
            which = ", ".join(str(i) for i in identical[:8]) + (
                ", ..." if len(identical) > 8 else ""
            )
            warnings.warn(
                f"clean and corrupted prompt are identical in {len(identical)} of {pairs} pairs ({which}): "
                "every effect there is zero",
                stacklevel=2,
            )

    @classmethod
    def from_text(
        cls,
        tokenizer: Tokenizer,
        *,
        clean: Sequence[str],
        corrupted: Sequence[str],
        answers: Sequence[str],
        wrong_answers: Sequence[str] | None = None,
        padding_side: PaddingSide = "right",
        prepend_bos: bool | None = None,
    ) -> PromptPairs:
        """Tokenise prompts and answers; one string per pair in each list.

        An answer must be one token as it follows its clean prompt, so it usually starts with a space. BOS is put
        first where the tokenizer has one, and never twice; prepend_bos=False leaves it out, and True takes it even
        where the chat template uses it to open turns (as SmolLM2's `<|im_start|>`).
        Raises ValueError naming the pair: different token counts (both tokenisations are shown), empty prompt,
        an answer of several tokens, equal answers, words the tokenizer does not know.
        """
        columns = {"clean": clean, "corrupted": corrupted, "answers": answers}
        if wrong_answers is not None:
            columns["wrong_answers"] = wrong_answers
        for name, column in columns.items():
            if isinstance(column, str) or not all(isinstance(text, str) for text in column):
                raise TypeError(f"{name} must be a list of strings, got {column!r}")
            if len(column) != len(clean):
                raise ValueError(
                    f"{name} must have {len(clean)} entries as clean has, got {len(column)}"
                )
        encoder = Encoder(tokenizer, prepend_bos)
        rows = encode_pairs(
            encoder, clean, corrupted, answers, wrong_answers, lambda i: f"pair {i}"
        )
        return cls.from_encoded(all_encoded(rows), padding_side=padding_side)

    @classmethod
    def from_encoded(
        cls, rows: Sequence[EncodedPair], *, padding_side: PaddingSide = "right"
    ) -> PromptPairs:
        """Pad encoded pairs of different lengths to one table."""
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        if not rows:
            raise ValueError("at least one pair is needed, got none")
        given = [row.wrong_answer for row in rows if row.wrong_answer is not None]
        if given and len(given) != len(rows):
            raise ValueError(
                f"wrong answers must be given for all pairs or for none, got {len(given)} of {len(rows)}"
            )
        positions = max(len(row.clean) for row in rows)
        clean = torch.zeros(len(rows), positions, dtype=torch.long)
        corrupted, mask = torch.zeros_like(clean), torch.zeros(clean.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            length = len(row.clean)
            real = (
                slice(0, length)
                if padding_side == "right"
                else slice(positions - length, positions)
            )
            clean[i, real], corrupted[i, real] = (
                torch.tensor(row.clean),
                torch.tensor(row.corrupted),
            )
            mask[i, real] = True
        return cls(
            clean,
            corrupted,
            torch.tensor([row.answer for row in rows]),
            torch.tensor(given) if given else None,
            attention_mask=mask,
            tokens=[row.tokens for row in rows] if all(row.tokens for row in rows) else None,
            corrupted_tokens=(
                [row.corrupted_tokens for row in rows]
                if all(row.corrupted_tokens for row in rows)
                else None
            ),
        )

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        padding_side: PaddingSide = "right",
        prepend_bos: bool | None = None,
    ) -> PromptPairs:
        """One JSON object a line: texts `clean`, `corrupted`, `answer`, `wrong_answer` (may be left out), or token
        ids `clean_ids`, `corrupted_ids` (lists), `answer_ids`, `wrong_answer_ids` (a number, or a list of one).

        Ids are taken as they are, without BOS. Raises ValueError naming file and line, OSError if it cannot be read.
        """
        rows = read_jsonl(path, Encoder(tokenizer, prepend_bos))
        return cls.from_encoded(rows, padding_side=padding_side)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        padding_side: PaddingSide = "right",
        prepend_bos: bool | None = None,
    ) -> PromptPairs:
        """EAP-IG's CSV files, with columns clean, corrupted and either correct_idx, incorrect_idx or label.

        correct_idx and incorrect_idx are token ids of the tokenizer that the file was made with: a warning says so
        when an IOI answer (a file with corrupted_hard) is not in its own prompt under this tokenizer. label is the
        answer's text, or, on greater-than prompts, the two-digit year: then the answer is a later year and the
        wrong answer an earlier one (see `year_answers`). Raises ValueError naming file and line.
        """
        rows = read_csv(path, Encoder(tokenizer, prepend_bos))
        return cls.from_encoded(rows, padding_side=padding_side)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write the pairs as token ids, one JSON object a line, so that from_jsonl gives them back."""
        with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for i in range(len(self)):
                real = self.attention_mask[i]
                record: dict[str, Any] = {
                    "clean_ids": self.clean_ids[i][real].tolist(),
                    "corrupted_ids": self.corrupted_ids[i][real].tolist(),
                    "answer_ids": int(self.answer_ids[i]),
                }
                if self.wrong_answer_ids is not None:
                    record["wrong_answer_ids"] = int(self.wrong_answer_ids[i])
                file.write(json.dumps(record) + "\n")

    @property
    def lengths(self) -> Tensor:
        return self.attention_mask.sum(1)

    @property
    def starts(self) -> Tensor:
        return self.attention_mask.int().argmax(1)

    @property
    def last(self) -> Tensor:
        return self.starts + self.lengths - 1

    @property
    def split(self) -> Tensor:
        differs = (self.clean_ids != self.corrupted_ids) & self.attention_mask
        first = differs.int().argmax(1) - self.starts
        return torch.where(differs.any(1), first, self.lengths)

    @property
    def device(self) -> torch.device:
        return self.clean_ids.device

    def __len__(self) -> int:
        return self.clean_ids.shape[0]

    def __repr__(self) -> str:
        pairs, positions = self.clean_ids.shape
        wrong = "with" if self.wrong_answer_ids is not None else "without"
        return f"PromptPairs({pairs} pairs, {positions} positions, {wrong} wrong answers)"

    def __iter__(self) -> Iterator[PromptPairs]:
        """Each pair, as PromptPairs of one."""
        return (self[[i]] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> PromptPairs:
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
            tokens=None if self.tokens is None else [self.tokens[i] for i in rows],
            corrupted_tokens=None
            if self.corrupted_tokens is None
            else [self.corrupted_tokens[i] for i in rows],
        )

    def swapped(self) -> PromptPairs:
        """Clean and corrupted exchanged, answers kept: what denoising runs on."""
        return self._with(
            clean_ids=self.corrupted_ids,
            corrupted_ids=self.clean_ids,
            tokens=self.corrupted_tokens,
            corrupted_tokens=self.tokens,
        )

    def right_padded(self) -> PromptPairs:
        """The same pairs, real tokens starting at column 0, as wide as the longest; padding holds token 0."""
        positions = self.clean_ids.shape[1]
        columns = torch.arange(int(self.lengths.max()), device=self.device)
        mask = columns < self.lengths[:, None]
        source = (self.starts[:, None] + columns).clamp(max=positions - 1)
        return self._with(
            clean_ids=self.clean_ids.gather(1, source).masked_fill(~mask, 0),
            corrupted_ids=self.corrupted_ids.gather(1, source).masked_fill(~mask, 0),
            attention_mask=mask,
        )

    def to(self, device: torch.device | str) -> PromptPairs:
        moved = {
            name: getattr(self, name).to(device)
            for name in ("clean_ids", "corrupted_ids", "answer_ids", "attention_mask")
        }
        wrong = None if self.wrong_answer_ids is None else self.wrong_answer_ids.to(device)
        return self._with(**moved, wrong_answer_ids=wrong)

    def digest(self) -> str:
        """sha256, in hex, of all ids; the same whatever the padding side, width, device and labels."""
        rows = self.right_padded()
        hasher = hashlib.sha256()
        for i in range(len(self)):
            length = int(rows.lengths[i])
            wrong = -1 if rows.wrong_answer_ids is None else int(rows.wrong_answer_ids[i])
            numbers = [length, int(rows.answer_ids[i]), wrong]
            numbers += rows.clean_ids[i, :length].tolist() + rows.corrupted_ids[i, :length].tolist()
            hasher.update(b"".join(number.to_bytes(8, "little", signed=True) for number in numbers))
        return hasher.hexdigest()

    def column_tokens(self) -> list[str] | None:
        """For each column the token that all pairs with a real token there have, "·" where they differ.

        None when the pairs carry no token texts.
        """
        if self.tokens is None:
            return None
        seen: list[set[str]] = [set() for _ in range(self.clean_ids.shape[1])]
        for start, tokens in zip(self.starts.tolist(), self.tokens, strict=True):
            for column, token in enumerate(tokens, start=start):
                seen[column].add(token)
        return [next(iter(texts)) if len(texts) == 1 else "·" for texts in seen]

    @classmethod
    def concat(cls, parts: Sequence[PromptPairs]) -> PromptPairs:
        """All pairs of several; parts of different widths are padded on the right, to the widest."""
        if not parts:
            raise ValueError("parts must hold at least one PromptPairs, got none")
        if len({part.wrong_answer_ids is None for part in parts}) > 1:
            raise ValueError("parts must all have wrong answers, or none of them, got both")
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

        return parts[0]._with(
            clean_ids=joined("clean_ids"),
            corrupted_ids=joined("corrupted_ids"),
            answer_ids=joined("answer_ids"),
            wrong_answer_ids=None
            if parts[0].wrong_answer_ids is None
            else joined("wrong_answer_ids"),
            attention_mask=joined("attention_mask"),
            tokens=labels("tokens"),
            corrupted_tokens=labels("corrupted_tokens"),
        )

    def _with(self, **fields: Any) -> PromptPairs:
        """A copy with some fields replaced, without checking (and warning) again."""
        copy = object.__new__(PromptPairs)
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(fields)
        return copy
