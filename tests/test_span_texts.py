"""Spans from characters, templates and chats, and what each bad one is told."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.prompts.spans import Spans
from tokenizers_for_tests import TINY, bpe, word_level

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CLEAN = "When Michael and Jessica went to the bar, Michael gave a drink to"
CORRUPTED = "When Michael and Jessica went to the bar, Sarah John gave a drink to"


def text_pairs(spans, corrupted_spans=None, *, clean=CLEAN, corrupted=CORRUPTED, **options):
    return PromptPairs.from_text(
        options.pop("tokenizer", None) or bpe(),
        clean=[clean],
        corrupted=[corrupted],
        answers=[" Jessica"],
        wrong_answers=[" Michael"],
        spans=[spans],
        corrupted_spans=None if corrupted_spans is None else [corrupted_spans],
        **options,
    )


def words(pairs, name, corrupted=False, pair=0):
    """The tokens of a span."""
    first, end = pairs.spans.named(pair, corrupted)[name]
    return (pairs.corrupted_tokens if corrupted else pairs.tokens)[pair][first:end]


@pytest.mark.parametrize("prepend_bos", [None, False])
def test_spans_from_characters_and_from_text(prepend_bos):
    begin = CLEAN.rindex("Michael")
    pairs = text_pairs(
        {"giver": (begin, begin + 7), "place": "the bar"},
        {"giver": "Sarah John", "place": " the bar"},
        prepend_bos=prepend_bos,
    )
    assert pairs.spans.names == ("giver", "place")
    assert words(pairs, "giver") == [" Michael"]
    assert words(pairs, "giver", corrupted=True) == [" Sarah", " John"]
    assert words(pairs, "place") == words(pairs, "place", corrupted=True) == [" the", " bar"]
    assert pairs.corrupted_lengths.tolist() == [int(pairs.lengths[0]) + 1]
    first = pairs.spans.named(0)["giver"][0]
    assert pairs.clean_ids[0, first] == bpe()(" Michael")["input_ids"][0]
    assert pairs.column_tokens() == ["giver", "place"]


def test_a_tokenizer_that_writes_its_own_prefix():
    pairs = text_pairs(
        {"bar": "bar"},
        tokenizer=bpe(adds_bos=True),
        corrupted=CLEAN.replace("Michael gave", "Sarah gave"),
    )
    assert pairs.tokens[0][0] == "<|endoftext|>" and words(pairs, "bar") == [" bar"]


def test_a_prompt_that_writes_its_own_bos():
    written = {"clean": "<|endoftext|>" + CLEAN, "corrupted": "<|endoftext|>" + CORRUPTED}
    pairs = text_pairs({"bar": "bar"}, **written)
    assert pairs.tokens[0].count("<|endoftext|>") == 1 and words(pairs, "bar") == [" bar"]


def test_a_template_s_fields_and_texts_are_spans():
    pairs = PromptPairs.from_template(
        bpe(),
        "When {A} and {B} went to the bar, {A} gave a drink to",
        clean=[{"A": "Michael", "B": "Jessica"}, {"A": "Sarah", "B": "Mary"}],
        corrupted=[{"A": "Sarah John", "B": "Jessica"}, {"A": "David", "B": "Mary"}],
        answers=[" Jessica", " Mary"],
        wrong_answers=[" Michael", " Sarah"],
        padding_side="left",
    )
    names = ("When", "A", "and", "B", "went to the bar,", "A (2)", "gave a drink to")
    assert pairs.spans.names == names
    for pair, (clean, corrupted) in enumerate((("Michael", "Sarah John"), ("Sarah", "David"))):
        for name in ("A", "A (2)"):
            assert "".join(words(pairs, name, pair=pair)).strip() == clean
            assert "".join(words(pairs, name, corrupted=True, pair=pair)).strip() == corrupted
    covered = "".join(token for name in names for token in words(pairs, name))
    assert covered == "When Michael and Jessica went to the bar, Michael gave a drink to"


def test_a_chat_s_turns_are_spans(tmp_path):
    tokenizer = bpe(chat_template=CHAT)
    chat = [
        {"role": "system", "content": "City: Barcelona"},
        {"role": "user", "content": "Country:"},
        {"role": "assistant", "content": "Spain"},
        {"role": "user", "content": "City: Beijing"},
    ]
    other = [*chat[:3], {"role": "user", "content": "City: Barcelona City:"}]
    both = {"clean": [chat], "corrupted": [other], "answers": [" China"]}
    pairs = PromptPairs.from_chat(tokenizer, **both)
    assert pairs.spans.names == ("system", "user", "assistant", "user (2)", "assistant (2)")
    text = "".join(pairs.tokens[0])
    assert text == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "".join(words(pairs, "user (2)")) == "<|user|>City: Beijing\n"
    assert "".join(words(pairs, "user (2)", corrupted=True)) == "<|user|>City: Barcelona City:\n"
    assert "".join(words(pairs, "assistant (2)")) == "<|assistant|>"

    opened = [*chat[:1], {"role": "assistant", "content": "Country:"}]
    pairs = PromptPairs.from_chat(
        tokenizer,
        clean=[opened],
        corrupted=[[{"role": "system", "content": "City: Beijing"}, opened[1]]],
        answers=[" Spain"],
    )
    assert "".join(pairs.tokens[0]).endswith("<|assistant|>Country:")
    assert pairs.spans.names == ("system", "assistant")


def test_files_carry_spans(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {
            "clean": CLEAN, "corrupted": CORRUPTED, "answer": " Jessica", "wrong_answer": " Michael",
            "spans": {"giver": [42, 49], "place": "bar"}, "corrupted_spans": {"giver": "Sarah John", "place": "bar"},
        },
        {
            "clean_ids": [1, 2, 3], "corrupted_ids": [1, 4], "answer_ids": 5, "wrong_answer_ids": 6,
            "spans": {"giver": [1, 3]}, "corrupted_spans": {"giver": [1, 2]},
        },
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    pairs = PromptPairs.from_jsonl(path, bpe())
    assert words(pairs, "giver") == [" Michael"]
    assert pairs.spans.named(1, corrupted=True) == {"giver": (1, 2)}
    assert pairs.present.tolist() == [[True, True], [True, False]]
    pairs.to_jsonl(path)
    assert PromptPairs.from_jsonl(path, bpe()).digest() == pairs.digest()


SAME = {"corrupted": CLEAN.replace("Michael gave", "Sarah gave")}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: text_pairs({"a": "Mich"}, **SAME), "'a' must stand once in the clean prompt of pair 0, got 'Mich', which stands there 2 times"),
        (lambda: text_pairs({"a": "essica"}, **SAME), "'a' must not cut a token in the clean prompt of pair 0: 'essica' ends inside ' Jessica'"),
        (lambda: text_pairs({"a": (0, 0)}, **SAME), r"'a' must be characters \[first, end\) of the 65"),
        (lambda: text_pairs({"a": (60, 70)}, **SAME), r"'a' must be characters \[first, end\) of the 65 .* got \[60, 70\)"),
        (lambda: text_pairs({"a": (4, 5)}, **SAME), None),
        (lambda: text_pairs({"a": " ", "b": "bar"}, **SAME), "'a' must stand once"),
        (lambda: text_pairs({"a": "the bar", "b": "bar"}, **SAME), "spans must not overlap, got 'a' and 'b' in the clean prompt of pair 0"),
        (lambda: text_pairs({"a": "bar"}, {"b": "bar"}, **SAME), r"pair 0 must have the same spans in both prompts, got \['a'\] and \['b'\]"),
        (lambda: text_pairs({"a": 3}, **SAME), "'a' of the clean prompt of pair 0 must be a text or two numbers"),
        (lambda: text_pairs({}, **SAME), "spans must name at least one span, got none"),
        (lambda: PromptPairs.from_text(bpe(), clean=["a"], corrupted=["an"], answers=[" to"], corrupted_spans=[{}]), "corrupted_spans need spans, got None"),
        (lambda: PromptPairs.from_text(bpe(), clean=["a"], corrupted=["an"], answers=[" to"], spans={"x": (0, 1)}), "clean spans must be a list of 1 mappings"),
        (lambda: PromptPairs.from_text(bpe(), clean=[CLEAN], corrupted=[CORRUPTED], answers=[" Mary"]), "must have as many tokens .*; spans would say which tokens stand for which"),
        (lambda: PromptPairs.from_template(bpe(), "no field", clean=[{}], corrupted=[{}], answers=[" to"]), r"template must hold a field such as \{name\}, got 'no field'"),
        (lambda: PromptPairs.from_template(bpe(), "{A} to", clean=[{"B": "a"}], corrupted=[{"A": "a"}], answers=[" to"]), r"clean of pair 0 must give the template's fields \['A'\], got \['B'\]"),
        (lambda: PromptPairs.from_template(bpe(), "{A} to", clean=[{"A": " "}], corrupted=[{"A": "a"}], answers=[" to"]), r"clean of pair 0 must give a text for \{A\}, got ' '"),
        (lambda: PromptPairs.from_chat(bpe(), clean=[[]], corrupted=[[]], answers=[" to"]), "tokenizer must have a chat template, this one has none"),
        (lambda: PromptPairs.from_chat(bpe(chat_template=CHAT), clean=[[]], corrupted=[[]], answers=[" to"]), r"clean of pair 0 must be messages with role and content, got \[\]"),
        (lambda: PromptPairs.from_chat(bpe(chat_template=CHAT + "{{ messages | length }}"), clean=[[{"role": "user", "content": "bar"}] * 2], corrupted=[[{"role": "user", "content": "bar"}] * 2], answers=[" to"]), "clean of pair 0 cannot be cut into turns: the chat template writes message 0 differently"),
    ],
)  # fmt: skip
def test_bad_spans_are_told(make, said):
    if said is None:  # the space before a word alone: no token of its own
        said = "'a' must hold a token in the clean prompt of pair 0, got ' '"
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corrupted_attention_mask": torch.tensor([[1, 1, 0]])}, "corrupted_attention_mask must be attention_mask unless spans say"),
        ({"spans": Spans.of([{"a": (2, 2)}], [{"a": (1, 2)}])}, r"'a' must not be empty in the clean prompt of pair 0, got \[2, 2\)"),
        ({"spans": Spans.of([{"a": (2, 4)}], [{"a": (1, 2)}])}, r"'a' must lie in the 3 tokens of the clean prompt of pair 0, got \[2, 4\)"),
        ({"spans": Spans.of([{"a": (1, 2)}], [{}])}, "'a' must be in both prompts of pair 0, it is in one"),
        ({"spans": Spans(("a",), torch.zeros(2, 1, 2), torch.zeros(2, 1, 2))}, r"spans.clean must have shape \(1, 1, 2\), got \(2, 1, 2\)"),
    ],
)  # fmt: skip
def test_bad_span_tables_are_told(changes, said):
    with pytest.raises(ValueError, match=said):
        PromptPairs(
            torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), torch.tensor([5]), **changes
        )


def test_metrics_of_every_position_need_equal_lengths():
    pairs = text_pairs({"bar": "bar", "giver": (42, 49)}, {"bar": "bar", "giver": "Sarah John"})
    engine = Engine(zoo.build("llama", vocab_size=5000))

    def last(logits, pairs):
        return logits[:, -1, 3]

    with pytest.raises(
        ValueError, match="metric 'last' looks at every position, which the prompts"
    ):
        engine.attribute(pairs, metric=last)
    with pytest.raises(
        ValueError, match="metric 'last' looks at every position, which the prompts"
    ):
        engine.patching(pairs, ("z",), metric=last)
    last.positions = "last"
    assert float(engine.attribute(pairs, metric=last, nodes=("z",)).contribution["z"].max()) > 0
    with pytest.raises(ValueError, match="these are aligned by spans alone"):
        pairs.without_spans()


def test_slow_tokenizers_have_no_characters():
    class Slow:
        def __init__(self):
            self.own = bpe()

        def __getattr__(self, name):
            return getattr(self.own, name)

        def __call__(self, *args, return_offsets_mapping=False, **kwargs):
            if return_offsets_mapping:
                raise NotImplementedError("return_offset_mapping is not available")
            return self.own(*args, **kwargs)

    with pytest.raises(
        ValueError, match="spans need a tokenizer that knows its tokens' characters"
    ):
        text_pairs({"bar": "bar"}, tokenizer=Slow(), **SAME)


def test_a_run_with_spans_goes_from_the_command_line_to_the_bound(tmp_path):
    from typer.testing import CliRunner

    from atp_fast.cli import app
    from atp_fast.results import Attribution

    path, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    tokenizer, model = word_level(), str(TINY)
    vocabulary = [
        w for w, i in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1]) if w.isalpha()
    ]
    one, two, three, four = vocabulary[:4]
    path.write_text(
        json.dumps(
            {
                "clean": f"{one} {two} {three}", "corrupted": f"{one} {four} {two} {three}", "answer": one,
                "wrong_answer": two, "spans": {"middle": two, "end": three},
                "corrupted_spans": {"middle": f"{four} {two}", "end": three},
            }
        )
    )  # fmt: skip
    for arguments in (
        ["attribute", "--model", model, "--pairs", path, "--out", run, "--nodes", "z,k"],
        ["verify", run, "--top", "6"],
        ["diagnose", run, "--forwards", "300"],
        ["report", run],
    ):
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
    found = Attribution.load(run / "run.safetensors")
    assert found.tokens == ["middle", "end"]
