"""Prompt pairs from token ids, text, templates, chats and files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from atp_fast.files import written_whole
from atp_fast.prompts.encoding import EncodedPair, Encoder, Tokenizer, all_encoded, encode_pairs
from atp_fast.prompts.pair_files import read_csv, read_jsonl
from atp_fast.prompts.spans import Range, Spans, found_spans
from atp_fast.prompts.table import PairTable
from atp_fast.prompts.templates import Message, SpannedText, fill, turns

PaddingSide = Literal["right", "left"]


class PromptPairs(PairTable):
    """Pairs of prompts, and the token each clean prompt should be followed by.

    clean_ids, corrupted_ids: token ids, (pairs, positions), integer;
    answer_ids, wrong_answer_ids: one token id per pair, (pairs,); wrong answers may be left out;
    attention_mask: (pairs, positions), True (or 1) on real tokens, which must be one run per row; all real when None;
    corrupted_attention_mask: that of the corrupted prompts, where they have other numbers of tokens; needs spans;
    tokens, corrupted_tokens: for each pair the text of its real tokens, for labels;
    spans: named groups of neighbouring tokens: results are then per span instead of per position.
    Derived, all (pairs,): lengths, real tokens; starts and last, columns of the first and last real token;
    split, leading real tokens that both prompts share (the length when the prompts are identical).
    Raises TypeError or ValueError naming what does not fit; warns when a pair's prompts are identical.
    """

    @classmethod
    def from_text(
        cls,
        tokenizer: Tokenizer,
        *,
        clean: Sequence[str],
        corrupted: Sequence[str],
        answers: Sequence[str],
        wrong_answers: Sequence[str] | None = None,
        spans: Sequence[Mapping[str, Range | str]] | None = None,
        corrupted_spans: Sequence[Mapping[str, Range | str]] | None = None,
        padding_side: PaddingSide = "right",
        prepend_bos: bool | None = None,
    ) -> PromptPairs:
        """Tokenise prompts and answers; one string per pair in each list.

        An answer must be one token as it follows its clean prompt, so it usually starts with a space. BOS is put
        first where the tokenizer has one, and never twice; prepend_bos=False leaves it out, and True takes it even
        where the chat template uses it to open turns (as SmolLM2's `<|im_start|>`).
        spans: for each pair names of spans -> characters (first, end) of the clean prompt, or a text that stands there
        once; corrupted_spans: the same of the corrupted prompt, when they are others. A pair with spans may have
        prompts of different lengths; tokens outside all spans are not scored.
        Raises ValueError naming the pair: different token counts (both tokenisations are shown), empty prompt,
        an answer of several tokens, equal answers, words the tokenizer does not know, a span that is empty, overlaps
        another or cuts a token.
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
        both = None
        if spans is not None:
            both = [
                _ranges(side, texts, given)
                for side, texts, given in (
                    ("clean", clean, spans),
                    ("corrupted", corrupted, spans if corrupted_spans is None else corrupted_spans),
                )
            ]
        elif corrupted_spans is not None:
            raise ValueError("corrupted_spans need spans, got None")
        encoder = Encoder(tokenizer, prepend_bos)
        rows = encode_pairs(
            encoder, clean, corrupted, answers, wrong_answers, lambda i: f"pair {i}", both
        )
        return cls.from_encoded(all_encoded(rows), padding_side=padding_side)

    @classmethod
    def from_template(
        cls,
        tokenizer: Tokenizer,
        template: str,
        *,
        clean: Sequence[Mapping[str, str]],
        corrupted: Sequence[Mapping[str, str]],
        answers: Sequence[str],
        wrong_answers: Sequence[str] | None = None,
        padding_side: PaddingSide = "right",
        prepend_bos: bool | None = None,
    ) -> PromptPairs:
        """Prompts from a template such as "When {A} and {B} went out, {S} gave a drink to", scored by span.

        clean, corrupted: the fields' texts, one mapping per pair; each field is a span, and so is each text between two
        (named by itself, with a number behind it when it comes again). The rest is as in from_text.
        """
        return cls._from_spanned(
            tokenizer,
            [fill(template, fields, f"clean of pair {i}") for i, fields in enumerate(clean)],
            [
                fill(template, fields, f"corrupted of pair {i}")
                for i, fields in enumerate(corrupted)
            ],
            answers,
            wrong_answers,
            padding_side,
            prepend_bos,
        )

    @classmethod
    def from_chat(
        cls,
        tokenizer: Tokenizer,
        *,
        clean: Sequence[Sequence[Message]],
        corrupted: Sequence[Sequence[Message]],
        answers: Sequence[str],
        wrong_answers: Sequence[str] | None = None,
        padding_side: PaddingSide = "right",
    ) -> PromptPairs:
        """Prompts from messages by the tokenizer's own chat template, scored by turn.

        clean, corrupted: for each pair its messages, with role and content. A last message of the assistant is left
        open for the answer; otherwise the template's opening of the assistant's turn is a span of its own. Spans are
        named by role, with a number behind it when it comes again. The rest is as in from_text.
        """
        return cls._from_spanned(
            tokenizer,
            [turns(tokenizer, messages, f"clean of pair {i}") for i, messages in enumerate(clean)],
            [
                turns(tokenizer, messages, f"corrupted of pair {i}")
                for i, messages in enumerate(corrupted)
            ],
            answers,
            wrong_answers,
            padding_side,
            prepend_bos=False,  # the template writes what comes first
        )

    @classmethod
    def _from_spanned(
        cls,
        tokenizer: Tokenizer,
        clean: Sequence[SpannedText],
        corrupted: Sequence[SpannedText],
        answers: Sequence[str],
        wrong_answers: Sequence[str] | None,
        padding_side: PaddingSide,
        prepend_bos: bool | None,
    ) -> PromptPairs:
        return cls.from_text(
            tokenizer,
            clean=[prompt.text for prompt in clean],
            corrupted=[prompt.text for prompt in corrupted],
            answers=answers,
            wrong_answers=wrong_answers,
            spans=[prompt.spans for prompt in clean],
            corrupted_spans=[prompt.spans for prompt in corrupted],
            padding_side=padding_side,
            prepend_bos=prepend_bos,
        )

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
        spanned = [row.spans is not None for row in rows]
        if any(spanned) and not all(spanned):
            raise ValueError(
                f"spans must be given for all pairs or for none, got {sum(spanned)} of {len(rows)}"
            )
        positions = max(max(len(row.clean), len(row.corrupted)) for row in rows)

        def padded(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
            ids = torch.zeros(len(prompts), positions, dtype=torch.long)
            mask = torch.zeros(ids.shape, dtype=torch.bool)
            for i, prompt in enumerate(prompts):
                first = 0 if padding_side == "right" else positions - len(prompt)
                ids[i, first : first + len(prompt)] = torch.tensor(prompt)
                mask[i, first : first + len(prompt)] = True
            return ids, mask

        clean, mask = padded([row.clean for row in rows])
        corrupted, corrupted_mask = padded([row.corrupted for row in rows])
        return cls(
            clean,
            corrupted,
            torch.tensor([row.answer for row in rows]),
            torch.tensor(given) if given else None,
            attention_mask=mask,
            corrupted_attention_mask=corrupted_mask,
            tokens=[row.tokens for row in rows] if all(row.tokens for row in rows) else None,
            corrupted_tokens=(
                [row.corrupted_tokens for row in rows]
                if all(row.corrupted_tokens for row in rows)
                else None
            ),
            spans=(
                Spans.of(
                    [row.spans or {} for row in rows], [row.corrupted_spans or {} for row in rows]
                )
                if all(spanned)
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

        Ids are taken as they are, without BOS. `spans` and `corrupted_spans` may map names to [first, end): characters
        of a text (or a text that stands there once), tokens where ids are given; corrupted_spans may be left out where
        they are the same. Raises ValueError naming file and line, OSError if it cannot be read.
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
                real, other = self.attention_mask[i], self.corrupted_attention_mask[i]
                record: dict[str, Any] = {
                    "clean_ids": self.clean_ids[i][real].tolist(),
                    "corrupted_ids": self.corrupted_ids[i][other].tolist(),
                    "answer_ids": int(self.answer_ids[i]),
                }
                if self.wrong_answer_ids is not None:
                    record["wrong_answer_ids"] = int(self.wrong_answer_ids[i])
                if self.spans is not None:
                    record["spans"] = self.spans.named(i)
                    record["corrupted_spans"] = self.spans.named(i, corrupted=True)
                file.write(json.dumps(record) + "\n")


def _ranges(
    side: str, texts: Sequence[str], spans: Sequence[Mapping[str, Range | str]]
) -> list[dict[str, Range]]:
    if isinstance(spans, Mapping) or len(spans) != len(texts):
        raise ValueError(
            f"{side} spans must be a list of {len(texts)} mappings, one per pair, got {len(spans)} entries"
        )
    return [
        found_spans(f"{side} prompt of pair {i}", text, row)
        for i, (text, row) in enumerate(zip(texts, spans, strict=True))
    ]
