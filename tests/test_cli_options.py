"""Every option of every verb reaches its place, and chained verbs give the numbers of the Python API."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from atp_fast import Attribution, Engine, PatchEffects, PromptPairs, load_model, metrics, tasks
from atp_fast.cli import app, options
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
        "--out": folder / "task",
        "--top": 3,
        "--table-rows": 4,
    }
    prompts = {"--task": "induction", "--n-pairs": 5, "--seed": 7}
    given = {"--model": GPT2, **prompts, **method}
    out = run("attribute", *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": GPT2, "dtype": "float64"}
    load = only(calls, "load_task")
    assert (load["name"], load["n_pairs"], load["seed"]) == ("induction", 5, 7)
    engine = only(calls, "Engine.__init__")
    assert (engine["backend"], engine["precision"]) == ("reference", "bf16")
    assert engine["memory_budget"] == "123MB"
    sharded = only(calls, "attribute_sharded")
    assert (sharded["metric"], sharded["method"]) == ("prob_diff", "atp+qk")
    assert (sharded["nodes"], sharded["direction"]) == (("z", "attn_out"), "denoising")
    assert (sharded["shard_size"], sharded["folder"]) == (2, folder / "task" / "shards")
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
        "--model": LLAMA,
        "--backend": "reference",
    }
    out = run("verify", done, *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": LLAMA, "dtype": "float32"}
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
        "--model": LLAMA,
        "--backend": "reference",
    }
    run("diagnose", done, *(x for pair in given.items() for x in pair))
    assert only(calls, "load_model") == {"name": LLAMA, "dtype": "float32"}
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
    return {"--model"}


VERBS = {
    function.__name__: function
    for function in (attribute, verify, diagnose, study, report, bench, demo, doctor)
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
    assert set(command.commands) - {"mib"} == set(VERBS)


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


CHAINS = [
    ("prob_diff", "denoising", None, "k,z,mlp_out", "z,mlp_out"),
    ("kl", "noising", "bf16", "q,v,resid_pre", "q,v,resid_pre"),
    ("nll", "denoising", "bf16", "z,neuron", "z"),
]


@pytest.mark.parametrize(("metric", "direction", "precision", "nodes", "some"), CHAINS)
def test_chained_verbs_give_the_numbers_of_the_engine(
    tmp_path: Path, metric: str, direction: Any, precision: str | None, nodes: str, some: str
) -> None:
    model, tokenizer = load_model(LLAMA, dtype="float64")
    pairs = tasks.load_task("ioi", tokenizer, n_pairs=3, seed=1)
    budget = "400KB"
    engine = Engine(model, "reference", precision, budget)
    kinds, few = nodes.split(","), some.split(",")
    found = engine.attribute(pairs, metric, "atp+qk", kinds, direction, progress=False)
    asked = ["--task", "ioi", "--n-pairs", 3, "--seed", 1, "--metric", metric, "--method", "atp+qk"]
    asked += ["--nodes", nodes, "--direction", direction, "--backend", "reference"]
    asked += ["--dtype", "float64", "--memory-budget", budget, "--out", tmp_path]
    asked += ["--precision", precision] if precision else []
    run("attribute", "--model", LLAMA, *asked)
    saved = Attribution.load(tmp_path / "run.safetensors")
    for kind in kinds:
        assert torch.equal(saved.contribution[kind], found.contribution[kind])
        assert torch.equal(saved.effect[kind], found.effect[kind])
    run("verify", tmp_path, "--top", 7, "--nodes", some, "--backend", "reference")
    best = found.top(7, few)
    exact = engine.patch(pairs, best, metric, direction, progress=False)
    verified = PatchEffects.load(tmp_path / "verified.safetensors")
    assert verified.nodes == best
    torch.testing.assert_close(verified.effect, exact.effect, rtol=1e-9, atol=1e-12)
    chance = ("--forwards", 60, "--probability", 0.25, "--seed", 3, "--confidence", "0.75")
    run("diagnose", tmp_path, "--nodes", some, *chance, "--backend", "reference")
    bound = engine.bound_missed(
        pairs,
        best,
        metric,
        direction,
        few,
        [0.75],
        forwards=60,
        probability=0.25,
        seed=3,
        progress=False,
    )
    said = json.loads((tmp_path / "bound.json").read_text())
    assert said["bounds"]["0.75"] == pytest.approx(bound.bounds[0], rel=1e-9)
    assert said["nodes"] == len(bound.nodes)
    assert isinstance(pairs, PromptPairs)
