"""Runs in shards: the same bits from 1, 2 and 4 processes and from Ray, resumed after a kill, failures that name."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import sharded
from atp_fast import Attribution, PromptPairs, load_model
from atp_fast.cli import app
from atp_fast.distributed import ShardError, attribute_sharded, ray_sweep, remove_shards
from atp_fast.distributed.processes import _Team
from atp_fast.distributed.shards import Question, Shards, cut, describe_engine, named
from sharded import MODEL, OPTIONS, TROUBLED, difference

TESTS = Path(__file__).parent
TEMPORARY = ".000004.safetensors.123.tmp"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Every process of a run has as many; torchrun gives each of its own one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine():
    return sharded.make_engine()


@pytest.fixture(scope="module")
def pairs():
    return sharded.make_pairs()


@pytest.fixture(scope="module")
def whole(engine, pairs, tmp_path_factory):
    """The run of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    return attribute_sharded(engine, pairs, folder, metric=difference, **OPTIONS)


def torchrun(processes, *command, trouble="", code=0):
    """stdout and stderr of torchrun, whose exit code is 0, or not."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TROUBLE": trouble},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == bool(code), done.stderr
    return done.stdout, done.stderr


def assert_same_bits(a, b):
    assert a.space == b.space
    for name in ("contribution", "effect"):
        for kind in a.space.kinds:
            assert torch.equal(getattr(a, name)[kind], getattr(b, name)[kind]), (name, kind)
    for name in ("counts", "clean_value", "corrupted_value"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def shard_files(folder):
    return sorted(path.name for path in folder.glob("0*.safetensors"))


# ---- one process


def test_one_shard_is_the_engine_s_own_result(tmp_path, engine, pairs):
    found = attribute_sharded(engine, pairs, tmp_path, per_pair=True)
    expected = engine.attribute(pairs, per_pair=True)
    assert_same_bits(found, expected)
    for kind in expected.space.kinds:
        assert torch.equal(found.per_pair[kind], expected.per_pair[kind])
    assert found.metadata["pairs_digest"] == pairs.digest()
    assert found.tokens == expected.tokens and found.prompts == expected.prompts


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_shards_add_up_to_the_whole(tmp_path, direction):
    """In float64, on pairs padded on the left: rounding alone is left, a wrong count or row would show."""
    engine = sharded.Engine(load_model(MODEL, dtype="float64")[0])
    pairs = sharded.make_pairs("left")
    options = {"direction": direction, "per_pair": True, "method": "atp+qk"}
    found = attribute_sharded(engine, pairs, tmp_path, shard_size=3, **options)
    expected = engine.attribute(pairs, **options)
    assert torch.equal(found.counts, expected.counts)
    for kind in expected.space.kinds:
        for name in ("contribution", "effect", "per_pair"):
            a, b = getattr(found, name)[kind], getattr(expected, name)[kind]
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.clean_value, expected.clean_value)
    assert (found.direction, found.method) == (direction, "atp+qk")
    seconds = [
        float(Attribution.load(tmp_path / name).metadata["seconds"])
        for name in shard_files(tmp_path)
    ]
    assert float(found.metadata["seconds"]) == pytest.approx(sum(seconds), abs=1e-3)
    assert sum(seconds) > max(seconds) > 0


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_sum_has_the_labels_of_its_direction(tmp_path, engine, direction):
    clean, corrupted = torch.tensor([[20, 30, 40]] * 3), torch.tensor([[20, 31, 40]] * 3)
    texts = {"tokens": [["a", "b", "c"]] * 3, "corrupted_tokens": [["a", "B", "c"]] * 3}
    pairs = PromptPairs(clean, corrupted, torch.tensor([5] * 3), **texts)
    options = {"metric": "nll", "nodes": ("z",), "direction": direction}
    found = attribute_sharded(engine, pairs, tmp_path, shard_size=2, **options)
    assert found.tokens == ["a", {"noising": "b", "denoising": "B"}[direction], "c"]


def test_every_pair_is_in_one_shard_and_late_splits_go_together(pairs):
    rows = cut(pairs, 4)
    assert [len(shard) for shard in rows] == [4, 4, 3]
    assert sorted(torch.cat(rows).tolist()) == list(range(11))
    for before, after in itertools.pairwise(rows):
        assert int(pairs.split[before].min()) >= int(pairs.split[after].max())


def test_a_finished_run_computes_nothing_again(tmp_path, engine, pairs, monkeypatch):
    first = attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    monkeypatch.setattr(engine, "attribute", lambda *a, **k: pytest.fail("a pair was run again"))
    assert_same_bits(attribute_sharded(engine, pairs, tmp_path, **OPTIONS), first)


def test_a_shard_of_other_pairs_is_computed_again(tmp_path, engine, pairs):
    """A file that is whole and of this model, but under another shard's number."""
    first = attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    right = (tmp_path / "000002.safetensors").read_bytes()
    (tmp_path / "000002.safetensors").write_bytes((tmp_path / "000000.safetensors").read_bytes())
    assert_same_bits(attribute_sharded(engine, pairs, tmp_path, **OPTIONS), first)
    again = Attribution.load(tmp_path / "000002.safetensors")
    (tmp_path / "right").write_bytes(right)
    assert_same_bits(again, Attribution.load(tmp_path / "right"))


def test_progress_counts_pairs_and_is_quiet_in_a_pipe(tmp_path, engine, pairs, capsys):
    attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    assert capsys.readouterr().err == ""
    (tmp_path / "000002.safetensors").unlink()
    attribute_sharded(engine, pairs, tmp_path, progress=True, **OPTIONS)
    err = capsys.readouterr().err
    assert "9/11" in err
    assert "atp* pairs" in err


CHANGES = {
    "method is 'atp*' there and 'atp' here": {"method": "atp"},
    "metric is 'logit_diff' there and 'prob_diff' here": {"metric": "prob_diff"},
    "nodes is ['q', 'k', 'z', 'neuron'] there and ['z'] here": {"nodes": ("z",)},
    "direction is 'noising' there and 'denoising' here": {"direction": "denoising"},
    "per_pair is False there and True here": {"per_pair": True},
    "shard_size is 2 there and 3 here": {"shard_size": 3},
    "pairs is 11 there and 10 here": {"pairs": slice(0, 10)},
    "pairs_digest is ": {"pairs": [1, 0, *range(2, 11)]},
}


@pytest.mark.parametrize("message", CHANGES)
def test_the_folder_of_another_run_is_refused(tmp_path, engine, pairs, message):
    attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    change = CHANGES[message]
    if "pairs" in change:
        pairs, change = pairs[change["pairs"]], {}
    with pytest.raises(ValueError, match="must hold shards of this run") as error:
        attribute_sharded(engine, pairs, tmp_path, **OPTIONS | change)
    assert message in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_columns_other_model_and_other_dtype_are_other_runs(tmp_path, engine, pairs):
    attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"columns_digest is '\w+' there and '\w+' here; take"):
        attribute_sharded(engine, sharded.make_pairs("left"), tmp_path, **OPTIONS)
    other = sharded.Engine(load_model(MODEL.replace("llama_2L", "gpt2_3L"), dtype="float64")[0])
    with pytest.raises(ValueError, match=r"model is '.*' there and '.*gpt2_3L' here, model_class"):
        attribute_sharded(other, pairs, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="dtype is 'float32' there and 'float64' here"):
        attribute_sharded(other, pairs, tmp_path, **OPTIONS)


def test_other_precision_backend_and_width_are_other_runs(tmp_path, engine, pairs):
    """Each alone: numbers or shapes differ, so the manifest must."""
    attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    model = engine.model
    for other, message in (
        (sharded.Engine(model, precision="bf16"), "precision is None there and 'bf16' here"),
        (sharded.Engine(model, "reference"), "backend is 'cpp' there and 'reference' here"),
    ):
        with pytest.raises(ValueError, match=f"another one: {message}; take"):
            attribute_sharded(other, pairs, tmp_path, **OPTIONS)
    wide = torch.nn.functional.pad
    wider = PromptPairs(
        wide(pairs.clean_ids, (0, 1)),
        wide(pairs.corrupted_ids, (0, 1)),
        pairs.answer_ids,
        pairs.wrong_answer_ids,
        attention_mask=wide(pairs.attention_mask, (0, 1)),
    )
    assert wider.digest() == pairs.digest()
    with pytest.raises(ValueError, match="positions is 12 there and 13 here, columns_digest is"):
        attribute_sharded(engine, wider, tmp_path, **OPTIONS)
    record = json.loads((tmp_path / "manifest.json").read_text())
    record["model_class"] = "OtherForCausalLM"
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="model_class is 'OtherForCausalLM' there and 'Llama"):
        attribute_sharded(engine, pairs, tmp_path, **OPTIONS)


def test_shards_without_a_manifest_and_a_broken_manifest_are_refused(tmp_path, engine, pairs):
    attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"must hold a manifest.json of JSON, got .*manifest.json"):
        attribute_sharded(engine, pairs, tmp_path, **OPTIONS)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"must hold the manifest.json of its shards, got none in"):
        attribute_sharded(engine, pairs, tmp_path, **OPTIONS)


def test_wrong_options_are_refused_before_a_folder_is_made(tmp_path, engine, pairs):
    folder = tmp_path / "run"
    for options, message in (
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"method": "atp**"}, "method must be among"),
        ({"direction": "up"}, "direction must be 'noising' or 'denoising', got 'up'"),
        ({"metric": lambda logits: logits[:, -1, 0]}, r"'<lambda>' must take \(logits, pairs\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute_sharded(engine, pairs, folder, **options)
    with pytest.raises(TypeError, match="pairs must be PromptPairs, got list"):
        attribute_sharded(engine, [pairs], folder)
    ids = pairs.clean_ids.repeat(1, 3)
    with pytest.raises(ValueError, match="context of 32 tokens, got a prompt of 36 in pair 0"):
        attribute_sharded(engine, PromptPairs(ids, ids.flip(1), pairs.answer_ids), folder)
    ids = pairs.clean_ids.clone()
    ids[7, 2] = 276
    with pytest.raises(ValueError, match="below the model's 276, got 276 in pair 7"):
        attribute_sharded(engine, PromptPairs(ids, pairs.corrupted_ids, pairs.answer_ids), folder)
    assert not folder.exists()


def test_a_failing_pair_is_named_and_what_was_done_stays(
    tmp_path, engine, pairs, monkeypatch, whole
):
    monkeypatch.setenv("TROUBLE", "nan")
    message = rf"^rank 0 failed on pair {TROUBLED}, run alone: ValueError: metric 'difference' must"
    with pytest.raises(ShardError, match=message):
        attribute_sharded(engine, pairs, tmp_path, metric=difference, **OPTIONS)
    assert len(shard_files(tmp_path)) == 3
    monkeypatch.delenv("TROUBLE")
    found = attribute_sharded(engine, pairs, tmp_path, metric=difference, **OPTIONS)
    assert_same_bits(found, whole)


def test_pairs_that_fail_only_together_are_all_named(tmp_path, engine, pairs):
    def crowded(logits, pairs):
        if len(pairs) > 1:
            raise RuntimeError("too many")
        return logits[:, -1, 0]

    with pytest.raises(ShardError, match="^rank 0 failed on pairs 6-7: RuntimeError: too many"):
        attribute_sharded(engine, pairs, tmp_path, metric=crowded, **OPTIONS)


def test_a_silent_process_is_named_with_its_pairs(tmp_path, engine, pairs):
    question = Question(nodes=("z",))
    shards = Shards(tmp_path, pairs, question, describe_engine(engine, pairs), 4)
    team = _Team(0, 2, dist.HashStore(), timeout=0.2)
    todo = shards.begin()
    team.store.set("claim 1", "1")
    with pytest.raises(TimeoutError) as error:
        team.wait_for_all(shards, todo, lambda: None)
    assert str(error.value) == f"no shard was finished in 0.2 s: rank 1 has {named(shards.rows[1])}"


def test_another_process_s_failure_ends_the_wait():
    team = _Team(0, 2, dist.HashStore(), timeout=60)
    other = _Team(1, 2, team.store, timeout=60)
    other.fail(OSError("no space left"))
    with pytest.raises(ShardError, match="rank 1 failed: OSError: no space left"):
        next(team.claims([0, 1]))


def test_pairs_are_named_by_their_runs():
    assert named([7]) == "pair 7"
    assert named([5, 3, 4, 9, 12, 11]) == "pairs 3-5, 9, 11-12"


def test_removing_shards_leaves_what_is_not_theirs(tmp_path, engine, pairs):
    folder = tmp_path / "shards"
    attribute_sharded(engine, pairs, folder, **OPTIONS)
    (folder / "notes.txt").write_text("mine")
    remove_shards(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    attribute_sharded(engine, pairs, tmp_path / "more", **OPTIONS)
    remove_shards(tmp_path / "more")
    assert not (tmp_path / "more").exists()
    remove_shards(tmp_path)
    assert folder.exists()
    for name in ("run.safetensors", "000000.safetensors"):  # without a manifest no shards
        (folder / name).write_bytes(b"mine")
    remove_shards(folder)
    assert len(list(folder.iterdir())) == 3


# ---- many processes


@pytest.mark.slow
def test_four_processes_give_the_bits_of_one(tmp_path, whole):
    _, stderr = torchrun(4, TESTS / "sharded.py", tmp_path)
    assert "pairs:" not in stderr
    for rank in range(4):
        assert_same_bits(Attribution.load(tmp_path / f"found_{rank}.safetensors"), whole)
    assert len(shard_files(tmp_path)) == 6


@pytest.mark.slow
def test_a_killed_run_goes_on_and_counts_no_pair_twice(tmp_path, engine, pairs, whole):
    """A worker is killed with SIGKILL while it holds a shard; then one process goes on where two left off."""
    torchrun(2, TESTS / "sharded.py", tmp_path, trouble="die", code=1)
    done = shard_files(tmp_path)
    assert 2 <= len(done) <= 5
    broken, *kept = done
    (tmp_path / broken).write_bytes((tmp_path / broken).read_bytes()[:-100])
    (tmp_path / TEMPORARY).write_bytes(b"half of a shard")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
    found = attribute_sharded(engine, pairs, tmp_path, metric=difference, **OPTIONS)
    assert_same_bits(found, whole)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == before
    assert not (tmp_path / TEMPORARY).exists()


@pytest.mark.slow
def test_a_worker_s_failure_names_rank_and_pair_and_ends_all(tmp_path):
    _, stderr = torchrun(2, TESTS / "sharded.py", tmp_path, trouble="nan", code=1)
    assert any(
        f"ShardError: rank {rank} failed on pair {TROUBLED}, run alone: ValueError: metric"
        in stderr
        for rank in (0, 1)
    )
    assert not (tmp_path / "run.safetensors").exists()


@pytest.mark.slow
def test_two_processes_of_the_command_line_give_the_bits_of_one(tmp_path, pairs):
    file = tmp_path / "pairs.jsonl"
    pairs.to_jsonl(file)
    command = ["attribute", "--model", MODEL, "--pairs", str(file), "--metric", "logit_diff", "--nodes", "z,neuron",
               "--shard-size", "3", "--out"]  # fmt: skip
    alone = CliRunner().invoke(app, [*command, str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    main = [sys.executable, "-c", "from atp_fast.cli import app; app()"]
    stdout, stderr = torchrun(2, "--no-python", *main, *command, tmp_path / "two")
    assert stdout.count("Top 20 nodes") == 1
    assert stderr == ""
    found, expected = (
        Attribution.load(tmp_path / name / "run.safetensors") for name in ("two", "alone")
    )
    assert_same_bits(found, expected)
    assert found.metadata["shards"] == "4"
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "alone"))


def test_the_command_line_refuses_the_shards_of_another_run(tmp_path, engine, pairs):
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    attribute_sharded(engine, pairs, tmp_path / "run" / "shards", **OPTIONS)
    command = ["attribute", "--model", MODEL, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "run",
               "--shard-size", 2, "--metric", "nll"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 2
    assert "metric is 'logit_diff' there and 'nll' here" in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: folder ")


# ---- Ray


def test_ray_sweep_without_ray_names_the_extra(tmp_path, pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'atp_fast\[ray\]'"):
        ray_sweep(sharded.make_engine, pairs, tmp_path)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """A local Ray with two workers, one of which dies on the troubled pair, once."""
    ray = pytest.importorskip("ray")
    flag = tmp_path_factory.mktemp("ray") / "died"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"TROUBLE": f"die once {flag}", "PYTHONPATH": str(TESTS)}},
    )
    yield flag
    ray.shutdown()


@pytest.mark.slow
def test_ray_with_a_killed_worker_gives_the_same_bits(tmp_path, two_workers, pairs, whole):
    found = ray_sweep(sharded.make_engine, pairs, tmp_path, metric=difference, **OPTIONS)
    assert two_workers.exists()
    assert_same_bits(found, whole)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["metric"], manifest["pairs"]) == ("difference", 11)


def test_ray_runs_in_one_process_use_their_own_engines_and_options(tmp_path, two_workers, pairs):
    """Workers that keep an earlier run's engine, or what it was asked, do not answer a later one with it."""
    pairs, common = pairs[:4], {"metric": "nll", "nodes": ("z",), "shard_size": 2}
    founds = []
    for number, (make, options) in enumerate(
        (
            (sharded.make_engine, {"method": "atp"}),
            (sharded.make_half_engine, {"method": "atp"}),
            (
                sharded.make_engine,
                {"method": "atp+graddrop", "direction": "denoising", "per_pair": True},
            ),
        )
    ):
        asked = {**common, **options}
        found = ray_sweep(make, pairs, tmp_path / f"ray {number}", **asked)
        wanted = attribute_sharded(make(), pairs, tmp_path / f"alone {number}", **asked)
        assert_same_bits(found, wanted)
        assert (found.method, found.direction) == (wanted.method, wanted.direction)
        assert (found.per_pair is None) == (wanted.per_pair is None) == (number < 2)
        if found.per_pair is not None:
            assert torch.equal(found.per_pair["z"], wanted.per_pair["z"])
        for earlier in founds:
            assert not torch.allclose(earlier, found.contribution["z"], rtol=1e-2)
        founds.append(found.contribution["z"])


def test_ray_names_the_worker_and_the_pair_that_fail(tmp_path, two_workers, pairs):
    def wrong(logits, pairs):
        return torch.where(pairs.answer_ids == 20 + TROUBLED, torch.nan, logits[:, -1, 0])

    with pytest.raises(
        ShardError, match=rf"^worker \d+ on .+ failed on pair {TROUBLED}, run alone: Val"
    ):
        ray_sweep(sharded.make_engine, pairs, tmp_path, metric=wrong, **OPTIONS)
    with pytest.raises(ValueError, match="metric is 'wrong' there and 'nll' here"):
        ray_sweep(sharded.make_engine, pairs, tmp_path, metric="nll", **OPTIONS)


@pytest.mark.slow
def test_ray_groups_share_a_model_and_replace_one_that_lost_a_worker(
    tmp_path, two_workers, pairs, whole
):
    flag = tmp_path / "died"

    def deadly(logits, pairs):
        if bool((pairs.answer_ids == 20 + TROUBLED).any()) and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), 9)
        return difference(logits, pairs)

    deadly.positions = "last"
    found = ray_sweep(
        sharded.make_split_engine,
        pairs,
        tmp_path / "run",
        metric=deadly,
        tensor_parallel=2,
        **OPTIONS,
    )
    assert flag.exists() and found.metadata["tensor_parallel"] == "2"
    for kind in whole.space.kinds:
        scale = float(whole.effect[kind].abs().max())
        assert float((found.effect[kind] - whole.effect[kind]).abs().max()) <= 1e-5 * scale
    with pytest.raises(ValueError, match=r"tensor_parallel=3 workers of .* must fit into the clus"):
        ray_sweep(sharded.make_split_engine, pairs, tmp_path / "more", tensor_parallel=3)


@pytest.mark.slow
def test_ray_groups_name_the_process_and_the_pairs(tmp_path, two_workers, pairs):
    def dies(logits, pairs):
        if bool((pairs.answer_ids == 20 + TROUBLED).any()):
            os.kill(os.getpid(), 9)
        return logits[:, -1, 0]

    with pytest.raises(
        ShardError, match="^process [01] of the 2 that share the model died too often on pairs 2, 9"
    ):
        ray_sweep(
            *(sharded.make_split_engine, pairs, tmp_path),
            **{"metric": dies, "tensor_parallel": 2, "retries": 0} | OPTIONS,
        )
    assert len(shard_files(tmp_path)) == 3
    with pytest.raises(ValueError, match="make_engine must load its model with tensor_parallel=2"):
        ray_sweep(sharded.make_engine, pairs, tmp_path, tensor_parallel=2)
