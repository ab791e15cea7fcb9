"""From text to token ids: prompts with their BOS, answers that must be one token, pairs that must line up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from atp_fast.prompts.spans import Named, Range, token_spans


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every tokenizer of transformers has it."""

    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any
    unk_token_id: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def decode(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class EncodedPair:
    """One pair as token ids; wrong_answer is None where none was given; spans are ranges of tokens."""

    clean: list[int]
    corrupted: list[int]
    answer: int
    wrong_answer: int | None
    tokens: list[str]
    corrupted_tokens: list[str]
    spans: dict[str, Range] | None = None
    corrupted_spans: dict[str, Range] | None = None


class Encoder:
    """A tokenizer that puts BOS first, never twice, and appends nothing.

    prepend_bos=None: what the tokenizer itself puts first (`<s>`, `[gMASK]<sop>`), or else its BOS token (GPT-2 and
    Pythia have one and do not add it), unless the chat template uses that token to open turns, as `<|im_start|>`:
    plain text never starts with it. True: with such a token too. False: the bare text.
    """

    def __init__(self, tokenizer: Tokenizer, prepend_bos: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._text: dict[int, str] = {}
        self._alone: dict[str, list[int]] = {}
        self.prefix = [] if prepend_bos is False else self._prefix(prepend_bos is True)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        # Many tokenizers reuse BOS or EOS as padding or as "unknown"; only a token of its own marks unknown words.
        self.unknown = {
            i
            for i in (tokenizer.unk_token_id, tokenizer.pad_token_id)
            if i is not None and i not in ends
        }

    def _prefix(self, turn_marker_too: bool) -> list[int]:
        bare = list(self.tokenizer(["a"], add_special_tokens=False)["input_ids"][0])
        full = list(self.tokenizer(["a"], add_special_tokens=True)["input_ids"][0])
        for start in range(1, len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return []
        opens_turns = self.text(bos) in str(getattr(self.tokenizer, "chat_template", None) or "")
        return [] if opens_turns and not turn_marker_too else [int(bos)]

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any special token."""
        if not texts:
            return []
        return [
            list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        ]

    def with_prefix(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def alone(self, text: str) -> list[int]:
        if text not in self._alone:
            self._alone[text] = self.bare([text])[0]
        return self._alone[text]

    def text(self, token: int) -> str:
        if token not in self._text:
            self._text[token] = str(
                self.tokenizer.decode(
                    [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
        return self._text[token]

    def spans(self, where: str, text: str, ids: list[int], spans: Named) -> dict[str, Range]:
        """Token ranges of spans of characters of a text, whose bare ids are given; see spans.token_spans."""
        try:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError as error:
            raise ValueError(
                "spans need a tokenizer that knows its tokens' characters (a fast one of transformers)"
            ) from error
        first = len(self.with_prefix(ids)) - len(ids)
        return token_spans(where, text, found["offset_mapping"], first, spans)

    def texts(self, ids: Sequence[int]) -> list[str]:
        return [self.text(token) for token in ids]

    def answer_token(
        self, name: str, answer: str, prompt: str, prompt_ids: list[int], joint: list[int]
    ) -> int:
        """The one token of an answer: as it follows its prompt, or else as it stands alone.

        joint: ids of prompt + answer. ValueError, saying what the answer splits into, if it is not one token.
        """
        if not answer:
            raise ValueError(f"{name} must be one token, got an empty string")
        follows = joint[: len(prompt_ids)] == prompt_ids and len(joint) == len(prompt_ids) + 1
        ids = [joint[-1]] if follows and joint[-1] not in self.unknown else self.alone(answer)
        spaced = [] if answer[0].isspace() else self.alone(" " + answer)
        if len(ids) != 1:
            hint = (
                f"; {' ' + answer!r} is one token: write the leading space"
                if len(spaced) == 1
                else ""
            )
            raise ValueError(
                f"{name} must be one token, got {answer!r}, which splits into {self.texts(ids)}{hint}"
            )
        if ids[0] in self.unknown:
            raise ValueError(f"{name} must be a word the tokenizer knows, got {answer!r}")
        # After " to", the word "Mary" is a token that no model predicts: " Mary" is what was meant.
        if answer[0].isalpha() and prompt[-1].isalnum() and len(spaced) == 1 and spaced != ids:
            warnings.warn(
                f"{name} {answer!r} has no leading space, so it is another token than {' ' + answer!r}, "
                "which is what would follow the prompt",
                stacklevel=2,
            )
        return ids[0]


def encode_pairs(
    encoder: Encoder,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[str | int],
    wrong_answers: Sequence[str | int] | None,
    name: Callable[[int], str],
    spans: Sequence[Sequence[Named]] | None = None,
) -> list[EncodedPair | ValueError]:
    """Each pair encoded, or the ValueError that says why it cannot be.

    An answer given as an int is a token id already. name(i) is what errors call pair i; spans: for the clean and for the
    corrupted prompts, each prompt's spans of characters.
    """
    pairs = len(clean)
    ids = encoder.bare([*clean, *corrupted])
    wrongs: Sequence[str | int | None] = [None] * pairs if wrong_answers is None else wrong_answers
    given = [
        (i, a) for column in (answers, wrongs) for i, a in enumerate(column) if isinstance(a, str)
    ]
    joints = encoder.bare([clean[i] + answer for i, answer in given])
    joint = {(i, answer): tokens for (i, answer), tokens in zip(given, joints, strict=True)}

    def token(i: int, role: str, answer: str | int | None) -> int | None:
        if not isinstance(answer, str):
            return answer
        return encoder.answer_token(
            f"{role} of {name(i)}", answer, clean[i], ids[i], joint[i, answer]
        )

    def encode(i: int) -> EncodedPair:
        for side, text, tokens in (
            ("clean", clean[i], ids[i]),
            ("corrupted", corrupted[i], ids[pairs + i]),
        ):
            if not tokens:
                raise ValueError(f"{side} prompt of {name(i)} must not be empty, got {text!r}")
            if encoder.unknown.intersection(tokens):
                raise ValueError(
                    f"{side} prompt of {name(i)} must hold words the tokenizer knows, got {text!r}, "
                    f"which it reads as {encoder.texts(tokens)}"
                )
        one, other = encoder.with_prefix(ids[i]), encoder.with_prefix(ids[pairs + i])
        if spans is None and len(one) != len(other):
            raise ValueError(_mismatch(name(i), encoder.texts(one), encoder.texts(other)))
        answer, wrong = token(i, "answer", answers[i]), token(i, "wrong answer", wrongs[i])
        assert answer is not None
        if answer == wrong:
            raise ValueError(
                f"wrong answer of {name(i)} must differ from its answer, got {encoder.text(answer)!r} for both"
            )
        texts = encoder.texts(one), encoder.texts(other)
        if spans is None:
            return EncodedPair(one, other, answer, wrong, *texts)
        found = [
            encoder.spans(f"{side} prompt of {name(i)}", text, tokens, rows[i])
            for side, text, tokens, rows in (
                ("clean", clean[i], ids[i], spans[0]),
                ("corrupted", corrupted[i], ids[pairs + i], spans[1]),
            )
        ]
        if found[0].keys() != found[1].keys():
            raise ValueError(
                f"{name(i)} must have the same spans in both prompts, got {list(found[0])} and {list(found[1])}"
            )
        return EncodedPair(one, other, answer, wrong, *texts, *found)

    encoded: list[EncodedPair | ValueError] = []
    for i in range(pairs):
        try:
            encoded.append(encode(i))
        except ValueError as error:
            encoded.append(error)
    return encoded


def all_encoded(rows: Sequence[EncodedPair | ValueError]) -> list[EncodedPair]:
    """The pairs of encode_pairs; raises the first error among them."""
    pairs = []
    for row in rows:
        if isinstance(row, ValueError):
            raise row
        pairs.append(row)
    return pairs


def _mismatch(name: str, clean: list[str], corrupted: list[str]) -> str:
    """Both tokenisations around the first difference."""
    common = next(
        (i for i, (a, b) in enumerate(zip(clean, corrupted, strict=False)) if a != b), None
    )
    first = min(len(clean), len(corrupted)) if common is None else common
    around = slice(max(0, first - 2), first + 4)
    return (
        f"{name} must have as many tokens in the corrupted prompt as in the clean one, got {len(clean)} clean and "
        f"{len(corrupted)} corrupted; from token {around.start} on: clean {clean[around]}, "
        f"corrupted {corrupted[around]}; spans would say which tokens stand for which"
    )
