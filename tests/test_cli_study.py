"""verify, diagnose and study on trained tiny models, and the engine's side of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from atp_fast import Attribution, Engine, Node, PatchEffects, PromptPairs, load_model
from atp_fast.attribution.question import METHODS
from atp_fast.cli import app
from atp_fast.patching import NodePatcher, moving_ids
from atp_fast.prompts.tasks import load_task
from atp_fast.results import ScoredNode
from atp_fast.results.agreement import agreement
from atp_fast.study import Blocks, Iterative, Plan, run_study
from atp_fast.study.cases import EngineCase, estimate_forwards

LLAMA = str(Path(__file__).parent / "data" / "tiny_llama_2L")


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_model(LLAMA)
    return Engine(model), load_task("ioi_pair", tokenizer), load_task("ioi", tokenizer, n_pairs=3)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(
        "attribute",
        "--model",
        LLAMA,
        "--task",
        "ioi_pair",
        "--metric",
        "logit_diff",
        "--out",
        folder,
    )
    return folder


def run(*args, code=0):
    """stdout and stderr of a command that ends with this exit code."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_engine_patcher_measures_what_patching_does(tiny):
    engine, _, pairs = tiny
    space = engine.plug.space(pairs.clean_ids.shape[1], ("q", "v", "neuron"))
    nodes = [space.node(int(i)) for i in moving_ids(space, pairs)[::97]]
    patcher = engine.patcher(pairs, nodes, "logit_diff")
    subsets = [[0], [3, 1], [], list(range(len(nodes)))]
    chosen = [[nodes[i] for i in subset] for subset in subsets]
    exact = engine.patch_subsets(pairs, chosen, metric="logit_diff").effect.numpy().T
    found = patcher.effects(subsets)
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)
    assert (found[2] == 0).all()
    on = [2, 0, 1, 1]
    one = patcher.effects(subsets, on)
    np.testing.assert_allclose(one, exact[range(4), on], rtol=1e-5, atol=1e-5)
    assert patcher.cost == 12 + 4


def test_moving_nodes_are_those_with_effects(tiny):
    engine, pairs, _ = tiny
    space = engine.plug.space(pairs.clean_ids.shape[1], ("q", "k", "v", "z"))
    moving = moving_ids(space, pairs)
    effect = engine.patch(pairs, list(space)).effect[0].numpy()
    assert set(np.flatnonzero(effect)) <= set(moving.tolist())
    first = int(pairs.split[0])
    assert {space.node(int(i)).position for i in moving} == set(range(first, space.positions))


def test_bound_missed_holds_on_a_model(tiny):
    engine, pairs, _ = tiny
    kinds = ("q", "k", "v", "z")
    best = engine.attribute(pairs, nodes=kinds).top(40)
    bound = engine.bound_missed(pairs, exclude=best, nodes=kinds, forwards=300, probability=0.1)
    rest = engine.patch(pairs, list(bound.nodes)).effect[0].abs().max()
    assert not set(bound.nodes) & set(best)
    # Interactions of this model hide a little of the effects: the 90 % bound (0.331) is just below the truth (0.338).
    assert bound.bounds[0] < bound.bounds[1] < bound.bounds[2]
    assert 0.9 * float(rest) < bound.bounds[0]
    assert float(rest) < bound.bounds[2]
    with pytest.raises(ValueError, match="exclude must leave at least one"):
        engine.bound_missed(
            pairs, exclude=list(engine.plug.space(pairs.clean_ids.shape[1], ("q",))), nodes=("q",)
        )


def test_estimates_cost_what_the_convention_says():
    assert estimate_forwards("atp", 30) == 4.0
    assert estimate_forwards("atp+qk", 30, pairs=3) == 15.0
    assert estimate_forwards("atp+graddrop", 30) == 2 + 31
    assert estimate_forwards("atp*", 30, backward=3.0, qk_fix=0.5) == 2 + 3 * 15.5 + 0.5


def test_study_on_a_model(tiny, tmp_path):
    engine, pair, pairs = tiny
    plan = Plan(seeds=2, top=30, verified=10, forwards=200, probability=0.1, diagnose=("atp*",))
    cases = [
        EngineCase(engine, "ioi_pair", "attention", pair, metric="logit_diff"),
        EngineCase(engine, "ioi", "neuron", pairs, metric="logit_diff", sample=50, best=20),
    ]
    study = run_study(cases, tmp_path, plan)
    for case in cases:
        rows = {r["method"]: r for r in study.results if r["task"] == case.task}
        assert rows["oracle"]["irwrgm"] == 1.0
        # With two layers GradDrop scores a first-layer node 0 when all of its effect passes through the second.
        assert rows["atp"]["irwrgm"] < rows["iterative"]["irwrgm"]
        assert rows["atp"]["cost_10"] < rows["iterative"]["cost_10"]
    attention, neurons = (next(r for r in study.results if r["task"] == c.task) for c in cases)
    assert attention["nodes"] == len(cases[0].moving)
    assert 50 < neurons["nodes"] <= 50 + 4 * 20
    assert neurons["pairs"] == 3
    # The truth is the exact effect of every candidate.
    best = engine.attribute(pair, metric="logit_diff", nodes=("q", "k", "v", "z")).top(1)
    exact = engine.patch(pair, best, metric="logit_diff").mean_abs
    (largest,) = {row["largest_of_all"] for row in study.bounds if row["task"] == "ioi_pair"}
    assert largest == pytest.approx(float(exact), rel=1e-5)
    again = [EngineCase(engine, "ioi_pair", "attention", pair, metric="logit_diff")]
    assert run_study(again, tmp_path, plan).results == study.results[: len(study.results) // 2]


RAGGED = [
    ("When Mary and John went to the store , John gave a drink to", "Tom", "Mary"),
    ("Mary and John went to the store , John gave a drink to", "Mary", "Mary"),
    ("John went to the store , John gave a drink to", "Mary", "Tom"),
]


@pytest.fixture(scope="module")
def exact_engine():
    return Engine(load_model(LLAMA, dtype="float64")[0])


@pytest.fixture(scope="module", params=["right", "left"])
def ragged(request):
    """Pairs of 15, 14 and 12 tokens that differ in the second giver's name."""
    _, tokenizer = load_model(LLAMA)
    clean = [text for text, _, _ in RAGGED]
    corrupted = [text.replace(", John", f", {name}") for text, name, _ in RAGGED]
    return PromptPairs.from_text(
        tokenizer,
        clean=clean,
        corrupted=corrupted,
        answers=[answer for _, _, answer in RAGGED],
        wrong_answers=["John"] * 3,
        padding_side=request.param,
    )


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("family", ["attention", "neuron"])
def test_ragged_pairs_in_a_study(exact_engine, ragged, family, direction):
    """Scores and truth are means over all pairs, to which a pair adds 0 where it has no token."""
    engine = exact_engine
    assert len(set(ragged.lengths.tolist())) == 3
    case = EngineCase(
        engine, "t", family, ragged, metric="logit_diff", direction=direction, sample=30, best=8
    )
    kinds = ("q", "k", "v", "z") if family == "attention" else ("neuron",)
    space = engine.plug.space(ragged.clean_ids.shape[1], kinds)
    moving = [space.node(int(flat)) for flat in case.moving]
    columns = {node.position for node in moving}
    first = ragged.starts + ragged.split
    live = [
        (columns_of >= f) & (columns_of <= z)
        for columns_of, f, z in (
            (torch.arange(space.positions), f, z) for f, z in zip(first, ragged.last, strict=True)
        )
    ]
    assert columns == set(torch.stack(live).any(0).nonzero().flatten().tolist())
    for method in ("atp", "atp*"):
        alone = [
            engine.attribute(pair, "logit_diff", method, kinds, direction, True, False).per_pair
            for pair in ragged
        ]
        wanted = [
            sum(abs(float(x[n.kind][0, n.layer, n.position, n.index])) for x in alone) / 3
            for n in moving
        ]
        np.testing.assert_allclose(case.estimate(method).scores, wanted, rtol=1e-9, atol=1e-14)
    ids = case.candidates({method: case.estimate(method).scores for method in case.estimators})
    nodes = [moving[i] for i in ids]
    patched = np.abs(case.patcher(ids).effects([[i] for i in range(len(nodes))])).mean(1)
    chosen = [*np.argsort(-patched)[:6], *range(0, len(nodes), 29)]
    some = [nodes[i] for i in chosen]
    exact = np.array(
        [
            sum(
                abs(float(engine.patch(pair, [n], "logit_diff", direction, False).effect))
                for pair in ragged
                if pair.attention_mask[0, n.position]
            )
            / 3
            for n in some
        ]
    )
    np.testing.assert_allclose(patched[chosen], exact, rtol=1e-9, atol=1e-12)
    assert exact.max() > 1e-3


def timeless(study):
    """Everything but what was measured in seconds."""

    def kept(rows):
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]

    return [kept(rows) for rows in (study.results, study.settings, study.curves, study.bounds)]


FEW = Plan(
    seeds=1,
    top=15,
    verified=4,
    forwards=60,
    probability=0.2,
    diagnose=("atp*",),
    settings=lambda nodes, pairs: {"iterative": [Iterative()], "blocks": [Blocks(9), Blocks(20)]},
)


def test_a_stopped_study_of_a_model_patches_nothing_twice(tiny, ragged, tmp_path, monkeypatch):
    """Stopped in any of its calls and started again: what finished pieces hold is not measured again."""
    engine, _, _ = tiny
    done = []  # finished pieces, and subsets asked for, at each call

    def study(folder, life=None):
        def counted(self, subsets, pair=None):
            done.append((len(list(folder.glob("pieces/*.npz"))), [tuple(s) for s in subsets]))
            if len(done) - 1 == life:
                raise KeyboardInterrupt
            return own(self, subsets, pair)

        done.clear()
        monkeypatch.setattr(NodePatcher, "effects", counted)
        case = EngineCase(engine, "ioi", "neuron", ragged, metric="logit_diff", sample=20, best=5)
        return run_study([case], folder, FEW)

    own = NodePatcher.effects
    whole = timeless(study(tmp_path / "whole"))
    calls = list(done)
    single = [subset for _, subsets in calls for subset in subsets if len(subset) == 1]
    assert sorted(single) == [(i,) for i in range(len(single))]  # the truth, and never again
    for life in range(len(calls)):
        folder = tmp_path / str(life)
        with pytest.raises(KeyboardInterrupt):
            study(folder, life)
        pieces = [count for count, _ in done]
        again = pieces[:life].count(pieces[life])
        assert timeless(study(folder)) == whole
        assert [subsets for _, subsets in done] == [s for _, s in calls[life - again :]]
    assert timeless(study(folder)) == whole
    assert done == []


ENGINE_CASES = {
    "metric": {"metric": "prob_diff"},
    "direction": {"direction": "denoising"},
    "pairs": {"pairs": slice(0, 2)},
    "model": {"model": "tiny_gpt2_3L"},
    "dtype": {"dtype": "float64"},
    "precision": {"precision": "bf16"},
    "family": {"family": "attention"},
    "sample": {"sample": 40},
    "best": {"best": 12},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("name", ENGINE_CASES)
def test_pieces_of_another_question_are_not_taken(tmp_path, name, monkeypatch):
    """In the folder of another model, metric, ... a study gives the tables of a folder of its own."""

    def study(folder, model="tiny_llama_2L", dtype=None, precision=None, pairs=slice(3), **asked):
        network, tokenizer = load_model(str(Path(LLAMA).parent / model), dtype=dtype)
        given = {"family": "neuron", "metric": "logit_diff", "sample": 20, "best": 5} | asked
        family = given.pop("family")
        some = load_task("ioi", tokenizer, n_pairs=3)[pairs]
        engine = Engine(network, precision=precision)
        plan = Plan(seeds=1, top=15, verified=4, forwards=60, settings=lambda *_: {}, diagnose=())
        return timeless(run_study([EngineCase(engine, "t", family, some, **given)], folder, plan))

    def counted(self, *args, **kwargs):
        estimated.append(kwargs["method"])
        return own(self, *args, **kwargs)

    own, estimated = Engine.attribute, []
    monkeypatch.setattr(Engine, "attribute", counted)
    old = study(tmp_path / "one")
    estimated.clear()
    new = study(tmp_path / "one", **ENGINE_CASES[name])
    if name in ("sample", "best", "seed"):  # the same scores, other candidates
        assert new != old
        assert estimated == []
    else:
        assert estimated == list(METHODS)
    assert new == study(tmp_path / "two", **ENGINE_CASES[name])


def test_family_is_checked(tiny):
    engine, pair, _ = tiny
    with pytest.raises(ValueError, match="family must be among attention, neuron, got 'heads'"):
        EngineCase(engine, "ioi_pair", "heads", pair)


def test_agreement_by_hand():
    estimates = [(4.0, -4.0), (3.0, 3.0), (2.0, 2.0), (1.0, -1.0)]
    nodes = [ScoredNode("z", 0, t, 0, c, e) for t, (c, e) in enumerate(estimates)]
    exact = PatchEffects(
        effect=torch.tensor([[-3.0, 4.0, -0.5, -1.0]]),
        clean_value=torch.zeros(1),
        nodes=list(nodes),
        metric="nll",
        direction="noising",
        backend="reference",
        model="toy",
    )
    found = agreement(nodes, exact, "atp")
    # Estimated ranks 4 3 2 1, exact 3 4 1 2.
    assert found.rank_correlation == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert found.same_sign == pytest.approx(8.0 / 8.5)
    assert [found.precision(k) for k in (1, 2, 3, 4)] == [0.0, 1.0, pytest.approx(2 / 3), 1.0]
    assert found.precisions() == {1: 0.0}
    assert [row.node.position for row in found.worst(2)] == [2, 0]
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\], got 5"):
        found.precision(5)
    with pytest.raises(ValueError, match="exact must be the patch effects of the estimated nodes"):
        agreement(nodes[::-1], exact)
    with pytest.raises(ValueError, match="estimated must hold at least one node, got none"):
        agreement([], exact)


def test_verify_then_diagnose(finished_run):
    stdout, _ = run("verify", finished_run, "--top", 60, "--worst", 3)
    assert "60 nodes patched exactly: rank correlation of atp*" in stdout
    assert "3 worst disagreements" in stdout
    exact = PatchEffects.load(finished_run / "verified.safetensors")
    best = Attribution.load(finished_run / "run.safetensors").top(60)
    assert exact.nodes == best
    with (finished_run / "verified.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["contribution"]) for row in rows] == [n.contribution for n in best]
    assert [float(row["exact_effect"]) for row in rows] == exact.mean.tolist()
    numbers = json.loads((finished_run / "verified.json").read_text())
    assert numbers["rank_correlation"] > 0.9
    assert "estimated by atp*" in (finished_run / "verified.html").read_text()

    stdout, _ = run(
        "diagnose", finished_run, "--nodes", "k,z", "--forwards", 60, "--probability", 0.2,
        "--confidence", "0.5,0.9",
    )  # fmt: skip
    bound = json.loads((finished_run / "bound.json").read_text())
    assert list(bound["bounds"]) == ["0.5", "0.9"]
    assert "with 90 % confidence none has |effect| >=" in stdout
    assert bound["assumptions"] == " ".join(
        stdout[stdout.index("Assumes") :].split("wrote")[0].split()
    )
    assert bound["forwards"] == 60


def test_verify_some_kinds(finished_run, tmp_path):
    run("verify", finished_run, "--top", 5, "--nodes", "k")
    nodes = PatchEffects.load(finished_run / "verified.safetensors").nodes
    assert [node.kind for node in nodes] == ["k"] * 5


def test_study_command_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))  # the picture has a test of its own
    options = [
        "study", "--model", LLAMA, "--tasks", "ioi_pair,ioi:2", "--seeds", 1, "--top", 20,
        "--verified", 5, "--forwards", 100, "--probability", 0.1, "--metric", "logit_diff",
        "--out", tmp_path,
    ]  # fmt: skip
    stdout, _ = run(*options)
    for name in ("results.csv", "bounds.csv", "summary.md", "curves.html"):
        assert f"wrote {tmp_path / name}" in stdout
    assert (tmp_path / "summary.md").read_text().startswith(f"# Method study on {LLAMA}\n")
    first = (tmp_path / "results.csv").read_text()
    assert "ioi,attention,2," in first
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "pieces").iterdir()}
    run(*options)
    assert (tmp_path / "results.csv").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pieces").iterdir()} == pieces


def test_errors_of_the_command_line(tmp_path, finished_run):
    def error(*args):
        _, stderr = run(*args, code=2)
        (line,) = stderr.strip().splitlines()
        return line

    assert "run must be a folder of `atp-fast attribute`" in error("verify", tmp_path)
    assert "run `atp-fast verify" in error("diagnose", tmp_path)
    run("verify", finished_run, "--top", 5)
    for text in ("1.5", "nan"):
        assert "confidence must lie strictly between 0 and 1" in error(
            "diagnose", finished_run, "--confidence", text
        )
    assert "confidence must be numbers with commas" in error(
        "diagnose", finished_run, "--confidence", "high"
    )
    assert "every node needs at least 2 samples in the subset" in error(
        "diagnose", finished_run, "--forwards", 3
    )
    assert "tasks must be names, or names with :n" in error(
        "study", "--model", LLAMA, "--tasks", "ioi:x", "--out", tmp_path
    )
    assert "family must be among" in error(
        "study", "--model", LLAMA, "--families", "head", "--tasks", "ioi_pair", "--out", tmp_path
    )
    pairs = finished_run / "pairs.jsonl"
    record = json.loads(pairs.read_text())
    text = pairs.read_text()
    try:
        record["answer_ids"] += 1
        pairs.write_text(json.dumps(record) + "\n")
        assert "must hold the pairs of" in error("verify", finished_run)
    finally:
        pairs.write_text(text)


def test_nodes_of_the_run_survive_in_the_bound(tiny):
    engine, pair, _ = tiny
    bound = engine.bound_missed(
        pair, exclude=[Node("z", 1, 0, 0)], nodes=("z",), forwards=200, probability=0.2
    )
    # A verified node before the first differing token is no candidate, and no error.
    assert len(bound.nodes) == len(moving_ids(engine.plug.space(15, ("z",)), pair))
