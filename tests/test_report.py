"""The report's page as a text: what stands on it, that nothing of a run is markup, and how large it is."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from atp_fast import (
    Attribution,
    Engine,
    Node,
    NodeSpace,
    PatchEffects,
    PromptPairs,
    load_model,
    tasks,
)
from atp_fast.cli import app
from atp_fast.patching import MissedBound
from atp_fast.results import save_figure
from atp_fast.results.figures import BrowserError
from atp_fast.results.prompts import Prompt, kept_prompts
from test_results import HOSTILE, TOKENS, attribution, patch_effects

LLAMA = str(Path(__file__).parent / "data" / "tiny_llama_2L")


class Page(HTMLParser):
    """A page as a browser reads it.

    elements: all tags; texts: every text outside scripts and styles, and every attribute; tokens: (text, attributes) of
    the prompts' tokens; rows: the cells of each table's rows, by the table's id; data: what the script is given.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.tokens, self.rows, self.data = [], [], [], {}, None
        self.open, self.table = {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.texts += [value for _, value in attributes if value]
        self.open = {"tag": tag, **dict(attributes)}
        if self.open.get("class") == "token":
            self.tokens.append(["", self.open])
        if tag == "table":
            self.table = self.rows[self.open.get("id")] = []
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag):
        self.open = {}
        if tag == "table":
            self.table = None

    def handle_data(self, data):
        if self.open.get("id") == "data":
            self.data = json.loads(
                gzip.decompress(base64.b64decode(data)),
                parse_constant=lambda name: pytest.fail(f"no JSON: {name}"),
            )
        if self.open.get("tag") in ("script", "style"):
            return
        self.texts.append(data)
        if self.open.get("class") == "token":
            self.tokens[-1][0] += data
        if self.table and self.table[-1]:
            self.table[-1][-1] += data.strip("\n")


def page_of(found, path, **checks):
    found.report(path, **checks)
    return Page(path.read_text(encoding="utf-8"))


def own_part(path):
    """Bytes of a page beside plotly's script."""
    text = path.read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()) == 1
    return len(text.replace(get_plotlyjs(), "").encode())


def unpacked(array):
    """The numbers of an array as plotly packs them."""
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).tolist()


def prompt(tokens, other=(), columns=None):
    other = list(other)
    columns = list(range(len(tokens))) if columns is None else columns
    return Prompt(list(tokens), columns, other, list(range(len(other))))


BOUND = {
    "bounds": {"0.9": 0.5, "0.999": 0.75},
    "nodes": 1234,
    "forwards": 77,
    "assumptions": "Assumes much.",
}


@pytest.mark.parametrize(
    "field",
    [
        *("model", "metric", "method", "backend", "key", "value"),
        *("first", "some", "prompt", "span", "assumptions"),
    ],
)
def test_no_text_of_a_run_is_markup_on_its_page(tmp_path, field):
    """The page has the elements of a run with plain texts, and says the text itself."""

    def page(text):
        some = [TOKENS[0], text, text + "2", text + "3"]
        changes = {
            "key": {"metadata": {text: "1"}},
            "value": {"metadata": {"note": text}},
            "first": {"tokens": [text, *TOKENS[1:]]},
            "some": {"tokens": some},
            "prompt": {"prompts": [prompt(some, some[::-1])]},
            "span": {"tokens": some, "metadata": {"axis": "span"}, "prompts": [prompt("abcd")]},
            "assumptions": {},
        }
        found = attribution(**changes.get(field, {field: text}))
        words = {"assumptions": text, "kinds": [text]} if field == "assumptions" else {}
        nodes = [Node(*node) for node in found.top(2)]
        exact = patch_effects(nodes=nodes, metric=found.metric, direction="noising", tokens=None)
        return page_of(found, tmp_path / "page.html", exact=exact, bound=BOUND | words)

    hostile = page(HOSTILE)
    assert hostile.elements == page("plain").elements
    assert "img" not in hostile.elements
    assert any(HOSTILE in text for text in hostile.texts)
    figures = json.dumps(hostile.data["figures"])
    assert "<img" not in figures  # plotly reads tags in labels
    if field in ("metric", "method", "some"):
        assert "&lt;img" in figures + json.dumps(hostile.data["columns"])


def test_it_is_one_file_that_fetches_nothing(tmp_path):
    """No address of a script, picture or style; and the page itself forbids the browser to fetch."""
    found = attribution()
    found.report(tmp_path / "report.html")
    assert os.listdir(tmp_path) == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", text)
    assert "default-src 'none'" in text.split("<script>")[0]
    assert own_part(tmp_path / "report.html") < 100_000
    assert Page(text).data["tips"]


def test_prompts_come_first_and_provenance_last(tmp_path):
    found = attribution(prompts=[prompt("abcd", "abxd")])
    nodes = [Node(*node) for node in found.top(2)]
    exact = patch_effects(nodes=nodes, metric=found.metric, direction="noising", tokens=TOKENS)
    text = " ".join(page_of(found, tmp_path / "page.html", exact=exact, bound=BOUND).texts)
    parts = ["The prompts, by", "The best 72 nodes", "Maps", "Estimates beside exact effects",
             "What may have been missed", "How to read this", "Where the numbers come from",
             "ümlauts"]  # fmt: skip
    assert sorted(parts, key=text.index) == parts
    assert text.count("ümlauts") == 1


def test_tokens_are_coloured_and_name_their_best_nodes(tmp_path):
    """The token with the largest summed contribution is the darkest; padding is not shown."""
    tokens, width = ["a", "<b>", "c\n", "·"], 3
    counts = torch.tensor([2, 2, 2, 0])
    contribution = (
        torch.arange(24.0).reshape(2, 4, width) + torch.tensor([0.0, 9.0, 3.0, 99.0])[:, None]
    )
    found = attribution(
        {"z": width}, tokens=tokens, counts=counts, contribution={"z": contribution},
        effect={"z": -contribution}, per_pair=None,
    )  # fmt: skip
    for prompts in (None, [prompt(tokens[:3], ["a", "x", "c"])]):
        page = page_of(replace(found, prompts=prompts), tmp_path / "page.html")
        assert [text for text, _ in page.tokens] == ["a", "<b>", "c\\n"]
        totals = contribution.sum((0, 2))[:3]
        shares = [float(token["style"].removeprefix("--share:")) for _, token in page.tokens]
        assert shares == pytest.approx((totals / totals.max()).tolist(), rel=1e-2)
        for position, (_, token) in enumerate(page.tokens):
            assert token["data-column"] == str(position)
            first, *best = page.data["tips"][str(position)].split("\n")
            assert first == f"position {position}: {float(totals[position]):.4g} in all"
            own = [node for node in found.top(len(found)) if node.position == position][:5]
            assert best == [f"L{n.layer} H{n.index} z: {n.contribution:.4g}" for n in own]
    assert page.elements.count("mark") == 2  # "c" is not "c\n"


def test_the_best_nodes_of_a_token_need_not_be_among_the_best_of_all(tmp_path):
    contribution = {"neuron": torch.rand(2, 2, 1200) + torch.tensor([1.0, 0.0])[:, None]}
    found = attribution(
        {"neuron": 1200}, positions=2, tokens=["a", "b"], contribution=contribution,
        effect=contribution, per_pair=None,
    )  # fmt: skip
    assert all(node.position == 0 for node in found.top(1000))
    best = contribution["neuron"][:, 1].flatten().topk(5)
    tip = page_of(found, tmp_path / "page.html").data["tips"]["1"].split("\n")[1:]
    assert tip == [
        f"L{i // 1200} N{i % 1200}: {x:.4g}"
        for x, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def test_a_long_prompt_loses_its_beginning_and_few_of_many_are_shown(tmp_path):
    space = NodeSpace(1, 1500, {"z": 1})
    table = {"z": torch.rand(1, 1500, 1)}
    words = [f"w{i} " for i in range(1500)]
    long, other = prompt(words, words), prompt(words[:300], words[:300])
    found = attribution(
        space=space, contribution=table, effect=table, per_pair=None, tokens=None,
        counts=torch.ones(1500, dtype=torch.long), prompts=[long, other],
    )  # fmt: skip
    page = page_of(found, tmp_path / "page.html")
    assert [text for text, _ in page.tokens] == words[500:]
    assert any("The first 500 tokens are left out" in text for text in page.texts)
    page = page_of(replace(found, prompts=[other] * 9), tmp_path / "page.html")
    assert [text for text, _ in page.tokens] == words[:300] * 3
    assert any("3 of 2 pairs" in text for text in page.texts)
    assert not any("left out" in text for text in page.texts)


def test_the_table_holds_the_best_thousand(tmp_path):
    found = attribution({"neuron": 600, "z": 4})
    best = found.top(1000)
    exact = patch_effects(
        nodes=[Node(*best[7]), Node(*best[2])], metric=found.metric, direction="noising",
        tokens=TOKENS,
    )  # fmt: skip
    page = page_of(found, tmp_path / "page.html", exact=exact)
    head, *rows = page.rows["nodes"]
    assert head == [
        *("rank", "kind", "layer", "head or neuron", "position", "token"),
        *("contribution", "effect", "exact contribution", "exact effect"),
    ]
    patched = {7: ["2", "-1"], 2: ["3.5", "+1.5"]}
    assert rows == [
        [str(i + 1), n.kind, str(n.layer), str(n.index), str(n.position), n.token.replace("\n", "\\n"),
         f"{n.contribution:.5g}", f"{n.effect:+.5g}", *patched.get(i, ["", ""])]
        for i, n in enumerate(best)
    ]  # fmt: skip
    assert "exact effect" not in page_of(found, tmp_path / "page.html").rows["nodes"][0]


def test_every_kind_has_its_maps(tmp_path):
    found = attribution({"q": 3, "neuron": 5, "mlp_out": 1})
    data = page_of(found, tmp_path / "page.html").data
    assert set(data["figures"]) == {
        f"{over} {kind} {by}"
        for kind in ("q", "neuron", "mlp_out")
        for by in ("contribution", "effect")
        for over in ("position", *(["head"] if kind == "q" else []))
    }
    for name, figure in data["figures"].items():
        over, kind, by = name.split()
        wanted = found.totals(kind, by=by, over=over)
        np.testing.assert_allclose(
            figure["data"][0]["z"], wanted, rtol=5e-3, atol=1e-4 * wanted.abs().max()
        )
        assert figure["layout"]["title"]["text"].startswith(f"{kind} {by}")
        assert figure["layout"].get("template", {}) == {}
    assert data["columns"] == ["0 &lt;bos&gt;", "1  &lt;/script&gt;", "2 \\n", "3  Mary"]
    light, dark = data["templates"]["light"]["layout"], data["templates"]["dark"]["layout"]
    assert light.keys() == dark.keys() and light["font"]["color"] != dark["font"]["color"]


def test_columns_of_long_prompts_are_sums(tmp_path):
    """Each column is the mean over pairs of what each pair has there, as in a map by head."""
    counts = torch.tensor([2] * 1500 + [1] * 500)
    found = attribution({"z": 2}, positions=2000, counts=counts)
    page = page_of(found, tmp_path / "page.html")
    columns, size = page.data["columns"], 4
    assert len(columns) == 500 and columns[1] == "4–7" and columns[-1] == "1996–1999"
    assert any("2000 in 500 columns" in text for text in page.texts)
    for by in ("contribution", "effect"):
        table = getattr(found, by)["z"].sum(2) * counts / 2
        wanted = table.reshape(2, 500, size).sum(2)
        figure = page.data["figures"][f"position z {by}"]
        np.testing.assert_allclose(
            figure["data"][0]["z"], wanted, rtol=5e-3, atol=1e-4 * wanted.abs().max()
        )
    assert not any(" columns." in text for text in page_of(attribution(), tmp_path / "p").texts)


@pytest.mark.parametrize("axis", ["position", "span"])
def test_the_largest_page_is_small(tmp_path, axis):
    """All kinds of a model of 80 layers of 128 heads, long prompts, words in three-byte letters, 1,000 verified nodes."""
    heads = {"q": 128, "k": 8, "v": 8, "z": 128}
    kinds = heads | {"neuron": 16, "attn_out": 1, "mlp_out": 1, "resid_pre": 1}
    positions, word = 1500, "ありがとう"
    tables = {k: torch.exp(5 * torch.randn(80, positions, w)) for k, w in kinds.items()}
    names = [f"{word}{i}" for i in range(positions)]
    texts = [word] * positions
    found = Attribution(
        contribution=tables, effect={k: -x for k, x in tables.items()},
        space=NodeSpace(80, positions, kinds), counts=torch.full((positions,), 300),
        clean_value=torch.zeros(300), corrupted_value=torch.zeros(300), method="atp*",
        metric="logit_diff", direction="noising", backend="cpp", model="m", tokens=names,
        prompts=[prompt(texts, texts)] * 9, metadata={"axis": axis},
    )  # fmt: skip
    nodes = [Node(*node) for node in found.top(1000)]
    exact = patch_effects(
        nodes=nodes, effect=torch.rand(300, 1000), clean_value=torch.zeros(300),
        metric="logit_diff", direction="noising", tokens=names,
    )  # fmt: skip
    page = page_of(found, tmp_path / "page.html", exact=exact, bound=BOUND)
    size = own_part(tmp_path / "page.html")
    print(f"{size:,} bytes beside plotly")
    assert len(page.rows["nodes"]) == 1001 and len(page.tokens) == 1000
    assert len(page.data["figures"]) == 2 * (len(kinds) + len(heads)) + 1
    assert 200_000 < size < 500_000


def test_spans_have_names_in_place_of_positions(tmp_path):
    """A span is one text with its name; text outside all spans has no colour."""
    model, tokenizer = load_model(LLAMA, dtype="float64")
    pairs = PromptPairs.from_template(
        tokenizer,
        "When {A} and {B} went to the store , {S} gave a drink to",
        clean=[{"A": "Mary", "B": "John", "S": "John"}],
        corrupted=[{"A": "Mary", "B": "John", "S": "Tom Mary"}],
        answers=["Mary"],
        wrong_answers=["John"],
    )
    engine = Engine(model)
    found = engine.attribute(pairs, nodes=["q", "z"], progress=False)
    assert found.axis == "span"
    exact = engine.patch(pairs, found.top(4), progress=False)
    page = page_of(found, tmp_path / "page.html", exact=exact)
    names = ["When", "A", "and", "B", "went to the store ,", "S", "gave a drink to"]
    assert found.tokens == names
    words = ["When", "Mary", "and", "John", "wenttothestore,", "John", "gaveadrinkto"]
    assert [text for text, _ in page.tokens] == words  # this tokenizer's tokens have no spaces
    small = [text for text in page.texts if text in ("A", "B", "S")]
    assert small[:3] == ["A", "B", "S"]
    assert page.data["columns"] == names
    assert page.data["tips"]["5"].startswith("span S: ")
    head, *rows = page.rows["nodes"]
    assert head[4:6] == ["span", "contribution"]
    assert [row[4] for row in rows] == [n.token for n in found.top(len(found))]
    marked = page.elements.count("mark")
    assert marked == 1 and any("Tom" in text for text in page.texts)
    assert page.data["figures"]["position z effect"]["layout"]["xaxis"]["title"]["text"] == "span"


def logit_difference(model, pairs, ids):
    with torch.no_grad():
        logits = model(ids[:, pairs.starts[0] :]).logits[0, -1]
    return logits[pairs.answer_ids[0]] - logits[pairs.wrong_answer_ids[0]]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("lead", [0, 2])
def test_prompts_are_kept_with_the_result(tmp_path, direction, lead):
    """Those that are run, and those whose values are patched in; each token at its column, padded or not."""
    model, tokenizer = load_model(LLAMA)
    plain = tasks.ioi_pair(tokenizer)
    clean, corrupted, mask = (
        torch.nn.functional.pad(x, (lead, 0))
        for x in (plain.clean_ids, plain.corrupted_ids, plain.attention_mask)
    )
    pairs = PromptPairs(
        clean, corrupted, plain.answer_ids, plain.wrong_answer_ids, attention_mask=mask,
        tokens=plain.tokens, corrupted_tokens=plain.corrupted_tokens,
    )  # fmt: skip
    found = Engine(model).attribute(pairs, nodes=["z"], direction=direction, progress=False)
    (kept,) = found.prompts
    texts = (plain.tokens[0], plain.corrupted_tokens[0])
    assert (kept.tokens, kept.other_tokens) == texts[:: 1 if direction == "noising" else -1]
    assert kept.columns == kept.other_columns == [lead + i for i in range(len(texts[0]))]
    found.save(tmp_path / "run")
    assert Attribution.load(tmp_path / "run").prompts == found.prompts
    words = page_of(found, tmp_path / "page.html").texts
    said = re.search("metric is (.*) on the clean and (.*) on the corrupted", " ".join(words))
    wanted = [float(logit_difference(model, pairs, x)) for x in (clean, corrupted)]
    assert [float(x) for x in said.groups()] == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] > 1 + wanted[1]
    other = "corrupted" if direction == "noising" else "clean"
    assert any(f"the {other} prompt, whose values are" in text for text in words)


def test_no_more_prompts_are_kept_than_are_needed():
    ids, texts = torch.tensor([[1, 2]] * 5000), [["a", "b"]] * 5000
    pairs = PromptPairs(
        ids, ids + 1, torch.zeros(5000, dtype=torch.long), tokens=texts, corrupted_tokens=texts
    )
    assert len(kept_prompts(pairs)) == 2000
    assert kept_prompts(pairs[[0]]) == [prompt("ab", "ab")]
    wide = ids.reshape(1, -1)
    words = [["a"] * 10_000]
    long = PromptPairs(wide, wide + 1, torch.tensor([0]), tokens=words, corrupted_tokens=words)
    assert len(kept_prompts(long)[0].tokens) == 10_000
    assert kept_prompts(PromptPairs(wide, wide + 1, torch.tensor([0]))) is None


def test_prompts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"columns of prompts must be in \[-1, 4\), got 4"):
        attribution(prompts=[prompt("abcde")])


def test_checks_are_shown_where_they_were_made(tmp_path):
    found = attribution()
    best = found.top(3)
    exact = patch_effects(
        nodes=[Node(*n) for n in best], effect=torch.tensor([[2.0, -1.0, 0.5]]),
        clean_value=torch.zeros(1), metric=found.metric, direction="noising", tokens=TOKENS,
    )  # fmt: skip
    page = page_of(found, tmp_path / "page.html", exact=exact, bound=BOUND)
    text = " ".join(" ".join(page.texts).split())
    assert "3 nodes were patched exactly: rank correlation 1.000" in text
    traces = page.data["figures"]["scatter"]["data"]
    points = {
        point
        for trace in traces[:-1]
        for point in zip(*(unpacked(trace[axis]) for axis in "xy"), strict=True)
    }
    assert points == {(x, n.contribution) for x, n in zip((2.0, 1.0, 0.5), best, strict=True)}
    assert page.rows["bound"] == [
        ["confidence", "|effect| below"],
        ["90 %", "0.5"],
        ["99.9 %", "0.75"],
    ]
    assert "Of the 1,234 nodes that were not patched, none" in text and "77 random subsets" in text
    assert "Assumes much." in text and "atp-fast verify" not in text
    plain = " ".join(page_of(found, tmp_path / "page.html").texts)
    assert "atp-fast verify" in plain and "patched exactly" not in plain
    assert "not patched" not in plain


def test_a_bound_is_shown_as_it_was_found(tmp_path):
    """The object that the engine gives, and the content of its file."""
    ones = np.ones(2)
    bound = MissedBound(
        (0.9, 0.99), [Node("k", 0, 0, 0), Node("z", 0, 0, 0)], ones, ones, 9 * ones, 5 * ones,
        5 * ones, 10, 0.5, 0, 1, "Assumes much.",
    )  # fmt: skip
    found = attribution()
    page = page_of(found, tmp_path / "page.html", bound=bound)
    assert [row[1] for row in page.rows["bound"][1:]] == [f"{b:.5g}" for b in bound.bounds]
    assert any("Of the 2 nodes that were not patched (k, z)" in text for text in page.texts)


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({"exact": {"metric": "nll"}}, "exact must be of logit_diff, noising, .* got nll, noising"),
        ({"exact": {"direction": "denoising"}}, "got logit_diff, denoising"),
        ({"exact": {"metadata": {"pairs_digest": "b"}}}, "exact must be of the pairs of the scores"),
        ({"exact": {"nodes": None, "subsets": [[], []]}}, "effects of single nodes, got those of sub"),
        ({"exact": {"nodes": [Node("q", 0, 0), Node("q", 9, 0)]}}, r"layer of .* in \[0, 2\), got 9"),
        ({"exact": {"nodes": [Node("q", 0, 0), Node("k", 0, 0)]}}, "kind must be among q, neuron"),
        ({"bound": {}}, r"bound must hold what atp-fast diagnose writes, got KeyError\('bounds'\)"),
        ({"bound": []}, "bound must hold what atp-fast diagnose writes"),
        ({"bound": BOUND | {"bounds": {"high": 1}}}, "bound must hold what atp-fast diagnose"),
        ({"bound": BOUND | {"metric": "nll"}}, "bound must be of logit_diff, noising, .* got nll"),
        ({"bound": BOUND | {"pairs_digest": "b"}}, "bound must be of the pairs of the scores"),
    ],
)  # fmt: skip
def test_checks_of_another_run_are_refused(tmp_path, checks, message):
    fields = {
        "metric": "logit_diff",
        "direction": "noising",
        "nodes": [Node("q", 0, 0), Node("q", 0, 1)],
    }
    if "exact" in checks:
        checks = {"exact": patch_effects(**(fields | checks["exact"]))}
    found = attribution(metadata={"pairs_digest": "a"})
    with pytest.raises(ValueError, match=message):
        found.report(tmp_path / "page.html", **checks)
    assert os.listdir(tmp_path) == []


def test_scores_without_any_size_have_a_page(tmp_path):
    """All zero, NaN and infinite: nothing to colour by, and JSON that a browser reads."""
    for value in (0.0, float("nan"), float("inf")):
        table = {"q": torch.full((2, 4, 3), value)}
        found = attribution({"q": 3}, contribution=table, effect=table, per_pair=None)
        page = page_of(found, tmp_path / "page.html")
        assert len(page.rows["nodes"]) == 25 and len(page.tokens) == 4
        assert page.data["figures"]["position q effect"]["data"][0]["zmax"] == 1


# ---- atp-fast report, and figures as files


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return " ".join((result.stdout if code == 0 else result.stderr).split())


@pytest.fixture
def folder(tmp_path):
    """A run's folder with verified nodes and a bound."""
    found = attribution(metadata={"pairs_digest": "a"})
    found.save(tmp_path / "run.safetensors")
    nodes = [Node(*node) for node in found.top(2)]
    fields = {"metric": found.metric, "direction": "noising", "metadata": {"pairs_digest": "a"}}
    patch_effects(nodes=nodes, tokens=TOKENS, **fields).save(tmp_path / "verified.safetensors")
    (tmp_path / "bound.json").write_text(json.dumps(BOUND))
    return tmp_path


def test_the_command_shows_what_is_in_the_folder(folder):
    assert run("report", folder) == f"wrote {folder / 'report.html'}"
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "scatter" in page.data["figures"] and len(page.rows["bound"]) == 3
    assert run("report", folder / "run.safetensors", "--out", folder / "alone.html")
    page = Page((folder / "alone.html").read_text(encoding="utf-8"))
    assert "scatter" not in page.data["figures"] and "bound" not in page.rows
    for name in ("verified.safetensors", "bound.json"):
        (folder / name).unlink()
    run("report", folder)


def test_the_command_s_errors_are_one_line_each(folder):
    def error(*args):
        said = run("report", *args, code=2)
        assert said.startswith("error: ") and "Traceback" not in said
        return said

    for place in ("absent/page.html", "run.safetensors/page.html"):
        assert f"cannot write {folder / place}" in error(folder, "--out", folder / place)
    assert "it is a folder" in error(folder, "--out", folder)
    (folder / "bound.json").write_text("{")
    assert f"{folder / 'bound.json'} must be what atp-fast diagnose wrote" in error(folder)
    (folder / "bound.json").write_text(json.dumps(BOUND | {"pairs_digest": "b"}))
    assert "bound must be of the pairs of the scores" in error(folder)
    (folder / "bound.json").unlink()
    PatchEffects(
        nodes=[Node("q", 0, 0)], effect=torch.ones(1, 1), clean_value=torch.ones(1), metric="nll",
        direction="noising", backend="cpp", model="m",
    ).save(folder / "verified.safetensors")  # fmt: skip
    assert "exact must be of logit_diff" in error(folder)
    (folder / "verified.safetensors").unlink()
    of_another_version(folder / "run.safetensors")
    said = error(folder)
    assert "must hold atp_fast.attribution/2, got atp_fast.attribution/3" in said
    assert "another version of atp_fast" in said
    assert os.listdir(folder) == ["run.safetensors"]


def of_another_version(path):
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | {"format": "atp_fast.attribution/3"}
    tensors = load_file(path)
    save_file({name: x.clone() for name, x in tensors.items()}, path, metadata=header)


def test_a_page_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=f"cannot write {re.escape(str(path))}: No space left"):
        attribution().report(path)
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_figures_as_files_name_what_is_missing(tmp_path, monkeypatch):
    figure = attribution().heatmap("q")
    with pytest.raises(ValueError, match=r"path must end in .svg, .png, .pdf, got 'a.gif'"):
        save_figure(figure, "a.gif")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    with pytest.raises(BrowserError, match="apt-get install chromium, or name one in BROWSER"):
        save_figure(figure, tmp_path / "a.svg")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ImportError, match=r"needs kaleido: pip install 'atp_fast\[reports\]'"):
        save_figure(figure, tmp_path / "a.svg")
    assert os.listdir(tmp_path) == []


def test_the_documented_way(tmp_path, monkeypatch):
    """docs/report.md's example on a tiny model, whose figures go to files only where a browser draws them."""
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr("atp_fast.results.save_figure", lambda *args, **_: drawn.append(args))
    exec(compile(example.replace("smollm2-135m", LLAMA), "report.md", "exec"), {})
    assert os.listdir(tmp_path) == ["report.html"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.rows["bound"]) == 4 and "scatter" in page.data["figures"]
    assert [(name, figure.data[0].type) for figure, name in drawn] == [
        ("z.svg", "heatmap"),
        ("scatter.png", "scatter"),
    ]
