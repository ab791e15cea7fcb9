"""Reading pairs from files: JSON lines, and EAP-IG's CSV."""

from __future__ import annotations

import csv
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atp_fast.prompts.encoding import EncodedPair, Encoder, all_encoded, encode_pairs
from atp_fast.prompts.spans import Named, Range, found_spans


def read_jsonl(path: str | os.PathLike[str], encoder: Encoder) -> list[EncodedPair]:
    """The pairs of a JSON lines file; see PromptPairs.from_jsonl for its fields and errors."""
    records: list[tuple[str, dict[str, Any]]] = []
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                where = f"{path} line {number}"
                records.append((where, _record(where, line)))
    texts = [i for i, (_, record) in enumerate(records) if "clean_ids" not in record]
    rows: list[EncodedPair | ValueError] = []
    if texts:
        chosen = [records[i][1] for i in texts]
        given = [record["wrong_answer"] for record in chosen if "wrong_answer" in record]
        if given and len(given) != len(chosen):
            where = next(records[i][0] for i in texts if "wrong_answer" not in records[i][1])
            raise ValueError(f"{where} must have a wrong_answer as other lines have")
        rows = encode_pairs(
            encoder,
            [record["clean"] for record in chosen],
            [record["corrupted"] for record in chosen],
            [record["answer"] for record in chosen],
            given or None,
            lambda i: records[texts[i]][0],
            _text_spans([records[i] for i in texts]),
        )
    encoded = dict(zip(texts, all_encoded(rows), strict=True))
    if not records:
        raise ValueError(f"{path} must hold at least one pair, got an empty file")
    return [
        encoded[i] if i in encoded else _encoded_ids(where, record, encoder)
        for i, (where, record) in enumerate(records)
    ]


def _text_spans(records: Sequence[tuple[str, dict[str, Any]]]) -> list[list[Named]] | None:
    """Spans of characters of the clean and the corrupted texts, None where no line has any."""
    given = [where for where, record in records if "spans" in record]
    if not given:
        return None
    if len(given) != len(records):
        where = next(where for where, record in records if "spans" not in record)
        raise ValueError(f"{where} must have spans as other lines have")
    return [
        [
            found_spans(f"{side} prompt of {where}", record[side], _spans_of(record, side))
            for where, record in records
        ]
        for side in ("clean", "corrupted")
    ]


def _spans_of(record: Mapping[str, Any], side: str) -> Any:
    return record.get("corrupted_spans" if side == "corrupted" else "spans", record["spans"])


def read_csv(path: str | os.PathLike[str], encoder: Encoder) -> list[EncodedPair]:
    """The pairs of an EAP-IG CSV file; see PromptPairs.from_csv for its columns and errors."""
    clean, corrupted, places = [], [], []
    answers: list[str | int] = []
    wrongs: list[str | int] = []
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_lines(file, path))
        fields = set(reader.fieldnames or ())
        by_ids = {"correct_idx", "incorrect_idx"} <= fields
        if not {"clean", "corrupted"} <= fields or not (by_ids or "label" in fields):
            raise ValueError(
                f"{path} must have columns clean, corrupted and correct_idx, incorrect_idx or label, "
                f"got {', '.join(reader.fieldnames or ()) or 'none'}"
            )
        for row in reader:
            where = f"{path} line {reader.line_num}"
            needed = (
                "clean",
                "corrupted",
                *(("correct_idx", "incorrect_idx") if by_ids else ("label",)),
            )
            for field in needed:
                if not row[field]:
                    raise ValueError(f"{where} must have a value for {field}, got none")
            if by_ids:
                pair: tuple[str | int, ...] = (
                    _csv_id(where, "correct_idx", row["correct_idx"]),
                    _csv_id(where, "incorrect_idx", row["incorrect_idx"]),
                )
            elif row["label"].strip().isdigit():
                pair = year_answers(encoder, row["clean"], int(row["label"]), where)
            else:
                pair = (row["label"],)
            clean.append(row["clean"])
            corrupted.append(row["corrupted"])
            answers.append(pair[0])
            wrongs.extend(pair[1:])
            places.append(where)
    if not places:
        raise ValueError(f"{path} must hold at least one pair, got none")
    if wrongs and len(wrongs) != len(answers):
        raise ValueError(f"{path} must have labels of one kind: years or answers, got both")
    if by_ids and "corrupted_hard" in fields:
        _check_ioi_answers(path, encoder, clean, answers)
    rows = encode_pairs(encoder, clean, corrupted, answers, wrongs or None, lambda i: places[i])
    return all_encoded(rows)


def year_answers(encoder: Encoder, prompt: str, year: int, name: str) -> tuple[int, int]:
    """First tokens of a year halfway to 99 and of one halfway to 0, after a prompt that ends in the century.

    year: the prompt's own two digits. ValueError if the prompt is no greater-than prompt, or if the tokenizer's
    first tokens (some write each digit apart) do not tell the three years apart.
    """
    if not re.search(r"\d\d\s*$", prompt):
        raise ValueError(
            f"{name}: a number as label needs a prompt that ends in a century, got {prompt!r}; give correct_idx and "
            "incorrect_idx instead"
        )
    texts = [f"{y:02d}" for y in (year, (year + 100) // 2, year // 2)]
    bare, *joint = encoder.bare([prompt, *(prompt + text for text in texts)])
    split = [
        ids[len(bare)]
        if ids[: len(bare)] == bare and len(ids) > len(bare)
        else encoder.alone(text)[0]
        for text, ids in zip(texts, joint, strict=True)
    ]
    first = [encoder.text(token).strip() for token in split]
    comparable = all(text.isdigit() for text in first) and len({len(text) for text in first}) == 1
    if not comparable or not int(first[2]) < int(first[0]) < int(first[1]):
        raise ValueError(
            f"{name} must have a year that the tokenizer tells from later and earlier ones, got {year:02d}: first "
            f"tokens of {texts} are {first}"
        )
    return split[1], split[2]


def _lines(file: Iterator[str], path: str | os.PathLike[str]) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got a byte that is not: {error}") from error


def _record(where: str, line: str) -> dict[str, Any]:
    """One line of a JSONL file, with its fields' presence and types checked."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} must be a JSON object, got {line.strip()[:80]!r} ({error.msg})"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {line.strip()[:80]!r}")
    if "clean_ids" in record:
        return record
    for field in ("clean", "corrupted", "answer"):
        if field not in record:
            raise ValueError(
                f"{where} must have clean, corrupted and answer (or their _ids), got no {field}"
            )
    for field in ("clean", "corrupted", "answer", "wrong_answer"):
        if field in record and not isinstance(record[field], str):
            raise ValueError(f"{where}: {field} must be a string, got {record[field]!r}")
    return record


def _encoded_ids(where: str, record: Mapping[str, Any], encoder: Encoder) -> EncodedPair:
    def ids(field: str) -> list[int]:
        value = record.get(field)
        values = [value] if isinstance(value, int) and "answer" in field else value
        if (
            not isinstance(values, list)
            or not values
            or not all(type(i) is int and i >= 0 for i in values)
        ):
            raise ValueError(f"{where}: {field} must be a list of token ids, got {value!r}")
        if "answer" in field and len(values) != 1:
            raise ValueError(f"{where}: {field} must be one token, got {value!r}")
        return values

    clean, corrupted, answer = ids("clean_ids"), ids("corrupted_ids"), ids("answer_ids")[0]
    wrong = ids("wrong_answer_ids")[0] if "wrong_answer_ids" in record else None
    if len(clean) != len(corrupted) and "spans" not in record:
        raise ValueError(
            f"{where}: corrupted_ids must have as many tokens as clean_ids, got {len(clean)} clean and "
            f"{len(corrupted)} corrupted"
        )
    if answer == wrong:
        raise ValueError(
            f"{where}: wrong_answer_ids must differ from answer_ids, got {answer} for both"
        )
    pair = EncodedPair(
        clean, corrupted, answer, wrong, encoder.texts(clean), encoder.texts(corrupted)
    )
    if "spans" not in record:
        return pair
    spans, others = (
        _token_ranges(f"{side} prompt of {where}", _spans_of(record, side))
        for side in ("clean", "corrupted")
    )
    if spans.keys() != others.keys():
        raise ValueError(
            f"{where} must have the same spans in both prompts, got {list(spans)} and {list(others)}"
        )
    return replace(pair, spans=spans, corrupted_spans=others)


def _token_ranges(where: str, spans: Any) -> dict[str, Range]:
    """Spans of token ids: two whole numbers each; whether they fit their prompt is checked with all pairs."""
    if not isinstance(spans, dict) or not all(
        isinstance(r, list) and len(r) == 2 and all(type(i) is int for i in r)
        for r in spans.values()
    ):
        raise ValueError(
            f"spans of the {where} must map names to two tokens [first, end), got {spans!r}"
        )
    return {name: (first, end) for name, (first, end) in spans.items()}


def _csv_id(where: str, field: str, value: str) -> int:
    if not value.strip().isdigit():
        raise ValueError(f"{where}: {field} must be a token id, got {value!r}")
    return int(value)


def _check_ioi_answers(
    path: str | os.PathLike[str],
    encoder: Encoder,
    clean: Sequence[str],
    answers: Sequence[str | int],
) -> None:
    texts = [encoder.text(int(token)).strip() for token in answers]
    foreign = [i for i, text in enumerate(texts) if not text or text not in clean[i]]
    if foreign:
        i = foreign[0]
        warnings.warn(
            f"{path}: {len(foreign)} of {len(clean)} answers are not in their prompts under this tokenizer (token "
            f"{answers[i]} is {texts[i]!r} for {clean[i]!r}): was the file made for another tokenizer?",
            stacklevel=4,
        )
