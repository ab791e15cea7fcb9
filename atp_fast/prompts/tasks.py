"""Built-in tasks: the paper's prompts (arXiv 2403.00745), greater-than and induction, for any tokenizer.

A task is a function (tokenizer, n_pairs=None, seed=0) -> PromptPairs, the same pairs for the same arguments. Where a
task has a phrasing for word-level tokenizers (which know few words and need spaces around punctuation), it comes
second and is taken when no pair of the first phrasing fits. Pairs that a tokenizer splits unevenly, or whose answer
it splits, are left out: a warning says how many, and ValueError if none is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, permutations, product
from random import Random

from atp_fast.prompts.encoding import EncodedPair, Encoder, Tokenizer, encode_pairs
from atp_fast.prompts.pair_files import year_answers
from atp_fast.prompts.pairs import PromptPairs

TextPair = tuple[str, str, str, str]
"""Clean prompt, corrupted prompt, answer, wrong answer."""

_IOI = (
    (
        "When {a} and {b} went to the bar, {s} gave a drink to",
        ("Michael", "Jessica", "Ashley", "Joshua", "David", "Sarah"),
    ),
    (
        "When {a} and {b} went to the store , {s} gave a drink to",
        ("James", "Sarah", "Anna", "John", "David", "Mary"),
    ),
)
_A_AN = (
    "I want one pear. Can you pick up a pear for me? I want one orange. Can you pick up an orange for me? "
    "I want one {}. Can you pick up"
)
_A_OBJECTS = "boat coat drum gun horn map menu pipe screw stamp tent wall".split()
_AN_OBJECTS = "apple ant axe award elephant egg orange oven onion umbrella".split()

_LASTED = "The {noun} lasted from the year {century}{space}"
_CENTURIES = (11, 12, 13, 14, 15, 16, 17)
_EVENTS = (
    "war siege plague reign drought voyage famine trial truce project campaign treaty contract marriage journey "
    "expedition rebellion dispute festival construction"
).split()

_WORDS = (
    "apple river stone paper garden window silver music winter summer bridge forest market doctor mother father "
    "table chair horse bread sugar water fire light night house road ship king queen gold snow rain wind moon "
    "star tree bird fish door"
).split()
_INDUCTION = (_WORDS, [f"w{i}" for i in range(40)])
_SEGMENT, _REPEATED = 8, 5

_FRAGMENT_TOKENS = 32
_FRAGMENTS = (
    "def read_rows(path, limit=None):\n    rows = []\n    with open(path) as handle:\n        for number, line in "
    "enumerate(handle):\n            if limit is not None and number >= limit:\n                break\n            "
    "rows.append(line.rstrip().split(','))\n    return rows\n",
    "We followed 214 patients for a median of eighteen months after surgery. Recurrence was less frequent in the "
    "group that received the lower dose, although the difference did not reach significance after adjustment for "
    "age and smoking.",
    "The lessee shall keep the premises in good repair, reasonable wear and tear excepted, and shall not assign this "
    "agreement or any interest in it without the prior written consent of the lessor, which shall not be withheld "
    "without cause.",
    "Melt the butter over a low flame, stir in the flour and let it foam without browning. Pour in the warm milk "
    "little by little, whisking all the while, then season with salt, pepper and a scrape of nutmeg before you add "
    "the cheese.",
    "Subject: Re: Thursday's meeting\n\nHi all, I can make it after three but not before, since the plumber is coming "
    "in the morning. Could somebody else bring the projector this time? Mine has been flickering since we moved "
    "offices last month.",
    "The lighthouse stands on a narrow spit of granite some four miles north of the harbour. Built in 1847 to replace "
    "an older wooden tower, it was automated in the 1970s, and its keepers' cottages now serve as a small museum of "
    "fishing.",
    "Let G be a finite group acting on a set X, and let x be a point of X. The stabilizer of x is a subgroup of G, and "
    "the map that sends a coset to the image of x is a bijection onto the orbit, from which the counting formula "
    "follows at once.",
    "Anyone else having trouble with the rear derailleur on this bike? Mine shifts fine in the stand, but under load "
    "it keeps jumping between the third and fourth cog. I have already replaced the cable and checked that the hanger "
    "is straight.",
    "The visitors scored twice in the last ten minutes to take the match, after the home side had spent most of the "
    "second half defending a single goal lead with ten men. Their manager refused to comment on the referee when "
    "asked about it afterwards.",
    "2019-03-02 04:11:57 WARN scheduler: worker 7 missed two heartbeats, marking as suspect\n2019-03-02 04:12:03 INFO "
    "scheduler: worker 7 is back, resuming queue 'thumbnails' at offset 18842\n2019-03-02 04:12:04 INFO storage: "
    "compaction finished",
    "She put the lamp down on the sill and listened. Nothing moved in the yard but the old dog, who turned once about "
    "himself and lay down again with a sigh. Whoever had knocked was either gone already or standing very still "
    "beneath the eaves.",
    "Q: What is the difference between a stack and a queue?\nA: In a stack the element that was added last is removed "
    "first, like plates in a pile, while in a queue the element that was added first is removed first, like people "
    "waiting at a counter.",
)


def city(tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0) -> PromptPairs:
    """The paper's single pair: "City: Barcelona\\nCountry:" against Beijing."""
    pair = ("City: Barcelona\nCountry:", "City: Beijing\nCountry:", " Spain", " China")
    return _all_of("city", tokenizer, ([pair],), n_pairs, seed)


def ioi_pair(tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0) -> PromptPairs:
    """The paper's single IOI pair: Michael and Jessica, Ashley in the corrupted prompt."""
    phrasings = [[_ioi_pair(template, *names[:3])] for template, names in _IOI]
    return _all_of("ioi_pair", tokenizer, phrasings, n_pairs, seed)


def ioi(tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0) -> PromptPairs:
    """The paper's IOI distribution: all 120 choices of three among six names, or n_pairs of them."""
    phrasings = [
        [_ioi_pair(template, *chosen) for chosen in permutations(names, 3)]
        for template, names in _IOI
    ]
    return _all_of("ioi", tokenizer, phrasings, n_pairs, seed)


def a_an(tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0) -> PromptPairs:
    """The paper's A-AN distribution: 12 objects with "a" against 10 with "an", or n_pairs of those 120."""
    pairs = [
        (_A_AN.format(clean), _A_AN.format(corrupted), " a", " an")
        for clean, corrupted in product(_A_OBJECTS, _AN_OBJECTS)
    ]
    return _all_of("a_an", tokenizer, (pairs,), n_pairs, seed)


def greater_than(tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0) -> PromptPairs:
    """A war "lasted from the year 1732 to the year 17", in the corrupted prompt from 1701; 32 pairs by default.

    The answer is the first token of a later year, the wrong answer that of an earlier one: two digits, or the tens
    where the tokenizer writes each digit apart. Only years that the tokenizer splits like 1701 are used.
    """
    encoder = Encoder(tokenizer)
    phrasings = [
        _greater_than(encoder, "", 1, _EVENTS, _CENTURIES, Random(seed)),
        _greater_than(encoder, " ", 2, ["war"], (17,), Random(seed)),
    ]
    return _drawn("greater_than", phrasings, 32 if n_pairs is None else n_pairs)


def induction(tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0) -> PromptPairs:
    """Eight random words and the first five of them again: the answer is the sixth; 32 pairs by default.

    In the corrupted prompt the sixth word is another one, the wrong answer.
    """
    encoder = Encoder(tokenizer)
    return _drawn(
        "induction",
        [_induction(encoder, words, Random(seed)) for words in _INDUCTION],
        32 if n_pairs is None else n_pairs,
    )


def random(tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0) -> PromptPairs:
    """Unrelated fragments of prose, code and records, 32 tokens each (and BOS); one pair by default.

    The answer is the token that follows the clean fragment, the wrong answer the one that follows the corrupted.
    """
    encoder = Encoder(tokenizer)
    ids = encoder.bare(_FRAGMENTS)
    if any(encoder.unknown.intersection(fragment) for fragment in ids):
        raise ValueError(
            "task 'random' must have a tokenizer that knows all words of its fragments, got one that does not"
        )
    rows = []
    for clean, corrupted in permutations(ids, 2):
        answer, wrong = clean[_FRAGMENT_TOKENS], corrupted[_FRAGMENT_TOKENS]
        if answer != wrong:
            one, other = (encoder.with_prefix(x[:_FRAGMENT_TOKENS]) for x in (clean, corrupted))
            rows.append(
                EncodedPair(one, other, answer, wrong, encoder.texts(one), encoder.texts(other))
            )
    return PromptPairs.from_encoded(
        _sample("random", rows, 1 if n_pairs is None else n_pairs, seed)
    )


Task = Callable[[Tokenizer, int | None, int], PromptPairs]
TASKS: dict[str, Task] = {
    "city": city,
    "ioi_pair": ioi_pair,
    "ioi": ioi,
    "a_an": a_an,
    "greater_than": greater_than,
    "induction": induction,
    "random": random,
}


def load_task(
    name: str, tokenizer: Tokenizer, n_pairs: int | None = None, seed: int = 0
) -> PromptPairs:
    """The pairs of a task by name; n_pairs=None takes the task's own number.

    Raises ValueError for an unknown name, for more pairs than the task has, and if none fits the tokenizer.
    """
    if name not in TASKS:
        raise ValueError(f"task must be among {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](tokenizer, n_pairs, seed)


def _ioi_pair(template: str, a: str, b: str, c: str) -> TextPair:
    clean, corrupted = (template.format(a=a, b=b, s=subject) for subject in (a, c))
    return clean, corrupted, f" {b}", f" {a}"


def _all_of(
    task: str,
    tokenizer: Tokenizer,
    phrasings: Sequence[Sequence[TextPair]],
    n_pairs: int | None,
    seed: int,
) -> PromptPairs:
    """The pairs of the first phrasing of which some fit, or n_pairs of them."""
    encoder = Encoder(tokenizer)
    failures: list[str] = []
    for pairs in phrasings:
        clean, corrupted, answers, wrongs = (list(column) for column in zip(*pairs, strict=True))
        rows = encode_pairs(encoder, clean, corrupted, answers, wrongs, lambda i: f"pair {i}")
        fitting = [row for row in rows if isinstance(row, EncodedPair)]
        failed = [str(row) for row in rows if isinstance(row, ValueError)]
        if not fitting:
            failures.append(failed[0])
            continue
        if failed:
            warnings.warn(
                f"task {task!r}: {len(failed)} of {len(rows)} pairs do not fit this tokenizer and are left out "
                f"({failed[0]})",
                stacklevel=3,
            )
        return PromptPairs.from_encoded(_sample(task, fitting, n_pairs, seed))
    raise ValueError(f"task {task!r} has no pair that fits this tokenizer: {failures[0]}")


def _sample(
    task: str, rows: Sequence[EncodedPair], n_pairs: int | None, seed: int
) -> Sequence[EncodedPair]:
    if n_pairs is None:
        return rows
    if not 1 <= n_pairs <= len(rows):
        raise ValueError(
            f"n_pairs must be in [1, {len(rows)}], the pairs of task {task!r} that fit this tokenizer, got {n_pairs}"
        )
    return [rows[i] for i in sorted(Random(seed).sample(range(len(rows)), n_pairs))]


def _drawn(
    task: str, phrasings: Sequence[Iterator[EncodedPair | ValueError]], n_pairs: int
) -> PromptPairs:
    """The first n_pairs different pairs that fit, of the first phrasing that has some among its first 100."""
    if n_pairs < 1:
        raise ValueError(f"n_pairs must be at least 1, got {n_pairs}")
    reason = ""
    for drawn in phrasings:
        rows: dict[tuple[int, ...], EncodedPair] = {}
        for tries, row in enumerate(islice(drawn, 100 + 20 * n_pairs)):
            if isinstance(row, EncodedPair):
                rows.setdefault((*row.clean, *row.corrupted), row)
                if len(rows) == n_pairs:
                    return PromptPairs.from_encoded(list(rows.values()))
            else:
                reason = reason or str(row)
                if tries >= 100 and not rows:
                    break
        if rows:
            raise ValueError(
                f"n_pairs must be at most {len(rows)}, the pairs of task {task!r} found for this tokenizer, "
                f"got {n_pairs}"
            )
    raise ValueError(f"task {task!r} has no pair that fits this tokenizer: {reason}")


def _greater_than(
    encoder: Encoder,
    space: str,
    corrupted_year: int,
    nouns: Sequence[str],
    centuries: Sequence[int],
    rng: Random,
) -> Iterator[EncodedPair | ValueError]:
    while True:
        noun, century, year = (
            rng.choice(nouns),
            rng.choice(centuries),
            rng.randint(corrupted_year + 1, 98),
        )
        start = _LASTED.format(noun=noun, century=century, space=space)
        clean, corrupted = (f"{start}{y:02d} to the year {century}" for y in (year, corrupted_year))
        head, *whole = encoder.bare([start.rstrip(), clean, corrupted])
        try:
            if any(ids[: len(head)] != head for ids in whole):
                raise ValueError(
                    f"the tokenizer does not split {century}{year:02d} after {century}"
                )
            answer, wrong = year_answers(encoder, clean, year, repr(clean))
        except ValueError as error:
            yield error
            continue
        yield from encode_pairs(
            encoder, [clean], [corrupted], [answer], [wrong], lambda _: "the pair"
        )


def _induction(
    encoder: Encoder, words: Sequence[str], rng: Random
) -> Iterator[EncodedPair | ValueError]:
    while True:
        *segment, other = rng.sample(words, _SEGMENT + 1)
        changed = [*segment[:_REPEATED], other, *segment[_REPEATED + 1 :]]
        clean, corrupted = (" ".join(first + segment[:_REPEATED]) for first in (segment, changed))
        answer, wrong = f" {segment[_REPEATED]}", f" {other}"
        yield from encode_pairs(
            encoder, [clean], [corrupted], [answer], [wrong], lambda _: "the pair"
        )
