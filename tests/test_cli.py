"""The command line on the trained tiny models: what it prints, what it writes, and how it fails."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import atp_fast
from atp_fast import Attribution, Engine, Node, PromptPairs, load_model, models, ops
from atp_fast.cli import app

DATA = Path(__file__).parent / "data"
LLAMA, GPT2 = str(DATA / "tiny_llama_2L"), str(DATA / "tiny_gpt2_3L")
CLEAN = "When Mary and John went to the store , John gave a drink to"
CORRUPTED = "When Mary and John went to the store , Tom gave a drink to"
PAIR = [*("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "Mary", "--wrong-answer", "John")]


def run(*args, code=0):
    """stdout and stderr of a command that ends with this exit code."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def attribute(out, *args, model=LLAMA, code=0):
    return run("attribute", "--model", model, "--out", out, *args, code=code)


def error_of(stderr):
    """The one line that an error is."""
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_attribute_writes_what_the_engine_finds(tmp_path, model):
    stdout, _ = attribute(tmp_path / "run", *PAIR, "--metric", "logit_diff", model=model)
    found = Attribution.load(tmp_path / "run" / "run.safetensors")
    assert (found.method, found.metric, found.direction) == ("atp*", "logit_diff", "noising")
    assert found.space.kinds == ("q", "k", "v", "z", "neuron")

    network, tokenizer = load_model(model)
    pairs = PromptPairs.from_text(
        tokenizer, clean=[CLEAN], corrupted=[CORRUPTED], answers=["Mary"], wrong_answers=["John"]
    )
    expected = Engine(network).attribute(pairs, metric="logit_diff")
    for kind in found.space.kinds:
        assert torch.equal(found.contribution[kind], expected.contribution[kind])
    best = expected.top(1)[0]
    first = next(line for line in stdout.splitlines() if line.startswith("│  1 │"))
    cells = [cell.strip() for cell in first.strip("│").split("│")]
    assert cells == [
        *("1", best.kind, str(best.layer), str(best.position), best.token, str(best.index)),
        *(f"{best.contribution:.5f}", f"{best.effect:+.5f}"),
    ]


def test_the_circuit_is_found(tmp_path):
    """The duplicated name is where the prompts differ and where a name mover looks from: the last position."""
    attribute(tmp_path, *PAIR, "--metric", "logit_diff", "--nodes", "z,k", "--top", 5)
    found = Attribution.load(tmp_path / "run.safetensors")
    assert {node.token for node in found.top(3, kinds=("z",))} <= {"to", "John", "gave"}
    assert float(found.clean_value) > 3 > float(found.corrupted_value)


def test_table_rows_are_the_best_nodes(tmp_path):
    attribute(tmp_path, *PAIR, "--table-rows", 7)
    with (tmp_path / "nodes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = Attribution.load(tmp_path / "run.safetensors")
    assert list(rows[0]) == [
        "kind",
        "layer",
        "position",
        "token",
        "index",
        "contribution",
        "effect",
    ]
    assert [
        Node(row["kind"], int(row["layer"]), int(row["position"]), int(row["index"]))
        for row in rows
    ] == found.top(7)
    assert float(rows[0]["contribution"]) == found.top(1)[0].contribution


def test_more_rows_than_nodes_shows_all(tmp_path):
    stdout, _ = attribute(tmp_path, *PAIR, "--nodes", "attn_out", "--top", 999)
    assert "Top 30 nodes" in stdout  # 2 layers, 15 tokens with BOS


def test_the_folder_holds_the_pairs_again(tmp_path):
    attribute(tmp_path / "a", *PAIR, *PAIR)
    _, tokenizer = load_model(LLAMA)
    again = PromptPairs.from_jsonl(tmp_path / "a" / "pairs.jsonl", tokenizer)
    found = Attribution.load(tmp_path / "a" / "run.safetensors")
    assert len(again) == 2
    assert again.digest() == found.metadata["pairs_digest"]


def test_the_report_is_written_with_the_prompt(tmp_path):
    stdout, _ = attribute(tmp_path, *PAIR)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'class="token"[^>]*>([^<]*)<', page) == ["&lt;bos&gt;", *CLEAN.split()]
    assert "<mark>Tom</mark>" in page
    assert f"wrote {tmp_path / 'report.html'}" in stdout


def test_report_is_written_again_from_the_file(tmp_path):
    attribute(tmp_path / "run", *PAIR, "--nodes", "z")
    page = (tmp_path / "run" / "report.html").read_text()
    run("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    _, stderr = run("report", tmp_path, code=2)
    assert f"no result file at {tmp_path / 'run.safetensors'}" in error_of(stderr)


def test_pairs_from_jsonl_and_csv_agree_with_text(tmp_path):
    record = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": "Mary"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "p.csv").write_text(f'clean,corrupted,label\n"{CLEAN}","{CORRUPTED}",Mary\n')
    runs = []
    for name, source in (
        ("text", ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "Mary"]),
        ("jsonl", ["--pairs", tmp_path / "p.jsonl"]),
        ("csv", ["--pairs", tmp_path / "p.csv"]),
    ):
        attribute(tmp_path / name, *source, "--nodes", "z", "--metric", "nll")
        runs.append(Attribution.load(tmp_path / name / "run.safetensors"))
    assert torch.equal(runs[0].effect["z"], runs[1].effect["z"])
    assert torch.equal(runs[0].effect["z"], runs[2].effect["z"])


def test_options_reach_the_engine(tmp_path):
    attribute(
        tmp_path,
        *PAIR,
        *("--method", "atp", "--metric", "kl", "--nodes", "resid_pre, mlp_out"),
        *("--direction", "denoising", "--backend", "reference", "--dtype", "float64"),
    )
    found = Attribution.load(tmp_path / "run.safetensors")
    assert (found.method, found.metric, found.direction) == ("atp", "kl", "denoising")
    assert found.backend == "reference"
    assert set(found.space.kinds) == {"resid_pre", "mlp_out"}
    assert found.effect["mlp_out"].dtype == torch.float64


def test_task_with_its_options(tmp_path):
    attribute(tmp_path, "--task", "induction", "--n-pairs", 3, "--seed", 5, "--nodes", "z")
    assert len(Attribution.load(tmp_path / "run.safetensors").clean_value) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nodes", "z"], "exactly one of --task, --pairs and --clean is needed, got none"),
        ([*PAIR, "--task", "ioi"], "got --task and --clean"),
        (["--task", "iou"], "'iou'"),
        (["--pairs", "pairs.txt"], "pairs must be a .jsonl or .csv file, got 'pairs.txt'"),
        (["--pairs", "missing.jsonl"], "missing.jsonl"),
        ([*PAIR, "--method", "atp**"], "'atp**'"),
        ([*PAIR, "--nodes", "z,o"], "'o'"),
        ([*PAIR, "--metric", "loss"], "'loss'"),
        ([*PAIR, "--direction", "up"], "direction must be 'noising' or 'denoising', got 'up'"),
        ([*PAIR, "--backend", "cuda"], "backend must be among auto, reference, cpp, triton, got 'cuda'"),
        ([*PAIR, "--dtype", "int4"], "dtype must be among"),
        (["--clean", CLEAN, "--answer", "Mary"], "corrupted must have 1 entries as clean has, got 0"),
        ([*PAIR[:6], "--metric", "logit_diff"], "wrong_answer_ids"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, args, message):
    _, stderr = attribute(tmp_path / "run", *args, code=2)
    assert message in error_of(stderr)
    assert not list(tmp_path.glob("run/*"))


def test_pair_of_different_lengths_shows_both(tmp_path):
    pair = ["--clean", "When Mary and John went", "--corrupted", "When Mary went", "--answer", "to"]
    _, stderr = attribute(tmp_path, *pair, code=2)
    assert stderr.startswith("error: ")
    assert "'and'" in stderr
    assert "'went'" in stderr


def test_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    _, stderr = attribute(tmp_path / "file" / "run", *PAIR, code=2)
    assert "out must be a folder that can be written, got" in error_of(stderr)


def test_refused_model_names_class_and_reason(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=276, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    load_model(LLAMA)[1].save_pretrained(tmp_path / "mamba")
    _, stderr = attribute(tmp_path / "run", *PAIR, model=tmp_path / "mamba", code=2)
    assert "MambaForCausalLM" in error_of(stderr)
    stdout, _ = run("doctor", "--model", tmp_path / "mamba", code=1)
    assert f"{tmp_path / 'mamba'}: refused: " in stdout
    assert "MambaForCausalLM" in stdout


def test_debug_shows_the_traceback():
    done = subprocess.run(
        [sys.executable, "-c", "from atp_fast.cli import app; app()", "attribute", "--model", "x", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "ValueError: exactly one of" in done.stderr


def test_a_pipe_sees_no_progress(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from atp_fast.cli import app; app()", "attribute", "--model", LLAMA,
         "--out", str(tmp_path), *PAIR, "--nodes", "z"],
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert "Top 20 nodes" in done.stdout


def test_identical_prompts_are_a_warning_of_one_line(tmp_path):
    _, stderr = attribute(
        tmp_path,
        *("--clean", CLEAN, "--corrupted", CLEAN, "--answer", "Mary"),
        *("--nodes", "z", "--metric", "nll"),
    )
    assert stderr.startswith("warning: ")
    assert "identical" in stderr
    assert stderr.count("\n") == 1
    found = Attribution.load(tmp_path / "run.safetensors")
    assert not found.contribution["z"].any()


def test_doctor_says_what_is_there():
    stdout, _ = run("doctor")
    assert stdout.splitlines()[0].split() == ["atp_fast", atp_fast.__version__]
    assert "backend cpp        available" in stdout


def test_bench_times_every_op():
    sizes = ["--positions", 9, "--heads", 2, "--head-dim", 8, "--cotangents", 3, "--rounds", 2]
    stdout, _ = run("bench", *sizes)
    assert "9 tokens, 2 heads of 8, 3 cotangents, float32" in stdout
    rows = [line.split("│") for line in stdout.splitlines() if line.startswith("│")]
    timed = {cells[1].strip(): [float(cell) for cell in cells[2:-1]] for cells in rows}
    assert set(timed) == {name for name in ops.__all__ if name.islower()} - {
        "availability",
        "backend_for",
    }
    assert all(numbers[-1] > 0 for numbers in timed.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dtype", "int8"], "--dtype must be among float32"),
        (["--device", "tpu"], "--device must be among auto"),
    ],
)
def test_bench_names_what_it_cannot_do(args, message):
    _, stderr = run("bench", "--positions", 4, *args, code=2)
    assert message in stderr


def test_doctor_of_a_served_model():
    stdout, _ = run("doctor", "--model", LLAMA)
    assert f"{LLAMA}: served (LlamaForCausalLM)" in stdout
    facts = dict(line.rsplit(maxsplit=1) for line in stdout.splitlines()[-5:])
    assert {key.strip(): value for key, value in facts.items()} == {
        "layers": "2",
        "query heads": "4",
        "key/value heads": "2",
        "neurons per layer": "168",
        "context": "32",
    }


def test_doctor_says_what_the_engine_does(monkeypatch):
    """Also of what only opening an engine tries."""

    def refuse(plug):
        raise NotImplementedError(f"{plug.name} is not served: its cotangents differ")

    monkeypatch.setattr("atp_fast.engine.check_walk", refuse)
    stdout, _ = run("doctor", "--model", LLAMA, code=1)
    assert "refused: LlamaForCausalLM is not served: its cotangents differ" in stdout


def test_doctor_of_an_encoder_decoder(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    stdout, _ = run("doctor", "--model", tmp_path, code=1)
    assert "refused: model must be a decoder-only language model" in stdout


def test_demo_from_end_to_end(tmp_path, monkeypatch):
    """The demo's own way, with a tiny model that shares its weights' names in place of the 135M one."""
    monkeypatch.setattr(models, "load_model", lambda name: load_model(LLAMA))
    stdout, _ = run("demo", "--out", tmp_path, "--top", 3)
    assert "Top 3 nodes" in stdout
    assert sorted(os.listdir(tmp_path)) == [
        "nodes.csv",
        "pairs.jsonl",
        "report.html",
        "run.safetensors",
    ]


def test_version_and_help():
    assert run("--version")[0].strip() == atp_fast.__version__
    stdout, _ = run("attribute", "--help")
    assert "--memory-budget" in stdout
