"""Every option of every verb reaches its place, and chained verbs give the numbers of the Python API."""

from __future__ import annotations

import csv
import html
import importlib
import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import zoo
from atp_fast import Attribution, Engine, PatchEffects, PromptPairs, load_model, metrics, tasks
from atp_fast.cli import app, options
from atp_fast.nodes import label
from atp_fast.prompts import Direction
from atp_fast.results.agreement import agreement
from atp_fast.study import Study

DATA = Path(__file__).parent / "data"
LLAMA, GPT2 = str(DATA / "tiny_llama_2L"), str(DATA / "tiny_gpt2_3L")
CLEAN = "When Mary and John went to the store , John gave a drink to"
CORRUPTED = "When Mary and John went to the store , Tom gave a drink to"


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


Calls = dict[str, list[dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The arguments, by name, of every call of the functions that options go to; they run as ever."""
    found: Calls = {}

    def noted(module: str, path: str) -> None:
        home: Any = importlib.import_module(f"atp_fast.{module}")
        *owners, name = path.split(".")
        for owner in owners:
            home = getattr(home, owner)
        own = inspect.getattr_static(home, name)
        function: Callable[..., Any] = getattr(own, "__func__", own)
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            found.setdefault(path, []).append(dict(signature.bind(*args, **kwargs).arguments))
            return function(*args, **kwargs)

        monkeypatch.setattr(home, name, classmethod(call) if isinstance(own, classmethod) else call)

    for module, path in (
        ("models", "load_model"),
        ("prompts.tasks", "load_task"),
        ("prompts.pairs", "PromptPairs.from_text"),
        ("prompts.pairs", "PromptPairs.from_jsonl"),
        ("engine", "Engine.__init__"),
        ("engine", "Engine.attribute"),
        ("engine", "Engine.estimate"),
        ("engine", "Engine.estimate_patch"),
        ("engine", "Engine.patch"),
        ("engine", "Engine.bound_missed"),
        ("distributed", "attribute_sharded"),
        ("study.cases", "engine_cases"),
        ("study", "run_study"),
        ("ops.trial", "random_inputs"),
        ("ops.trial", "in_turns"),
    ):
        noted(module, path)
    return found


def only(calls: Calls, name: str) -> dict[str, Any]:
    (arguments,) = calls[name]
    return arguments


def attribute(calls: Calls, folder: Path) -> set[str]:
    """One call for the prompts of a task, one for a file, one for text."""
    method = {
        "--metric": "prob_diff",
        "--method": "atp+qk",
        "--nodes": "z, attn_out",
        "--direction": "denoising",
        "--backend": "reference",
        "--dtype": "float64",
        "--precision": "bf16",
        "--memory-budget": "123MB",
        "--shard-size": 2,
        "--tensor-parallel": 1,
        "--out": folder / "task",
        "--top": 3,
        "--table-rows": 4,
    }
    prompts = {"--task": "induction", "--n-pairs": 5, "--seed": 7}
    given = {"--model": GPT2, **prompts, **method}
    out = run("attribute", *(x for pair in given.items() for x in pair))
    loaded = {"name": GPT2, "dtype": "float64", "tensor_parallel": 1}
    assert only(calls, "load_model") == loaded
    load = only(calls, "load_task")
    assert (load["name"], load["n_pairs"], load["seed"]) == ("induction", 5, 7)
    engine = only(calls, "Engine.__init__")
    assert (engine["backend"], engine["precision"]) == ("reference", "bf16")
    assert engine["memory_budget"] == "123MB"
    sharded = only(calls, "attribute_sharded")
    assert (sharded["metric"], sharded["method"]) == ("prob_diff", "atp+qk")
    assert (sharded["nodes"], sharded["direction"]) == (("z", "attn_out"), "denoising")
    assert (sharded["shard_size"], sharded["folder"]) == (2, folder / "task" / "shards")
    assert not (folder / "task" / "shards").exists()  # the run is done
    assert "Top 3 nodes" in out
    with (folder / "task" / "nodes.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 4
    calls.clear()
    text = {
        "--clean": CLEAN,
        "--corrupted": CORRUPTED,
        "--answer": "Mary",
        "--wrong-answer": "John",
    }
    common = ("--model", LLAMA, "--nodes", "z")
    run("attribute", *common, *(x for pair in text.items() for x in pair), "--out", folder / "text")
    prompts_given = only(calls, "PromptPairs.from_text")
    columns = ("clean", "corrupted", "answers", "wrong_answers")
    assert [prompts_given[name] for name in columns] == [[x] for x in text.values()]
    assert "attribute_sharded" not in calls
    asked = only(calls, "Engine.attribute")
    defaults = {"metric": "logit_diff", "method": "atp*", "direction": "noising", "per_pair": False}
    assert {name: asked[name] for name in defaults} == defaults
    calls.clear()
    file = folder / "text" / "pairs.jsonl"
    run("attribute", *common, "--pairs", file, "--out", folder / "file")
    assert only(calls, "PromptPairs.from_jsonl")["path"] == file
    return {*given, *text, "--pairs"}


def moved_model(folder: Path) -> Path:
    """The model under another name than the run has for it."""
    return Path(shutil.copytree(LLAMA, folder / "moved"))


def finished(folder: Path) -> Path:
    task = ("--task", "ioi_pair", "--metric", "nll", "--direction", "denoising")
    run("attribute", "--model", LLAMA, *task, "--nodes", "q,z,mlp_out", "--out", folder)
    return folder


def verify(calls: Calls, folder: Path) -> set[str]:
    done = finished(folder / "run")
    calls.clear()
    given = {
        "--top": 6,
        "--nodes": "q, mlp_out",
        "--worst": 2,
        "--model": moved_model(folder),
        "--backend": "reference",
    }
    out = run("verify", done, *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": str(folder / "moved"), "dtype": "float32"}
    assert only(calls, "Engine.__init__")["backend"] == "reference"
    patch = only(calls, "Engine.patch")
    assert (patch["metric"], patch["direction"]) == ("nll", "denoising")
    assert patch["nodes"] == Attribution.load(done / "run.safetensors").top(6, ("q", "mlp_out"))
    assert "2 worst disagreements" in out
    return {"run", *given}


def diagnose(calls: Calls, folder: Path) -> set[str]:
    done = finished(folder / "run")
    run("verify", done, "--top", 5)
    calls.clear()
    given = {
        "--forwards": 40,
        "--probability": 0.25,
        "--confidence": "0.6,0.8",
        "--nodes": "z, q",
        "--seed": 9,
        "--model": moved_model(folder),
        "--backend": "reference",
    }
    run("diagnose", done, *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": str(folder / "moved"), "dtype": "float32"}
    assert only(calls, "Engine.__init__")["backend"] == "reference"
    asked = only(calls, "Engine.bound_missed")
    assert asked["exclude"] == PatchEffects.load(done / "verified.safetensors").nodes
    assert (asked["metric"], asked["direction"]) == ("nll", "denoising")
    assert (asked["forwards"], asked["probability"], asked["seed"]) == (40, 0.25, 9)
    assert (asked["confidence"], asked["nodes"]) == ([0.6, 0.8], ("z", "q"))
    return {"run", *given}


def study(calls: Calls, folder: Path) -> set[str]:
    given = {
        "--model": LLAMA,
        "--tasks": "ioi:2, induction",
        "--families": "neuron, attention",
        "--metric": "logit_diff",
        "--direction": "denoising",
        "--seeds": 3,
        "--top": 17,
        "--limit": 55,
        "--neurons": 21,
        "--neurons-top": 11,
        "--verified": 13,
        "--forwards": 77,
        "--probability": 0.125,
        "--backend": "reference",
        "--dtype": "float64",
        "--out": folder / "study",
    }
    run("study", *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": LLAMA, "dtype": "float64"}
    assert only(calls, "Engine.__init__")["backend"] == "reference"
    assert [(c["name"], c["n_pairs"]) for c in calls["load_task"]] == [
        ("ioi", 2),
        ("induction", None),
    ]
    cases = only(calls, "engine_cases")
    assert list(cases["tasks"]) == ["ioi", "induction"]
    assert cases["families"] == ("neuron", "attention")
    assert (cases["metric"], cases["direction"]) == ("logit_diff", "denoising")
    assert (cases["sample"], cases["best"]) == (21, 11)
    asked = only(calls, "run_study")
    plan = asked["plan"]
    assert (plan.seeds, plan.top, plan.limit, plan.verified) == (3, 17, 55, 13)
    assert (plan.forwards, plan.probability) == (77, 0.125)
    assert asked["folder"] == folder / "study"
    return set(given)


def report(calls: Calls, folder: Path) -> set[str]:
    done = finished(folder / "run")
    page = folder / "elsewhere.html"
    assert f"wrote {page}" in run("report", done, "--out", page)
    assert LLAMA in page.read_text()
    return {"run", "--out"}


def mib(calls: Calls, folder: Path) -> set[str]:
    done, other = folder / "run", folder / "other.jsonl"
    nodes = ("--nodes", "z,mlp_out,resid_pre")
    run("attribute", "--model", LLAMA, "--task", "ioi_pair", *nodes, "--out", done)
    other.write_text((done / "pairs.jsonl").read_text())
    calls.clear()
    given = {
        "--task": "arc-easy",
        "--label": "llama3",
        "--scores": "contribution",
        "--format": "pt",
        "--pairs": other,
        "--metric": "prob_diff",
        "--out": folder / "submission",
        "--model": moved_model(folder),
        "--backend": "reference",
    }
    out = run("mib", done, *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": str(folder / "moved"), "dtype": "float32"}
    assert only(calls, "Engine.__init__")["backend"] == "reference"
    read = [c["path"] for c in calls["PromptPairs.from_jsonl"]]
    assert read == [done / "pairs.jsonl", other]
    assert out.startswith("prob_diff on 1 pair: ")
    written = folder / "submission" / "arc-easy_llama3" / "importances.pt"
    assert float(torch.load(written)["nodes_scores"].min()) >= 0
    return {"run", *given}


def bench(calls: Calls, folder: Path) -> set[str]:
    given = {
        "--positions": 5,
        "--heads": 3,
        "--head-dim": 8,
        "--cotangents": 2,
        "--dtype": "float64",
        "--device": "cpu",
        "--rounds": 4,
    }
    run("bench", *(x for pair in given.items() for x in pair))
    inputs = only(calls, "random_inputs")
    assert inputs == {
        "shape": (1, 3, 5, 8),
        "cotangents": 2,
        "dtype": torch.float64,
        "device": "cpu",
    }
    assert {turns["rounds"] for turns in calls["in_turns"]} == {4}
    return set(given)


def demo(calls: Calls, folder: Path) -> set[str]:
    given = {"--out": folder / "demo", "--top": 2, "--backend": "reference"}
    out = run("demo", *(x for pair in given.items() for x in pair))
    assert only(calls, "Engine.__init__")["backend"] == "reference"
    assert "Top 2 nodes" in out
    assert (folder / "demo" / "run.safetensors").exists()
    return set(given)


def doctor(calls: Calls, folder: Path) -> set[str]:
    assert f"{LLAMA}: served" in run("doctor", "--model", LLAMA)
    assert only(calls, "load_model")["name"] == LLAMA
    pairs = folder / "pairs.jsonl"
    line = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": "Mary", "wrong_answer": "John"}
    pairs.write_text(json.dumps(line))
    given = {
        "--model": LLAMA,
        "--pairs": pairs,
        "--verify": 7,
        "--metric": "prob_diff",
        "--method": "atp",
        "--nodes": "z, mlp_out",
        "--backend": "reference",
        "--dtype": "float64",
        "--precision": "bf16",
        "--memory-budget": "123MB",
    }
    calls.clear()
    out = run("doctor", *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": LLAMA, "dtype": "float64"}
    assert only(calls, "PromptPairs.from_jsonl")["path"] == pairs
    engine = only(calls, "Engine.__init__")
    assert (engine["backend"], engine["precision"]) == ("reference", "bf16")
    assert engine["memory_budget"] == "123MB"
    asked = only(calls, "Engine.estimate")
    assert (asked["metric"], asked["method"]) == ("prob_diff", "atp")
    assert asked["nodes"] == ("z", "mlp_out")
    patched = only(calls, "Engine.estimate_patch")
    assert patched["metric"] == "prob_diff"
    assert len(patched["nodes"]) == 7
    assert {node.kind for node in patched["nodes"]} == {"z", "mlp_out"}
    assert re.search(r"^atp: \S+ s, in 1 batches\ncpu +\S+ \SB at the peak: model", out, re.M)
    assert "verify 7 nodes: " in out
    return set(given)


VERBS = {
    function.__name__: function
    for function in (attribute, verify, diagnose, study, report, mib, bench, demo, doctor)
}


def options_of(verb: str) -> set[str]:
    command: Any = typer.main.get_command(app)
    return {
        next((o for o in p.opts if o.startswith("--")), p.name)
        for p in command.commands[verb].params
        if p.name != "help"
    }


def test_every_verb_is_here() -> None:
    command: Any = typer.main.get_command(app)
    assert set(command.commands) == set(VERBS)
    assert {p.name for p in command.params} == {"debug", "version"}  # in test_cli.py


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_reaches_its_place(
    verb: str, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if verb == "demo":
        from atp_fast import models

        monkeypatch.setattr(models, "load_model", lambda name: load_model(LLAMA))
    if verb == "study":
        monkeypatch.setattr("atp_fast.study.write_study", lambda *_: [])
        own = importlib.import_module("atp_fast.study").run_study

        def nothing(cases: Any, folder: Path, plan: Any) -> Study:
            own([], folder, plan)  # noted
            return Study()

        monkeypatch.setattr("atp_fast.study.run_study", nothing)
    assert VERBS[verb](calls, tmp_path) == options_of(verb)


def test_the_names_in_the_help_are_those_there_are() -> None:
    assert options.METRIC_NAMES.split(", ") == list(metrics.METRICS)
    assert set(options.TASK_NAMES.split(", ")) == set(tasks.TASKS)


class Chain(NamedTuple):
    """Options none of which is a default. some: the kinds that verify and diagnose are asked for, the run's when None."""

    metric: str
    method: str
    direction: Direction
    dtype: str
    precision: str | None
    backend: str
    nodes: str
    some: str | None
    seed: int


CHAINS = [
    Chain(
        "prob_diff", "atp+qk", "denoising", "float64", None, "cpp", "k,z,mlp_out", "z,mlp_out", 1
    ),
    Chain("kl", "atp", "noising", "float64", "bf16", "reference", "q,v,resid_pre", None, 2),
    Chain("nll", "atp+graddrop", "denoising", "float32", "bf16", "cpp", "z,neuron", "z", 3),
    Chain("logit_diff", "atp*", "denoising", "float64", None, "reference", "attn_out,k", None, 4),
]


def cells(printed: str) -> list[list[str]]:
    """The rows of the table in what a verb printed."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def page_text(path: Path) -> str:
    """What a page says to who reads it."""
    body = re.sub(r"<(script|style).*?</\1>", " ", path.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"{chain.metric}-{chain.direction}")
def test_chained_verbs_give_the_numbers_of_the_engine(tmp_path: Path, chain: Chain) -> None:
    """attribute, verify, diagnose and report, beside the engine asked the same."""
    model, tokenizer = load_model(LLAMA, dtype=chain.dtype)
    pairs = tasks.load_task("ioi", tokenizer, n_pairs=3, seed=chain.seed)
    budget = "400KB"
    engine = Engine(model, chain.backend, chain.precision, budget)
    kinds = chain.nodes.split(",")
    few = kinds if chain.some is None else chain.some.split(",")
    some = [] if chain.some is None else ["--nodes", chain.some]
    found = engine.attribute(
        pairs, chain.metric, chain.method, kinds, chain.direction, progress=False
    )
    asked = ["--task", "ioi", "--n-pairs", 3, "--seed", chain.seed, "--metric", chain.metric]
    asked += ["--method", chain.method, "--nodes", chain.nodes, "--direction", chain.direction]
    asked += ["--backend", chain.backend, "--dtype", chain.dtype, "--memory-budget", budget]
    asked += ["--precision", chain.precision] if chain.precision else []
    out = run("attribute", "--model", LLAMA, *asked, "--out", tmp_path)
    saved = Attribution.load(tmp_path / "run.safetensors")
    assert saved.space.kinds == found.space.kinds
    for kind in kinds:
        assert torch.equal(saved.contribution[kind], found.contribution[kind])
        assert torch.equal(saved.effect[kind], found.effect[kind])
    assert saved.tokens == found.tokens
    values = [float(found.clean_value.mean()), float(found.corrupted_value.mean())]
    clean, corrupted = values if chain.direction == "noising" else values[::-1]
    assert abs(clean - corrupted) > 0.01
    said = " ".join(out.split())
    assert f"{chain.metric} {clean:.4f} clean, {corrupted:.4f} corrupted" in said
    assert f"{chain.method} on " in said and f"3 pairs, {chain.direction}, " in said
    assert f"backend {chain.backend}: " in said

    out = run("verify", tmp_path, "--top", 7, "--worst", 3, *some, "--backend", chain.backend)
    best = found.top(7, few)
    plain = Engine(model, chain.backend)  # a run's precision and budget are those of its sweep
    exact = plain.patch(pairs, best, chain.metric, chain.direction, progress=False)
    verified = PatchEffects.load(tmp_path / "verified.safetensors")
    assert verified.nodes == best
    assert (verified.metric, verified.direction) == (chain.metric, chain.direction)
    assert (verified.backend, verified.tokens) == (chain.backend, found.tokens)
    assert torch.equal(verified.effect, exact.effect)
    columns = {
        "contribution": [node.contribution for node in best],
        "effect": [node.effect for node in best],
        "exact_contribution": exact.mean_abs.tolist(),
        "exact_effect": exact.mean.tolist(),
    }
    written = table(tmp_path / "verified.csv")
    for name, values in columns.items():
        assert [float(row[name]) for row in written] == pytest.approx(values, rel=1e-9), name
    numbers = json.loads((tmp_path / "verified.json").read_text())
    judged = agreement(best, exact, chain.method)
    assert numbers == json.loads(json.dumps(judged.to_dict()))
    assert f"rank correlation of {chain.method} with the exact" in " ".join(out.split())
    for shown, row in zip(cells(out), judged.worst(3), strict=True):
        place = [row.node.kind, str(row.node.layer), str(row.node.position)]
        assert [*shown[:3], shown[4]] == [*place, str(row.node[3])]
        assert [float(cell) for cell in shown[5:]] == pytest.approx(
            [row.node.contribution, row.contribution, row.effect], abs=1e-5
        )

    chance = ("--forwards", 60, "--probability", 0.25, "--seed", 3, "--confidence", "0.75,0.5")
    out = run("diagnose", tmp_path, *some, *chance, "--backend", chain.backend)
    bound = plain.bound_missed(
        pairs,
        best,
        chain.metric,
        chain.direction,
        few,
        [0.75, 0.5],
        forwards=60,
        probability=0.25,
        seed=3,
        progress=False,
    )
    bounded = json.loads((tmp_path / "bound.json").read_text())
    asked_of = list(found.space.kinds) if chain.some is None else few
    question = {"metric": chain.metric, "direction": chain.direction, "kinds": asked_of}
    question["pairs_digest"] = pairs.digest()
    assert bounded == json.loads(json.dumps(question | bound.to_dict()))
    assert f"({', '.join(k for k in found.space.kinds if k in few)})" in out or chain.some
    said = " ".join(out.split())
    for level, value in zip((0.75, 0.5), bound.bounds, strict=True):
        largest = label(bound.worst(1, level)[0], found.tokens)
        wanted = f"with {100 * level:g} % confidence none has |effect| >= {value:.5f} (largest: "
        assert wanted + " ".join(largest.split()) in said

    run("report", tmp_path, "--out", tmp_path / "again.html")
    for name in ("report.html", "again.html"):
        said = page_text(tmp_path / name)
        for word in (LLAMA, chain.method, chain.metric, chain.direction, *kinds, best[0].token):
            assert word in said, word
    assert f"{len(best)} nodes were patched exactly" in page_text(tmp_path / "again.html")
    rest = f"Of the {len(bound.nodes):,} nodes that were not patched ({', '.join(asked_of)})"
    assert rest in page_text(tmp_path / "again.html")


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("metric", ["nll", "prob_diff"])
def test_the_options_of_a_chain_change_its_numbers(
    tmp_path: Path, metric: str, direction: Direction, precision: str | None
) -> None:
    """So that an option that is lost on the way is seen in the tests above."""
    model, tokenizer = load_model(LLAMA)
    pairs = tasks.load_task("ioi", tokenizer, n_pairs=2)

    def effect(metric: str, direction: Direction, precision: str | None, method: str) -> Tensor:
        engine = Engine(model, "cpp", precision)
        return engine.attribute(pairs, metric, method, ["z"], direction, progress=False).effect["z"]

    own = effect(metric, direction, precision, "atp")
    other_metric = "nll" if metric == "prob_diff" else "prob_diff"
    other_direction: Direction = "noising" if direction == "denoising" else "denoising"
    for other in (
        effect(other_metric, direction, precision, "atp"),
        effect(metric, other_direction, precision, "atp"),
        effect(metric, direction, None if precision else "bf16", "atp"),
    ):
        assert (own - other).abs().max() > 1e-4 * own.abs().max()


def test_verify_of_more_nodes_than_there_are(tmp_path: Path) -> None:
    """All of the kinds asked for, as attribute prints all that there are."""
    done = finished(tmp_path / "run")
    found = Attribution.load(done / "run.safetensors")
    for options_given, kinds in (((), None), (("--nodes", "mlp_out"), ("mlp_out",))):
        run("verify", done, "--top", 9999, *options_given)
        nodes = PatchEffects.load(done / "verified.safetensors").nodes
        assert nodes == found.top(len(found.to_dataframe(kinds)), kinds)
        assert nodes is not None and len(nodes) == len(found.to_dataframe(kinds))


@pytest.mark.parametrize("lead", [(2, 2), (0, 1)], ids=["wider", "ragged"])
def test_a_run_in_other_columns_than_its_pairs(tmp_path: Path, lead: tuple[int, int]) -> None:
    """The file of pairs has no left padding: positions would mean other tokens, so later verbs refuse."""
    model, tokenizer = load_model(LLAMA)
    pairs = tasks.load_task("ioi", tokenizer, n_pairs=2)
    clean, corrupted, mask = (
        torch.nn.functional.pad(x, (min(lead), 0))
        for x in (pairs.clean_ids, pairs.corrupted_ids, pairs.attention_mask)
    )
    mask[1, : max(lead)] = False
    pairs = PromptPairs(
        clean, corrupted, pairs.answer_ids, pairs.wrong_answer_ids, attention_mask=mask
    )
    assert pairs.starts.tolist() == list(lead)
    found = Engine(model).attribute(pairs, nodes=["z"], progress=False)
    found.save(tmp_path / "run.safetensors")
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 2
    assert "must hold pairs in the columns of" in " ".join(result.stderr.split())
    assert not (tmp_path / "verified.safetensors").exists()


def test_a_report_of_the_file_and_of_its_folder(tmp_path: Path) -> None:
    done = finished(tmp_path / "run")
    shutil.copy(done / "run.safetensors", tmp_path / "other.safetensors")
    (done / "report.html").unlink()
    for given, page in ((done, done / "report.html"), (tmp_path / "other.safetensors", None)):
        page = page or tmp_path / "report.html"
        assert run("report", given) == f"wrote {page}\n"
        assert LLAMA in page_text(page)


def test_bench_says_which_backend_took_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_turns(calls: dict[str, Any], rounds: int, clock: Any) -> dict[str, list[float]]:
        assert list(calls) == ["reference", "cpp"]
        return {"reference": [0.5, 0.006, 0.002], "cpp": [0.0015, 0.001, 0.9]}

    monkeypatch.setattr("atp_fast.ops.trial.in_turns", in_turns)
    shown = cells(run("bench", "--positions", 3, "--heads", 1, "--head-dim", 2, "--device", "cpu"))
    assert shown
    for row in shown:
        assert row[1:] == ["6.00", "1.50", "4.0"]


def test_doctor_names_the_kinds_that_a_model_lacks(tmp_path: Path) -> None:
    zoo.build_other_experts().save_pretrained(tmp_path)
    load_model(LLAMA)[1].save_pretrained(tmp_path)
    out = run("doctor", "--model", tmp_path)
    assert f"{tmp_path}: served (DbrxForCausalLM)" in out
    (reason,) = re.findall("^without neuron: (.*)$", out, re.MULTILINE)
    assert "mixture of experts" in reason
    assert "without" not in run("doctor", "--model", LLAMA)


def test_the_demo_is_attribute_with_its_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atp_fast import models

    monkeypatch.setattr(models, "load_model", lambda name: load_model(LLAMA))
    out = run("demo", "--out", tmp_path)
    model, tokenizer = load_model(LLAMA)
    pairs = tasks.ioi_pair(tokenizer)
    wanted = Engine(model).attribute(pairs, progress=False)
    found = Attribution.load(tmp_path / "run.safetensors")
    assert (found.method, found.metric, found.direction) == ("atp*", "logit_diff", "noising")
    for kind in wanted.space.kinds:
        assert torch.equal(found.contribution[kind], wanted.contribution[kind])
    assert pairs.tokens is not None and pairs.corrupted_tokens is not None
    clean, corrupted = ("".join(x[0]) for x in (pairs.tokens, pairs.corrupted_tokens))
    answer = tokenizer.decode(pairs.answer_ids)
    lines = [line.split(maxsplit=1) for line in out.splitlines()[:2]]
    assert lines == [["clean", f"{clean!r} -> {answer!r}"], ["corrupted", repr(corrupted)]]
    assert f"{len(wanted):,} nodes scored" in out
