"""Texts with their spans, from a template with fields or from the turns of a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atp_fast.prompts.spans import Range

_FIELD = re.compile(r"{(\w+)}")
Message = Mapping[str, str]


class SpannedText(NamedTuple):
    """A prompt and the characters, first and one past the last, of its spans."""

    text: str
    spans: dict[str, Range]


def fill(template: str, fields: Mapping[str, str], where: str) -> SpannedText:
    """The template with every {field} replaced; each field is a span, and so is each text between two.

    A text between is named by itself, with " (2)" behind it when it comes again, as a field does. Raises ValueError for a
    template without a field, and for fields that are missing, left over or empty.
    """
    pieces = _FIELD.split(template)
    wanted = set(pieces[1::2])
    if not wanted:
        raise ValueError(f"template must hold a field such as {{name}}, got {template!r}")
    if set(fields) != wanted:
        raise ValueError(
            f"{where} must give the template's fields {sorted(wanted)}, got {sorted(fields)}"
        )
    text, spans = "", dict[str, Range]()
    for number, piece in enumerate(pieces):
        is_field = number % 2 == 1
        part = fields[piece] if is_field else piece
        if is_field and not (isinstance(part, str) and part.strip()):
            raise ValueError(f"{where} must give a text for {{{piece}}}, got {part!r}")
        if part.strip():
            spans[_free(spans, piece if is_field else part.strip())] = (
                len(text),
                len(text) + len(part),
            )
        text += part
    return SpannedText(text, spans)


def turns(tokenizer: Any, messages: Sequence[Message], where: str) -> SpannedText:
    """The chat template's text of some messages; each turn is a span, named by its role.

    A last message of the assistant is left open, so that the answer goes on with it; else the template's opening of
    the assistant's turn follows, a span of that name. Raises ValueError for a tokenizer without a chat template and for
    a template that writes earlier turns differently when later ones follow.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer must have a chat template, this one has none")
    messages = list(messages)
    if not messages or not all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise ValueError(f"{where} must be messages with role and content, got {messages!r}")

    def text(count: int, **options: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, **options))

    continued = messages[-1]["role"] == "assistant"
    whole = text(
        len(messages), **{"continue_final_message" if continued else "add_generation_prompt": True}
    )
    ends = [len(text(count)) for count in range(1, len(messages))]
    ends += [len(whole)] if continued else [len(text(len(messages))), len(whole)]
    names = [m["role"] for m in messages] + ([] if continued else ["assistant"])
    spans: dict[str, Range] = {}
    begin = 0
    for count, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
        if count <= len(messages) - continued and whole[:end] != text(count):
            raise ValueError(
                f"{where} cannot be cut into turns: the chat template writes message {count - 1} differently when "
                "more follow; give spans by characters instead"
            )
        if end > begin and whole[begin:end].strip():
            spans[_free(spans, name)] = (begin, end)
        begin = end
    return SpannedText(whole, spans)


def _free(taken: Mapping[str, Range], name: str) -> str:
    """The name, with a number behind it where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free
