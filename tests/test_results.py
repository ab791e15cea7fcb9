"""Results: ranking, tables, figures, and files that come back exactly or say what is wrong with them."""

from __future__ import annotations

import csv
import html
import json
import os
import pickle
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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
from atp_fast.cli.folder import write_run
from atp_fast.files import written_whole
from atp_fast.results import ScoredNode
from atp_fast.results.agreement import agreement

LLAMA = str(Path(__file__).parent / "data" / "tiny_llama_2L")

TOKENS = ["<bos>", " </script>", "\n", " Mary"]


def attribution(widths=None, layers=2, positions=4, dtype=torch.float32, seed=0, **changes):
    space = NodeSpace(layers, positions, widths or {"q": 3, "neuron": 5, "mlp_out": 1})
    generator = torch.Generator().manual_seed(seed)
    per_pair = {
        kind: torch.randn(2, *space.shape(kind), generator=generator, dtype=dtype)
        for kind in space.kinds
    }
    fields = {
        "contribution": {kind: x.abs().mean(0) for kind, x in per_pair.items()},
        "effect": {kind: x.mean(0) for kind, x in per_pair.items()},
        "per_pair": per_pair,
        "space": space,
        "counts": torch.full((positions,), 2),
        "clean_value": torch.tensor([0.5, 1.5], dtype=dtype),
        "corrupted_value": torch.tensor([-1.0, 2.0], dtype=dtype),
        "tokens": TOKENS if positions == 4 else None,
        "method": "atp*",
        "metric": "logit_diff",
        "direction": "noising",
        "backend": "reference",
        "model": "a/<model>",
        "metadata": {"seconds": "1.5", "note": 'quotes " and\nlines, ümlauts, {"json": 1}'},
    }
    return Attribution(**(fields | changes))


def patch_effects(**changes):
    fields = {
        "nodes": [Node("q", 0, 1, 2), Node("mlp_out", 1, 3)],
        "effect": torch.tensor([[1.0, -2.0], [-3.0, 5.0]]),
        "clean_value": torch.tensor([0.5, 1.5]),
        "metric": "nll",
        "direction": "denoising",
        "backend": "cpp",
        "model": "m",
        "tokens": TOKENS,
        "metadata": {"a": "b"},
    }
    return PatchEffects(**(fields | changes))


def test_a_scored_node_is_its_node():
    node = ScoredNode("k", 5, 7, 3, contribution=0.25, effect=-0.125, token=" Mary")
    assert node == Node("k", 5, 7, 3) and hash(node) == hash(Node("k", 5, 7, 3))
    assert {Node("k", 5, 7, 3): 1}[node] == 1
    assert repr(node) == "<L5 H3 k @7 ' Mary': contribution 0.25, effect -0.125>"
    copy = pickle.loads(pickle.dumps(node))
    assert (copy, copy.contribution, copy.effect, copy.token) == (node, 0.25, -0.125, " Mary")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), min_size=16, max_size=16),
    st.lists(st.integers(0, 1), min_size=2, max_size=2).filter(any),
    st.integers(1, 16),
    st.sampled_from(["contribution", "effect"]),
)
def test_top_is_the_sorted_table_with_ties_in_order_and_nan_last(values, counts, k, by):
    space = NodeSpace(2, 2, {"q": 3, "k": 1})
    x = torch.tensor(values)
    signs = torch.tensor([1.0, -1.0] * 8)
    scores = {"q": x[:12].reshape(2, 2, 3), "k": x[12:].reshape(2, 2, 1)}
    effect = {
        "q": scores["q"] * signs[:12].view(2, 2, 3),
        "k": scores["k"] * signs[12:].view(2, 2, 1),
    }
    found = attribution(
        contribution=scores,
        effect=effect,
        per_pair=None,
        space=space,
        counts=torch.tensor(counts),
        tokens=None,
    )
    table = [node for node in space if counts[node.position]]
    assert len(found) == len(table)
    value = [float(scores[n.kind][n[1:]]) for n in table]
    order = sorted(
        range(len(table)), key=lambda i: (np.isnan(value[i]), -np.nan_to_num(value[i]), i)
    )
    if k > len(table):
        with pytest.raises(ValueError, match=rf"k must be in \[1, {len(table)}\].*got {k}"):
            found.top(k, by=by)
        return
    top = found.top(k, by=by)
    assert top == [table[i] for i in order[:k]]
    for node in top:
        np.testing.assert_equal(node.contribution, float(scores[node.kind][node[1:]]))
        np.testing.assert_equal(node.effect, float(effect[node.kind][node[1:]]))


def test_top_of_some_kinds_carries_tokens():
    found = attribution()
    best = found.top(3, kinds=["neuron"])
    assert {node.kind for node in best} == {"neuron"}
    assert [node.token for node in best] == [TOKENS[node.position] for node in best]
    assert best[0].contribution == float(found.contribution["neuron"].max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.top(0), r"k must be in \[1, 72\], the number of nodes, got 0"),
        (lambda found: found.top(73), r"k must be in \[1, 72\], the number of nodes, got 73"),
        (lambda found: found.top(1, kinds=["heads"]), "nodes must be among .* got 'heads'"),
        (lambda found: found.top(1, kinds=["z"]), "kind must be among q, neuron, mlp_out, got 'z'"),
        (
            lambda found: found.top(1, by="score"),
            "by must be 'contribution' or 'effect', got 'score'",
        ),
        (lambda found: found.heatmap("z"), "kind must be among q, neuron, mlp_out, got 'z'"),
        (lambda found: found.heatmap("q", over="layer"), "over must be 'head' or 'position'"),
        (lambda found: found.to_dataframe(["z"]), "kind must be among"),
    ],
)
def test_wrong_questions_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(attribution())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"direction": "up"}, ValueError, "direction must be 'noising' or 'denoising', got 'up'"),
        ({"effect": {}}, ValueError, r"effect must have the kinds .* got \(\)"),
        ({"counts": torch.ones(3)}, ValueError, r"counts must have shape \(4,\), got \(3,\)"),
        ({"tokens": ["a"]}, ValueError, "tokens must have 4 entries, got 1"),
        ({"clean_value": torch.ones(3)}, ValueError, r"both have shape \(pairs,\), got \(3,\)"),
        (
            {"metadata": {"seconds": 1}},
            TypeError,
            "metadata must map strings to strings, got 'seconds': 1",
        ),
    ],
)
def test_fields_that_do_not_fit_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        attribution(**changes)
    wrong = {
        "q": torch.zeros(2, 4, 2),
        "neuron": torch.zeros(2, 4, 5),
        "mlp_out": torch.zeros(2, 4, 1),
    }
    with pytest.raises(
        ValueError, match=r"contribution\['q'\] must have shape \(2, 4, 3\), got \(2, 4, 2\)"
    ):
        attribution(contribution=wrong)


def test_top_of_a_million_nodes_is_quick():
    found = attribution({"neuron": 1024}, layers=32, positions=32)
    started = time.process_time()
    best = found.top(1000)
    assert time.process_time() - started < 2
    assert best[0].contribution == float(found.contribution["neuron"].max())


def test_repr_states_direction_and_sign():
    text = repr(attribution())
    assert "atp* of logit_diff, noising, 2 pairs, a/<model>, 72 nodes: q, neuron, mlp_out" in text
    assert "effect > 0: putting the corrupted value into the clean run raises the metric" in text
    assert "putting the clean value into the corrupted run" in repr(patch_effects())


def test_table_has_one_row_per_existing_node(tmp_path):
    found = attribution(counts=torch.tensor([2, 2, 1, 0]))
    table = found.to_dataframe()
    assert list(table) == ["kind", "layer", "position", "token", "index", "contribution", "effect"]
    assert len(table) == len(found) == 2 * 3 * (3 + 5 + 1)
    for row in table.sample(20, random_state=0).itertuples():
        at = (row.layer, row.position, row[5])
        assert row.contribution == float(found.contribution[row.kind][at])
        assert row.effect == float(found.effect[row.kind][at])
        assert row.token == TOKENS[row.position]
    assert set(found.to_dataframe(["mlp_out"]).kind) == {"mlp_out"}
    found.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(table) and len(rows) == 1 + len(table)
    assert [row[3] for row in rows[1:]] == table.token.tolist()
    assert [float(row[5]) for row in rows[1:]] == table.contribution.astype(float).tolist()


def test_totals_are_means_over_pairs_of_each_pairs_own_sum():
    # two pairs of one and two tokens: the second column is the mean over one pair
    per_pair = {"z": torch.tensor([[[[1.0], [0.0]]], [[[3.0], [10.0]]]])}
    mean = {"z": torch.tensor([[[2.0], [10.0]]])}
    found = attribution(
        contribution=mean,
        effect=mean,
        per_pair=per_pair,
        space=NodeSpace(1, 2, {"z": 1}),
        counts=torch.tensor([2, 1]),
        tokens=None,
    )
    assert found.totals("z", over="head").tolist() == [[(1 + 3 + 10) / 2]]
    assert found.totals("z", over="position").tolist() == [[2.0, 10.0]]


ODD = ["a,b", 'say "so"', "two\nlines", "<b>&amp;</b>", "'", "\t", "שלום", "", "\\"]


def test_odd_tokens_survive_in_tables(tmp_path):
    """Commas, quotes and line breaks come back from CSV."""
    found = attribution({"z": 2}, positions=len(ODD), tokens=ODD)
    found.to_csv(tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["token"] for row in rows] == [t for _ in range(2) for t in ODD for _ in range(2)]
    assert [float(row["effect"]) for row in rows] == pytest.approx(
        found.effect["z"].flatten().tolist()
    )
    pairs = PromptPairs(torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), torch.tensor([1]))
    write_run(tmp_path, found, pairs, 9)
    with (tmp_path / "nodes.csv").open(newline="", encoding="utf-8") as file:
        best = list(csv.DictReader(file))
    assert [row["token"] for row in best] == [node.token for node in found.top(9)]
    assert [row["contribution"] for row in best] == [str(n.contribution) for n in found.top(9)]


HOSTILE = """</script></title></style><img src=x onerror="boom('1')">&lt;&#39;"""


def test_hostile_texts_in_the_scatter_plot():
    """Exact along x, estimated along y; plotly reads tags in labels and axis titles."""
    nodes = [ScoredNode(k, 0, 1, i, 0.5 + i, -1.0, HOSTILE) for i, k in enumerate("qqk")]
    exact = patch_effects(
        nodes=list(nodes), effect=torch.tensor([[2.0, -3.0, 4.0]]), clean_value=torch.zeros(1),
        metric=HOSTILE, tokens=None,
    )  # fmt: skip
    figure = agreement(nodes, exact, f"atp {HOSTILE}").scatter()
    q, k, line = figure.data
    assert [(t.name, list(t.x), list(t.y)) for t in (q, k)] == [
        ("q", [2.0, 3.0], [0.5, 1.5]),
        ("k", [4.0], [2.5]),
    ]
    assert list(line.x) == list(line.y) == [0.5, 4.0]
    titles = [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
    for text in (*q.text, *k.text, *titles):
        assert "<" not in text
    assert [html.unescape(t) for t in titles] == [
        f"exact contribution ({HOSTILE})",
        f"estimated by atp {HOSTILE}",
    ]
    assert html.unescape(k.text[0]) == f"L0 H2 k @1 {HOSTILE!r}"


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_left_padding_moves_positions_and_nothing_else(tmp_path, direction):
    """Tables of pairs of one length, padded by two columns on the left and on the right."""
    model, tokenizer = load_model(LLAMA, dtype="float64")
    plain, engine = PromptPairs.concat([tasks.ioi_pair(tokenizer)] * 2), Engine(model)
    assert plain.tokens != plain.corrupted_tokens
    length, rows = plain.clean_ids.shape[1], {}
    for side, lead in (("right", 0), ("left", 2)):
        pad = (lead, 2 - lead)
        clean, corrupted, mask = (
            torch.nn.functional.pad(x, pad)
            for x in (plain.clean_ids, plain.corrupted_ids, plain.attention_mask)
        )
        pairs = PromptPairs(
            clean, corrupted, plain.answer_ids, plain.wrong_answer_ids, attention_mask=mask,
            tokens=plain.tokens, corrupted_tokens=plain.corrupted_tokens,
        )  # fmt: skip
        found = engine.attribute(
            pairs, nodes=["q", "z", "mlp_out"], direction=direction, progress=False
        )
        assert found.counts.tolist() == [0] * lead + [2] * length + [0] * (2 - lead)
        write_run(tmp_path, found, pairs, 50)
        with (tmp_path / "nodes.csv").open(newline="", encoding="utf-8") as file:
            best = list(csv.DictReader(file))
        table = found.to_dataframe()
        assert len(table) == len(found) == 2 * length * (4 + 4 + 1)
        tables = (table.astype(str).to_dict("records"), best)
        rows[side] = [
            [{**row, "position": int(row["position"]) - lead} for row in records]
            for records in tables
        ]
        again = PromptPairs.from_jsonl(tmp_path / "pairs.jsonl", tokenizer)
        assert again.digest() == pairs.digest() == plain.digest()
        shown = (plain.swapped() if direction == "denoising" else plain).column_tokens()
        assert found.tokens[lead : lead + length] == shown
        exact = engine.patch(pairs, found.top(3), direction=direction, progress=False)
        assert exact.tokens == found.tokens
        assert exact.table()["token"] == [node.token for node in found.top(3)]
    texts = ("kind", "layer", "position", "token", "index")
    for right, left in zip(rows["right"], rows["left"], strict=True):
        for one, other in zip(right, left, strict=True):
            assert [one[name] for name in texts] == [other[name] for name in texts]
            for name in ("contribution", "effect"):
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("lead", [0, 2])
def test_padded_columns_are_in_no_table(tmp_path, lead):
    """Padding before or behind: positions keep the user's columns, and their own tokens."""
    tokens = ["·"] * lead + ["a", "b", "c"] + ["·"] * (2 - lead)
    counts = torch.tensor([0] * lead + [2, 2, 1] + [0] * (2 - lead))
    found = attribution({"z": 3, "mlp_out": 1}, positions=5, tokens=tokens, counts=counts)
    assert len(found) == 2 * 3 * 4
    table = found.to_dataframe()
    assert sorted(set(zip(table.position, table.token, strict=True))) == [
        (lead, "a"),
        (lead + 1, "b"),
        (lead + 2, "c"),
    ]
    for row in table.itertuples():
        effect = found.effect[row.kind][row.layer, row.position, row[5]]
        assert row.effect == pytest.approx(float(effect))
    assert {node.token for node in found.top(len(found))} == {"a", "b", "c"}


def test_heatmaps_are_centred_labelled_and_say_their_sign():
    found = attribution()
    figure = found.heatmap("q")
    (trace,) = figure.data
    expected = found.totals("q", over="head")
    np.testing.assert_allclose(np.array(trace.z), expected)
    assert trace.zmin == -trace.zmax == -float(expected.abs().max())
    scale = figure.layout.template.layout.colorscale.diverging
    assert trace.autocolorscale and trace.colorscale is None
    assert [colour for _, colour in scale[::2]] == ["#67001f", "#f7f7f7", "#053061"]
    assert "red < 0 < blue" in figure.layout.title.text.replace("&lt;", "<")
    assert "corrupted value into the clean run" in figure.layout.title.text
    assert figure.layout.xaxis.title.text == "head"
    by_position = found.heatmap("neuron", by="contribution")
    np.testing.assert_allclose(
        np.array(by_position.data[0].z), found.contribution["neuron"].sum(2), rtol=1e-6
    )
    assert by_position.data[0].zmin == 0
    assert by_position.layout.xaxis.type == "category"
    assert list(by_position.data[0].x) == [
        "0 &lt;bos&gt;",
        "1  &lt;/script&gt;",
        "2 \\n",
        "3  Mary",
    ]
    zero = {kind: torch.zeros_like(x) for kind, x in found.effect.items()}
    assert attribution(effect=zero).heatmap("q").data[0].zmax == 1


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    for package in ("pandas", "plotly", "plotly.graph_objects", "plotly.offline"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=r"heatmap needs plotly: pip install 'atp_fast\[reports\]'"
    ):
        attribution().heatmap("q")
    with pytest.raises(ImportError, match=r"to_dataframe needs pandas: pip install"):
        attribution().to_dataframe()
    with pytest.raises(ImportError, match="report needs plotly"):
        attribution().report(tmp_path / "report.html")
    attribution().to_csv(tmp_path / "table.csv")


def assert_same(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape
    assert torch.equal(one.nan_to_num(12345.0), other.nan_to_num(12345.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_pair", [True, False])
def test_attribution_comes_back_exactly(tmp_path, dtype, per_pair):
    found = attribution(dtype=dtype, **({} if per_pair else {"per_pair": None, "tokens": None}))
    found.effect["q"][0, 0, 0] = float("nan")
    path = tmp_path / "run.safetensors"
    found.save(path)
    again = Attribution.load(path)
    assert os.listdir(tmp_path) == ["run.safetensors"]
    for name in ("contribution", "effect", "per_pair"):
        table, other = getattr(found, name), getattr(again, name)
        assert (table is None) == (other is None)
        for kind in table or {}:
            assert_same(table[kind], other[kind])
    for name in ("counts", "clean_value", "corrupted_value"):
        assert_same(getattr(found, name), getattr(again, name))
    for name in ("method", "metric", "direction", "backend", "model", "tokens", "metadata"):
        assert getattr(again, name) == getattr(found, name)
    assert again.space == found.space and repr(again) == repr(found)
    assert again.space.kinds == ("q", "neuron", "mlp_out")


@pytest.mark.parametrize("kind", ["nodes", "subsets", "empty subset"])
def test_patch_effects_come_back_exactly(tmp_path, kind):
    nodes = [Node("q", 0, 1, 2), Node("mlp_out", 1, 3)]
    changes = {
        "nodes": {"valid": torch.tensor([[True, False], [True, True]])},
        "subsets": {"nodes": None, "subsets": [nodes, nodes[1:]]},
        "empty subset": {"nodes": None, "subsets": [[], nodes]},
    }[kind]
    found = patch_effects(**changes)
    found.save(tmp_path / "exact.safetensors")
    again = PatchEffects.load(tmp_path / "exact.safetensors")
    for name in (
        "nodes",
        "subsets",
        "metric",
        "direction",
        "backend",
        "model",
        "tokens",
        "metadata",
    ):
        assert getattr(again, name) == getattr(found, name)
    assert_same(again.effect, found.effect)
    assert (again.valid is None) == (found.valid is None)
    if found.valid is not None:
        assert torch.equal(again.valid, found.valid)


def test_patch_effects_average_over_the_pairs_that_were_patched(tmp_path):
    found = patch_effects(valid=torch.tensor([[True, False], [True, True]]))
    assert found.mean.tolist() == [-1.0, 5.0]
    assert found.mean_abs.tolist() == [2.0, 5.0]
    table = found.to_dataframe()
    assert table.effect.tolist() == [-1.0, 5.0] and table.contribution.tolist() == [2.0, 5.0]
    assert table.token.tolist() == [" </script>", " Mary"] and table["index"].tolist() == [2, 0]
    assert patch_effects().mean.tolist() == [-1.0, 1.5]
    sets = patch_effects(nodes=None, subsets=[[Node("q", 0, 0)] * 3, []])
    assert sets.to_dataframe().nodes.tolist() == [3, 0]
    sets.to_csv(tmp_path / "sets.csv")
    assert (tmp_path / "sets.csv").read_text().splitlines()[0] == "subset,nodes,contribution,effect"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": []}, "nodes or subsets, one of the two"),
        ({"nodes": None}, "nodes or subsets, one of the two"),
        ({"effect": torch.zeros(2, 3)}, r"effect must have shape \(2, 2\), got \(2, 3\)"),
        ({"valid": torch.ones(2)}, r"valid must have shape \(2, 2\), got \(2,\)"),
    ],
)
def test_patch_effects_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        patch_effects(**changes)


def damaged(path, how):
    attribution().save(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "cut in its header":
        path.write_bytes(path.read_bytes()[:40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("kind,layer\n" * 50)
    elif how == "a pickle":
        torch.save({"effect": torch.ones(3)}, path)
    elif how == "foreign":
        save_file({"weight": torch.ones(3)}, path)
    elif how == "another result":
        patch_effects().save(path)
    elif how == "a tensor short":
        tensors = load_file(path)
        del tensors["effect.q"]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        save_file(tensors, path, metadata=header)
    elif how == "a header field short":
        header = {"format": "atp_fast.attribution/1", "space": json.dumps([1, 1, [["q", 1]]])}
        save_file({"effect.q": torch.ones(1, 1, 1)}, path, metadata=header)
    elif how == "no JSON":
        header = {"format": "atp_fast.attribution/1", "space": "{"}
        save_file({"effect.q": torch.ones(1, 1, 1)}, path, metadata=header)
    elif how == "a folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "cut in its header",
        "empty",
        "text",
        "a pickle",
        "foreign",
        "another result",
        "a tensor short",
        "a header field short",
        "no JSON",
        "a folder",
    ],
)
def test_files_that_are_no_result_get_one_error_with_their_path(tmp_path, how):
    path = tmp_path / "run.safetensors"
    damaged(path, how)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " must ") as caught:
        Attribution.load(path)
    assert "atp_fast.patch_effects/2" in str(caught.value) or how != "another result"


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result file at .*absent"):
        PatchEffects.load(tmp_path / "absent")


@pytest.mark.parametrize("write", ["save", "to_csv", "report"])
def test_what_cannot_be_written_leaves_nothing(tmp_path, write):
    (tmp_path / "file").write_text("kept")
    for target in ("absent/run", "file/run"):
        with pytest.raises(OSError, match=re.escape(f"cannot write {tmp_path / target}")):
            getattr(attribution(), write)(tmp_path / target)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="it is a folder"):
        getattr(attribution(), write)(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path):
    path = tmp_path / "run"
    path.write_text("old")

    def half(error):
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(KeyboardInterrupt):
        half(KeyboardInterrupt())
    with pytest.raises(OSError, match=f"cannot write {re.escape(str(path))}: No space left"):
        half(OSError(28, "No space left on device"))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["run"]
    attribution().save(path)
    assert len(Attribution.load(path)) == 72


def test_views_of_shared_memory_can_be_saved(tmp_path):
    whole = torch.randn(2, 2, 4, 3)
    found = attribution(
        {"q": 3},
        per_pair={"q": whole},
        effect={"q": whole[0]},
        contribution={"q": whole[0].transpose(0, 1).contiguous().transpose(0, 1)},
    )
    found.save(tmp_path / "run")
    assert_same(Attribution.load(tmp_path / "run").effect["q"], whole[0])


def test_cpu_moves_the_tables_and_keeps_the_rest():
    """Tables of numbers that lie nowhere (meta) stand for a GPU's."""
    found = attribution()
    away = {kind: x.to("meta") for kind, x in found.contribution.items()}
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "cpu", lambda x: moved.append(x.device.type) or torch.zeros(x.shape)
        )
        copy = replace(found, contribution=away).cpu()
    assert set(moved) == {"meta", "cpu"}
    assert all(x.device.type == "cpu" for x in copy.contribution.values())
    assert copy.space == found.space and copy.metadata == found.metadata
    assert torch.equal(copy.clean_value, found.clean_value)
    assert found.cpu().contribution.keys() == found.contribution.keys()
