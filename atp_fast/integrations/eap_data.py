"""MIB's data sets: rows as they come from the hub's `mib-bench/*`, as prompt pairs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from atp_fast.prompts.encoding import EncodedPair, Encoder, Tokenizer, encode_pairs
from atp_fast.prompts.pairs import PaddingSide, PromptPairs

COUNTERFACTUALS = {
    "ioi": "s2_io_flip_counterfactual",
    "mcqa": "symbol_counterfactual",
    "arithmetic-addition": "random_counterfactual",
    "arithmetic-subtraction": "random_counterfactual",
    "arc-easy": "symbol_counterfactual",
    "arc-challenge": "symbol_counterfactual",
}
"""MIB's tasks, as its folders name them, and the column that each takes its corrupted prompts from."""

DATA_SETS = {task: task.replace("-", "_") for task in COUNTERFACTUALS} | {
    "mcqa": "copycolors_mcqa"  # the configuration 4_answer_choices
}
"""Names of the data sets under `mib-bench/`."""


class _Words(NamedTuple):
    """A row's prompts, its answers as texts, and further texts that must have as many tokens as the answer."""

    clean: str
    corrupted: str
    answer: str
    wrong: str
    alike: tuple[str, ...] = ()


def pairs_from_mib(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    task: str,
    *,
    counterfactual: str | None = None,
    padding_side: PaddingSide = "right",
    prepend_bos: bool | None = None,
) -> PromptPairs:
    """Pairs from the rows of one of MIB's data sets, by MIB's own rules.

    rows: mappings with the data set's columns (`datasets.load_dataset("mib-bench/ioi", split="train")` gives them); task:
    a key of COUNTERFACTUALS; counterfactual: another column with corrupted prompts. The answers are the first tokens of
    the texts that MIB compares (without BOS); rows are left out where MIB leaves them out (its answers differ in their
    number of tokens, or it has no counterfactual), where both answers are one token, and where the two prompts have
    different numbers of tokens, which MIB would compare out of step; a warning counts the last two.
    Raises ValueError for another task, a row without a column that the task needs, or when no row is left.
    """
    task = task.replace("_", "-")
    if task not in COUNTERFACTUALS:
        raise ValueError(f"task must be among {', '.join(COUNTERFACTUALS)}, got {task!r}")
    column = counterfactual or COUNTERFACTUALS[task]
    encoder = Encoder(tokenizer, prepend_bos)
    clean, corrupted, answers, wrongs, places = [], [], [], [], []
    number = -1
    for number, row in enumerate(rows):
        try:
            words = _words(row, task, column)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"row {number} must have the columns of mib-bench/{DATA_SETS[task]} ({column} among them), got {error!r}"
            ) from error
        if words is None or not _comparable(encoder, words, task):
            continue
        clean.append(words.clean)
        corrupted.append(words.corrupted)
        answers.append(encoder.alone(words.answer)[0])
        wrongs.append(encoder.alone(words.wrong)[0])
        places.append(f"row {number}")
    encoded = encode_pairs(encoder, clean, corrupted, answers, wrongs, lambda i: places[i])
    kept = [row for row in encoded if isinstance(row, EncodedPair)]
    refused = [row for row in encoded if isinstance(row, ValueError)]
    if not kept:
        why = f" ({refused[0]})" if refused else ""
        raise ValueError(
            f"rows must hold a pair that task {task!r} can use, got {number + 1} rows{why}"
        )
    if refused:
        warnings.warn(
            f"{len(refused)} of {len(encoded)} rows are left out: {refused[0]}", stacklevel=2
        )
    return PromptPairs.from_encoded(kept, padding_side=padding_side)


def _words(row: Mapping[str, Any], task: str, column: str) -> _Words | None:
    """What MIB reads of a row; None for a row that it leaves out."""
    if task == "ioi":
        names = row["metadata"]
        answer, wrong, third = (
            f" {names[name]}" for name in ("indirect_object", "subject", "random_c")
        )
        return _Words(row["prompt"], row[column]["prompt"], answer, wrong, (wrong, third))
    other = row[column]
    if task.startswith("arithmetic"):
        operator = "-" if task.endswith("subtraction") else "+"
        if other is None or other["prompt"] is None or row["operator"] != operator:
            return None
        return _Words(row["prompt"], other["prompt"], str(row["label"]), str(other["label"]))
    answer, wrong = (str(x["choices"]["label"][x["answerKey"]]) for x in (row, other))
    return _Words(row["prompt"], other["prompt"], answer, wrong, (wrong,))


def _comparable(encoder: Encoder, words: _Words, task: str) -> bool:
    """Whether MIB takes the row: an arithmetic answer is one token, other answers have as many tokens as each other."""
    length = len(encoder.alone(words.answer))
    if task.startswith("arithmetic"):
        return length == len(encoder.alone(words.wrong)) == 1
    return length > 0 and all(len(encoder.alone(text)) == length for text in words.alike)
