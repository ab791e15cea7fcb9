"""Prompt pairs: what is derived from the mask, what text becomes, and what each bad input is told."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_fast import PromptPairs
from tokenizers_for_tests import bpe, word_level

IOI = "When Michael and Jessica went to the bar, {} gave a drink to"


@pytest.fixture(scope="module")
def tokenizer():
    return bpe()


def ids(*rows):
    return torch.tensor(rows)


def ioi(tokenizer, **changes):
    arguments = {
        "clean": [IOI.format("Michael")],
        "corrupted": [IOI.format("Ashley")],
        "answers": [" Jessica"],
        "wrong_answers": [" Michael"],
    }
    return PromptPairs.from_text(tokenizer, **(arguments | changes))


@st.composite
def padded(draw):
    """Rows of real tokens with padding on either side, and the same rows as plain lists."""
    width = draw(st.integers(1, 7))
    rows, clean, corrupted, mask = [], [], [], []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, width))
        start = draw(st.integers(0, width - length))
        one = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
        other = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
        after = width - length - start
        rows.append((start, one, other))
        # what stands in the padding must not matter, so it differs between the two prompts
        clean.append([7] * start + one + [8] * after)
        corrupted.append([9] * start + other + [6] * after)
        mask.append([0] * start + [1] * length + [0] * after)
    return rows, ids(*clean), ids(*corrupted), ids(*mask)


@settings(max_examples=60, deadline=None)
@given(padded())
def test_derived_fields_and_right_padding_equal_plain_python(case):
    rows, clean, corrupted, mask = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = PromptPairs(clean, corrupted, torch.arange(len(rows)), attention_mask=mask)
    moved = pairs.right_padded()
    longest = max(len(one) for _, one, _ in rows)
    assert moved.clean_ids.shape == (len(rows), longest)
    for i, (start, one, other) in enumerate(rows):
        split = next((j for j in range(len(one)) if one[j] != other[j]), len(one))
        derived = [int(x[i]) for x in (pairs.lengths, pairs.starts, pairs.last, pairs.split)]
        assert derived == [len(one), start, start + len(one) - 1, split]
        assert moved.clean_ids[i].tolist() == one + [0] * (longest - len(one))
        assert moved.corrupted_ids[i].tolist() == other + [0] * (longest - len(one))
        assert (int(moved.starts[i]), int(moved.lengths[i])) == (0, len(one))
    assert moved.split.tolist() == pairs.split.tolist()
    assert moved.digest() == pairs.digest()


def test_digest_depends_on_every_id_and_not_on_the_layout():
    clean, corrupted, answer, wrong = (
        ids([5, 6, 7]),
        ids([5, 8, 7]),
        torch.tensor([1]),
        torch.tensor([2]),
    )
    base = PromptPairs(clean, corrupted, answer, wrong)
    wider = PromptPairs(
        ids([9, 9, 5, 6, 7]),
        ids([0, 0, 5, 8, 7]),
        answer,
        wrong,
        attention_mask=ids([0, 0, 1, 1, 1]),
    )
    assert wider.digest() == base.digest()
    others = [
        PromptPairs(ids([5, 6, 6]), corrupted, answer, wrong),
        PromptPairs(clean, ids([5, 8, 8]), answer, wrong),
        PromptPairs(clean, corrupted, torch.tensor([3]), wrong),
        PromptPairs(clean, corrupted, answer, torch.tensor([3])),
        PromptPairs(clean, corrupted, answer),
        PromptPairs(corrupted, clean, answer, wrong),
        PromptPairs.concat([base, base]),
    ]
    assert len({pairs.digest() for pairs in (base, *others)}) == 1 + len(others)


def test_indexing_keeps_all_fields_together():
    pairs = PromptPairs(
        ids([1, 2], [3, 4], [5, 6]),
        ids([1, 3], [3, 5], [5, 7]),
        torch.tensor([10, 11, 12]),
        torch.tensor([20, 21, 22]),
        tokens=[["a", "b"], ["c", "d"], ["e", "f"]],
        corrupted_tokens=[["a", "B"], ["c", "D"], ["e", "F"]],
    )
    for index in ([2, 0], torch.tensor([2, 0]), slice(None, None, 2)):
        some = pairs[index]
        order = [0, 2] if isinstance(index, slice) else [2, 0]
        assert some.clean_ids.tolist() == [pairs.clean_ids[i].tolist() for i in order]
        assert some.corrupted_ids.tolist() == [pairs.corrupted_ids[i].tolist() for i in order]
        assert some.answer_ids.tolist() == [10 + i for i in order]
        assert some.wrong_answer_ids.tolist() == [20 + i for i in order]
        assert some.tokens == [pairs.tokens[i] for i in order]
        assert some.corrupted_tokens == [pairs.corrupted_tokens[i] for i in order]
    assert pairs[torch.tensor([False, True, False])].answer_ids.tolist() == [11]
    assert len(pairs[-1]) == 1
    assert [p.answer_ids.item() for p in pairs] == [10, 11, 12]
    assert PromptPairs.concat(list(pairs)).digest() == pairs.digest()
    with pytest.raises(IndexError, match=r"index must be in \[0, 3\), got 3"):
        pairs[3]
    with pytest.raises(ValueError, match="at least one pair"):
        pairs[[]]


def test_swapped_exchanges_prompts_and_keeps_answers():
    pairs = PromptPairs(
        ids([1, 2]),
        ids([1, 3]),
        torch.tensor([4]),
        torch.tensor([5]),
        tokens=[["a", "b"]],
        corrupted_tokens=[["a", "c"]],
    )
    swapped = pairs.swapped()
    assert (swapped.clean_ids.tolist(), swapped.corrupted_ids.tolist()) == ([[1, 3]], [[1, 2]])
    assert (swapped.answer_ids.item(), swapped.wrong_answer_ids.item()) == (4, 5)
    assert swapped.tokens == [["a", "c"]]
    assert swapped.swapped().digest() == pairs.digest()


def test_concat_of_different_widths_pads_on_the_right():
    short = PromptPairs(ids([1, 2]), ids([1, 3]), torch.tensor([4]), tokens=[["a", "b"]])
    left = PromptPairs(
        ids([0, 5, 6, 7]), ids([0, 5, 6, 8]), torch.tensor([9]), attention_mask=ids([0, 1, 1, 1])
    )
    both = PromptPairs.concat([short, left])
    assert both.clean_ids.tolist() == [[1, 2, 0, 0], [5, 6, 7, 0]]
    assert both.attention_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert both.tokens is None
    with_wrong = PromptPairs(ids([1]), ids([2]), torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(ValueError, match="all have wrong answers, or none"):
        PromptPairs.concat([short, with_wrong])


def test_column_tokens_are_shown_where_the_pairs_agree():
    pairs = PromptPairs(
        ids([1, 2, 0], [1, 3, 4]),
        ids([1, 3, 0], [1, 2, 4]),
        torch.tensor([1, 2]),
        attention_mask=ids([1, 1, 0], [1, 1, 1]),
        tokens=[["a", "b"], ["a", "c", "d"]],
    )
    assert pairs.column_tokens() == ["a", "·", "d"]
    assert pairs[0].column_tokens() == ["a", "b", "·"]
    assert PromptPairs(ids([1]), ids([2]), torch.tensor([1])).column_tokens() is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_column_tokens_and_files_of_ragged_pairs(tokenizer, tmp_path, side):
    """Labels stand above their own columns; a file gives back ids, padding on the side asked for, and labels."""
    clean = ["Mary and John went", "John went", "John and Mary went"]
    corrupted = [text.replace("went", "gave") for text in clean]
    pairs = PromptPairs.from_text(
        tokenizer, clean=clean, corrupted=corrupted, answers=[" to"] * 3, padding_side=side
    )
    rows = [
        [tokenizer.decode([i]) for i in pairs.clean_ids[r][pairs.attention_mask[r]]]
        for r in range(3)
    ]
    width = max(map(len, rows))
    ends = [width - len(row) if side == "left" else 0 for row in rows]
    seen = [
        {row[c - e] for row, e in zip(rows, ends, strict=True) if 0 <= c - e < len(row)}
        for c in range(width)
    ]
    assert pairs.column_tokens() == [texts.pop() if len(texts) == 1 else "·" for texts in seen]
    for row, texts in enumerate(rows):
        assert pairs.tokens[row] == texts
        pad = [""] * (width - len(texts))
        shown = pairs[row].column_tokens()
        assert [t for t in shown if t != "·"] == texts
        assert shown.index(texts[0]) == ends[row]
        assert len(shown) == len(texts) + len(pad)
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    back = PromptPairs.from_jsonl(tmp_path / "pairs.jsonl", tokenizer, padding_side=side)
    for name in ("clean_ids", "corrupted_ids", "answer_ids", "attention_mask"):
        assert torch.equal(getattr(back, name), getattr(pairs, name)), name
    assert back.tokens == pairs.tokens
    assert back.column_tokens() == pairs.column_tokens()


def test_identical_prompts_warn_once_and_name_the_pairs():
    clean, corrupted = ids([1, 2], [3, 4], [5, 6]), ids([1, 2], [3, 5], [5, 6])
    with pytest.warns(UserWarning, match=r"identical in 2 of 3 pairs \(0, 2\)"):
        pairs = PromptPairs(clean, corrupted, torch.tensor([1, 1, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pairs[[0, 1]].swapped().right_padded().split.tolist() == [2, 1]


OK = {"clean_ids": ids([1, 2]), "corrupted_ids": ids([1, 3]), "answer_ids": torch.tensor([4])}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"clean_ids": [[1, 2]]}, TypeError, "clean_ids must be a tensor of token ids, got list"),
        (
            {"clean_ids": torch.ones(1, 2)},
            TypeError,
            "clean_ids must hold integers, got torch.float32",
        ),
        (
            {"clean_ids": ids(1, 2)},
            ValueError,
            r"clean_ids must be \(pairs, positions\), got shape \(2,\)",
        ),
        (
            {"clean_ids": torch.zeros(1, 0, dtype=int)},
            ValueError,
            r"at least one pair and one position",
        ),
        ({"clean_ids": torch.zeros(0, 3, dtype=int)}, ValueError, r"got shape \(0, 3\)"),
        ({"clean_ids": ids([1, -1])}, ValueError, "clean_ids must be token ids >= 0, got -1"),
        (
            {"corrupted_ids": ids([1, 3, 4])},
            ValueError,
            r"corrupted_ids must have shape \(1, 2\).*got \(1, 3\).*same number of tokens",
        ),
        ({"answer_ids": torch.tensor([4, 5])}, ValueError, r"answer_ids must have shape \(1,\)"),
        (
            {"wrong_answer_ids": torch.tensor([4])},
            ValueError,
            "wrong_answer_ids must differ from answer_ids, got 4 for both in pair 0",
        ),
        ({"attention_mask": [[1, 1]]}, TypeError, "attention_mask must be a tensor"),
        (
            {"attention_mask": ids([1, 1]).to("meta")},
            ValueError,
            "attention_mask must be on cpu as clean_ids is, got meta",
        ),
        (
            {"answer_ids": torch.tensor([4], device="meta")},
            ValueError,
            "answer_ids must be on cpu as clean_ids is, got meta",
        ),
        ({"attention_mask": ids([1])}, ValueError, r"attention_mask must have shape \(1, 2\)"),
        ({"attention_mask": ids([1, 2])}, ValueError, "1 on real tokens and 0 on padding"),
        ({"attention_mask": ids([0, 0])}, ValueError, "at least one token, got none in pair 0"),
        (
            {
                "clean_ids": ids([1, 2, 3]),
                "corrupted_ids": ids([1, 2, 4]),
                "attention_mask": ids([1, 0, 1]),
            },
            ValueError,
            "one run of real tokens per pair.*got 2 runs in pair 0",
        ),
        (
            {"tokens": [["a"]]},
            ValueError,
            r"tokens must hold one text per real token: \[2\].*got \[1\]",
        ),
    ],
)
def test_ids_that_do_not_fit_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        PromptPairs(**(OK | changes))


def test_text_becomes_ids_with_one_bos(tokenizer):
    pairs = ioi(tokenizer)
    words = tokenizer(IOI.format("Michael"))["input_ids"]
    assert pairs.clean_ids[0].tolist() == [tokenizer.bos_token_id, *words]
    assert pairs.tokens[0][:3] == ["<|endoftext|>", "When", " Michael"]
    assert pairs.corrupted_tokens[0][int(pairs.split)] == " Ashley"
    assert tokenizer.decode(pairs.answer_ids) == " Jessica"
    assert tokenizer.decode(pairs.wrong_answer_ids) == " Michael"
    bare = ioi(tokenizer, prepend_bos=False)
    assert bare.clean_ids[0].tolist() == words


def test_bos_is_not_doubled_and_eos_is_not_kept(tokenizer):
    wanted = ioi(tokenizer).digest()
    assert ioi(bpe(adds_bos=True)).digest() == wanted
    written = {
        "clean": ["<|endoftext|>" + IOI.format("Michael")],
        "corrupted": ["<|endoftext|>" + IOI.format("Ashley")],
    }
    assert ioi(tokenizer, **written).digest() == wanted
    assert ioi(bpe(adds_bos=True), **written).digest() == wanted


def test_a_bos_that_opens_chat_turns_is_left_out_unless_asked_for():
    chat = bpe(chat_template="{{ '<|endoftext|>' + message['role'] }}")
    assert ioi(chat).tokens[0][0] == "When"
    assert ioi(chat, prepend_bos=True).tokens[0][0] == "<|endoftext|>"
    no_bos = bpe(bos_token=None)
    assert ioi(no_bos).tokens[0][0] == ioi(no_bos, prepend_bos=True).tokens[0][0] == "When"


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_of_different_lengths_are_padded(tokenizer, side):
    pairs = PromptPairs.from_text(
        tokenizer,
        clean=["When Michael went", "When Michael and Jessica went"],
        corrupted=["When David went", "When David and Jessica went"],
        answers=[" the", " the"],
        padding_side=side,
    )
    assert pairs.lengths.tolist() == [4, 6]
    assert pairs.starts.tolist() == ([0, 0] if side == "right" else [2, 0])
    assert pairs.last.tolist() == ([3, 5] if side == "right" else [5, 5])
    assert pairs.wrong_answer_ids is None


def test_different_token_counts_show_both_tokenisations_around_the_first_difference(tokenizer):
    with pytest.raises(ValueError, match="pair 0 must have as many tokens") as caught:
        ioi(tokenizer, corrupted=[IOI.format("Zoe")])
    message = str(caught.value)
    assert "got 15 clean and 18 corrupted" in message
    assert "from token 8 on: clean [' bar', ',', ' Michael', ' gave'" in message
    assert "corrupted [' bar', ',', ' ', 'Z', 'o', 'e'" in message


def test_prompts_that_differ_only_in_length_are_shown_at_their_end(tokenizer):
    with pytest.raises(
        ValueError, match=r"clean \[' gave', ' a'\], corrupted \[' gave', ' a', ' drink'\]"
    ):
        ioi(tokenizer, clean=["Michael gave a"], corrupted=["Michael gave a drink"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": [""]}, "clean prompt of pair 0 must not be empty"),
        ({"corrupted": [""]}, "corrupted prompt of pair 0 must not be empty"),
        (
            {"answers": [" Zoe"]},
            r"answer of pair 0 must be one token, got ' Zoe', which splits into \[' ', 'Z', 'o', 'e'\]",
        ),
        (
            {"answers": ["Barcelona"]},
            "splits into .*; ' Barcelona' is one token: write the leading space",
        ),
        ({"answers": [""]}, "answer of pair 0 must be one token, got an empty string"),
        (
            {"answers": [" Michael"]},
            "wrong answer of pair 0 must differ from its answer, got ' Michael'",
        ),
        ({"answers": [" Jessica"] * 2}, "answers must have 1 entries as clean has, got 2"),
        ({"padding_side": "both"}, "padding_side must be 'right' or 'left', got 'both'"),
    ],
)
def test_text_that_does_not_fit_is_named(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        ioi(tokenizer, **changes)


def test_a_string_where_a_list_belongs_is_named(tokenizer):
    with pytest.raises(TypeError, match="clean must be a list of strings, got 'Michael'"):
        ioi(tokenizer, clean="Michael")


def test_an_answer_without_its_space_is_another_token_and_warns():
    tokenizer = bpe("Michael gave to Michael MichaelJessica Jessica Jessica gave Jessica")
    alone = tokenizer("Jessica")["input_ids"]
    assert len(alone) == 1 and alone != tokenizer(" Jessica")["input_ids"]
    with pytest.warns(UserWarning, match="answer of pair 0 'Jessica' has no leading space"):
        pairs = PromptPairs.from_text(
            tokenizer, clean=["Michael gave to"], corrupted=["Jessica gave to"], answers=["Jessica"]
        )
    assert pairs.answer_ids.tolist() == alone


def test_an_answer_after_a_bracket_needs_no_space():
    tokenizer = bpe("Michael gave to ( Michael MichaelJessica Jessica Jessica gave Jessica (")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = PromptPairs.from_text(
            tokenizer,
            clean=["Michael gave to ("],
            corrupted=["Jessica gave to ("],
            answers=["Jessica"],
        )
    assert tokenizer.decode(pairs.answer_ids) == "Jessica"


class Merging:
    """A tokenizer that writes the end of a prompt otherwise where something follows: "ab" is 1, "abc" is 2, 3.

    It puts the special tokens `first` ahead.
    """

    bos_token_id = eos_token_id = pad_token_id = unk_token_id = None

    def __init__(self, *first):
        self.first = list(first)
        self.table = {"ab": [1], "xb": [5], "abc": [2, 3], "c": [4], " c": [6], "a": [7]}

    def __call__(self, texts, add_special_tokens):
        first = self.first if add_special_tokens else []
        return {"input_ids": [first + self.table[text] for text in texts]}

    def decode(self, ids, **_):
        return "".join(f"<{i}>" for i in ids)


def test_an_answer_that_changes_its_prompt_s_tokens_is_the_one_that_stands_alone():
    with pytest.warns(UserWarning, match="'c' has no leading space"):
        pairs = PromptPairs.from_text(Merging(), clean=["ab"], corrupted=["xb"], answers=["c"])
    assert pairs.clean_ids.tolist() == [[1]]
    assert pairs.answer_ids.tolist() == [4]


@pytest.mark.parametrize("first", [(), (8,), (8, 9)])
def test_all_that_a_tokenizer_puts_first_is_kept(first):
    with pytest.warns(UserWarning, match="no leading space"):
        pairs = PromptPairs.from_text(
            Merging(*first), clean=["ab"], corrupted=["xb"], answers=["c"]
        )
    assert pairs.clean_ids.tolist() == [[*first, 1]]
    assert pairs.corrupted_ids.tolist() == [[*first, 5]]


def test_words_a_word_level_tokenizer_does_not_know_are_refused():
    tokenizer = word_level()
    arguments = {"clean": ["Mary gave"], "corrupted": ["John gave"], "answers": ["a"]}
    assert PromptPairs.from_text(tokenizer, **arguments).tokens == [["<bos>", "Mary", "gave"]]
    with pytest.raises(
        ValueError, match="clean prompt of pair 0 must hold words the tokenizer knows"
    ):
        PromptPairs.from_text(tokenizer, **(arguments | {"clean": ["Zoe gave"]}))
    with pytest.raises(
        ValueError, match="answer of pair 0 must be a word the tokenizer knows, got 'Zoe'"
    ):
        PromptPairs.from_text(tokenizer, **(arguments | {"answers": ["Zoe"]}))


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_jsonl_of_texts_and_of_ids(tokenizer, tmp_path):
    text = {"clean": IOI.format("Michael"), "corrupted": IOI.format("Ashley")}
    text |= {"answer": " Jessica", "wrong_answer": " Michael"}
    path = write(tmp_path / "pairs.jsonl", json.dumps(text), "", json.dumps(text))
    pairs = PromptPairs.from_jsonl(path, tokenizer)
    assert pairs.digest() == PromptPairs.concat([ioi(tokenizer)] * 2).digest()
    pairs.to_jsonl(tmp_path / "ids.jsonl")
    again = PromptPairs.from_jsonl(tmp_path / "ids.jsonl", tokenizer, padding_side="left")
    assert again.digest() == pairs.digest()
    assert again.tokens == pairs.tokens
    mixed = write(
        tmp_path / "mixed.jsonl", json.dumps(text), (tmp_path / "ids.jsonl").read_text().strip()
    )
    assert len(PromptPairs.from_jsonl(mixed, tokenizer)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 must be a JSON object, got '{'"),
        ("[1]", r"line 2 must be a JSON object, got '\[1\]'"),
        (
            '{"clean": "a", "answer": "b"}',
            "line 2 must have clean, corrupted and answer.*no corrupted",
        ),
        ('{"clean": 1, "corrupted": "b", "answer": "c"}', "line 2: clean must be a string, got 1"),
        (
            '{"clean": "Michael", "corrupted": "David", "answer": " Zoe"}',
            "answer of .*line 2 must be one token",
        ),
        (
            '{"clean": "Michael", "corrupted": "Zoe", "answer": " to"}',
            "line 2 must have as many tokens",
        ),
        (
            '{"clean_ids": [1], "corrupted_ids": [2]}',
            "line 2: answer_ids must be a list of token ids, got None",
        ),
        (
            '{"clean_ids": [], "corrupted_ids": [2], "answer_ids": 1}',
            r"line 2: clean_ids must be .*got \[\]",
        ),
        (
            '{"clean_ids": [1.5], "corrupted_ids": [2], "answer_ids": 1}',
            r"line 2: clean_ids must be",
        ),
        (
            '{"clean_ids": [1], "corrupted_ids": [2], "answer_ids": [1, 2]}',
            "line 2: answer_ids must be one token",
        ),
        (
            '{"clean_ids": [1], "corrupted_ids": [2, 3], "answer_ids": 1}',
            "got 1 clean and 2 corrupted",
        ),
        (
            '{"clean_ids": [1], "corrupted_ids": [2], "answer_ids": 1, "wrong_answer_ids": 1}',
            "line 2: wrong_answer_ids must differ",
        ),
    ],
)
def test_jsonl_errors_name_file_and_line(tokenizer, tmp_path, line, message):
    good = json.dumps({"clean": "Michael", "corrupted": "David", "answer": " to"})
    path = write(tmp_path / "bad.jsonl", good, line)
    with pytest.raises(ValueError, match=message) as caught:
        PromptPairs.from_jsonl(path, tokenizer)
    assert str(path) in str(caught.value)


def test_empty_missing_and_binary_files(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="empty.jsonl must hold at least one pair"):
        PromptPairs.from_jsonl(write(tmp_path / "empty.jsonl"), tokenizer)
    with pytest.raises(FileNotFoundError, match="absent"):
        PromptPairs.from_jsonl(tmp_path / "absent.jsonl", tokenizer)
    (tmp_path / "binary.csv").write_bytes(b"clean,corrupted,label\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"binary.csv must be UTF-8 text"):
        PromptPairs.from_csv(tmp_path / "binary.csv", tokenizer)


def test_wrong_answers_are_given_for_all_lines_or_none(tokenizer, tmp_path):
    one = {"clean": "Michael", "corrupted": "David", "answer": " to"}
    path = write(
        tmp_path / "some.jsonl", json.dumps(one | {"wrong_answer": " the"}), json.dumps(one)
    )
    with pytest.raises(ValueError, match=r"some.jsonl line 2 must have a wrong_answer"):
        PromptPairs.from_jsonl(path, tokenizer)


def test_csv_with_token_ids(tokenizer, tmp_path):
    answer, wrong = (tokenizer(f" {name}")["input_ids"][0] for name in ("Jessica", "Michael"))
    path = write(
        tmp_path / "ioi.csv",
        ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx",
        f'470,"{IOI.format("Michael")}","{IOI.format("Ashley")}","{IOI.format("Jessica")}",{answer},{wrong}',
    )
    assert PromptPairs.from_csv(path, tokenizer).digest() == ioi(tokenizer).digest()
    foreign = write(
        tmp_path / "foreign.csv",
        "clean,corrupted,corrupted_hard,correct_idx,incorrect_idx",
        f'"{IOI.format("Michael")}","{IOI.format("Ashley")}",,4999,{wrong}',
    )
    with pytest.warns(
        UserWarning, match="1 of 1 answers are not in their prompts.*another tokenizer"
    ):
        PromptPairs.from_csv(foreign, tokenizer)


def test_csv_with_labels(tmp_path):
    prompt = "The war lasted from the year 17{} to the year 17"
    tokenizer = bpe(prompt.format(" to the year"), digits=1)
    path = write(
        tmp_path / "years.csv",
        "clean,corrupted,label",
        f"{prompt.format(32)},{prompt.format('01')},32",
        f"{prompt.format(15)},{prompt.format('01')},15",
    )
    pairs = PromptPairs.from_csv(path, tokenizer)
    assert [tokenizer.decode([i]) for i in pairs.answer_ids] == ["6", "5"]
    assert [tokenizer.decode([i]) for i in pairs.wrong_answer_ids] == ["1", "0"]
    late = write(
        tmp_path / "late.csv",
        "clean,corrupted,label",
        f"{prompt.format(95)},{prompt.format('01')},95",
    )
    with pytest.raises(
        ValueError, match=r"late.csv line 2 must have a year that the tokenizer tells from"
    ):
        PromptPairs.from_csv(late, tokenizer)
    text = write(
        tmp_path / "text.csv", "clean,corrupted,label", "The war lasted,The year lasted, from"
    )
    assert tokenizer.decode(PromptPairs.from_csv(text, tokenizer).answer_ids) == " from"
    number = write(tmp_path / "number.csv", "clean,corrupted,label", "The war,The year,1")
    with pytest.raises(ValueError, match="a number as label needs a prompt that ends in a century"):
        PromptPairs.from_csv(number, tokenizer)


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_files_are_read_with_bos_or_without(tmp_path, prepend_bos):
    chat = bpe(chat_template="{{ '<|endoftext|>' + message['role'] }}")  # by itself without
    clean, corrupted = IOI.format("Michael"), IOI.format("Ashley")
    wanted = ioi(chat, prepend_bos=prepend_bos, wrong_answers=None)
    first = ["<|endoftext|>"] * prepend_bos + ["When"]
    assert wanted.tokens[0][: len(first)] == first
    record = {"clean": clean, "corrupted": corrupted, "answer": " Jessica"}
    jsonl = write(tmp_path / "p.jsonl", json.dumps(record))
    table = write(tmp_path / "p.csv", "clean,corrupted,label", f'"{clean}","{corrupted}", Jessica')
    for found in (
        PromptPairs.from_jsonl(jsonl, chat, prepend_bos=prepend_bos),
        PromptPairs.from_csv(table, chat, prepend_bos=prepend_bos),
    ):
        assert found.digest() == wanted.digest()


def test_only_ioi_files_have_their_answers_looked_for(tokenizer, tmp_path):
    """Answers of other files need not stand in their prompts: no warning."""
    (answer,), (wrong,) = tokenizer([" Spain", " China"])["input_ids"]
    path = write(
        tmp_path / "p.csv",
        "clean,corrupted,correct_idx,incorrect_idx",
        f"City: Barcelona,City: Beijing,{answer},{wrong}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = PromptPairs.from_csv(path, tokenizer)
    assert (pairs.answer_ids.tolist(), pairs.wrong_answer_ids.tolist()) == ([answer], [wrong])


def test_all_tensors_move_to_a_device():
    pairs = PromptPairs(
        ids([1, 2]), ids([1, 3]), torch.tensor([4]), torch.tensor([5]), tokens=[["a", "b"]]
    )
    moved = pairs.to("meta")
    tensors = {name: x for name, x in vars(moved).items() if isinstance(x, torch.Tensor)}
    assert len(tensors) == 6
    assert {x.device.type for x in tensors.values()} == {"meta"}
    assert moved.tokens == pairs.tokens and pairs.device.type == "cpu"


def test_years_of_two_digits_are_halfway_to_the_ends_of_the_century(tmp_path):
    prompt = "The war lasted from the year 17{} to the year 17"
    years = " ".join(f"{year:02d}" for year in range(100))
    tokenizer = bpe(f"{prompt.format('')} {years}", digits=2)
    wanted = {11: ("55", "05"), 32: ("66", "16"), 61: ("80", "30"), 98: ("99", "49")}
    path = write(
        tmp_path / "years.csv",
        "clean,corrupted,label",
        *(f"{prompt.format(year)},{prompt.format('01')},{year}" for year in wanted),
    )
    pairs = PromptPairs.from_csv(path, tokenizer)
    found = zip(pairs.answer_ids.tolist(), pairs.wrong_answer_ids.tolist(), strict=True)
    assert [tuple(tokenizer.decode([i]) for i in row) for row in found] == list(wanted.values())


def test_labels_of_two_kinds_are_refused(tmp_path):
    prompt = "The war lasted from the year 17{} to the year 17"
    tokenizer = bpe(prompt.format(" to the year"), digits=1)
    lines = [
        f"{prompt.format(32)},{prompt.format('01')},32",
        "The war lasted,The year lasted, from",
    ]
    for order in (lines, lines[::-1]):
        path = write(tmp_path / "both.csv", "clean,corrupted,label", *order)
        with pytest.raises(ValueError, match=r"both.csv must have labels of one kind: years or"):
            PromptPairs.from_csv(path, tokenizer)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["clean,corrupted", "a,b"],
            "must have columns clean, corrupted and .* got clean, corrupted",
        ),
        (["clean,corrupted,label"], "must hold at least one pair, got none"),
        (["clean,corrupted,label", "Michael,,to"], "line 2 must have a value for corrupted"),
        (
            ["clean,corrupted,correct_idx,incorrect_idx", "Michael,David,x,1"],
            "line 2: correct_idx must be a token id",
        ),
        (
            ["clean,corrupted,correct_idx,incorrect_idx", "Michael,David,7,7"],
            "line 2 must differ from its answer",
        ),
    ],
)
def test_csv_errors_name_the_file(tokenizer, tmp_path, lines, message):
    path = write(tmp_path / "bad.csv", *lines)
    with pytest.raises(ValueError, match=message) as caught:
        PromptPairs.from_csv(path, tokenizer)
    assert str(path) in str(caught.value)
