"""The benchmarks' shared parts: rows, ratios, the count of operations, pictures."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

from cases import layer_operations, operations, random_pairs  # noqa: E402
from measure import Timing, interleaved, product_paths, write_ratios  # noqa: E402
from random_models import NEOX_TINY, build_random, random_prompts  # noqa: E402
from roofline import OPS, predicted, tile_pairs, traffic, whole_pairs  # noqa: E402
from rows import RowFile, quantiles, shape_of  # noqa: E402

COLUMNS = {"op": "attribute", "provider": "atp_fast auto", "mode": "atp*", "dtype": "float32"}


def add(file, values, positions=32, **changes):
    shape = {"model": "tiny", "T": positions, "B": 1}
    file.add(values, **{**COLUMNS, "shape": shape, "metric": "wall_seconds", **changes})


def test_quantiles_of_a_known_sample():
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_number_measured_again_takes_the_older_ones_place(tmp_path):
    file = RowFile(tmp_path / "rows.csv")
    add(file, [1.0, 2.0, 3.0])
    add(file, [8.0], positions=128)
    add(file, [5.0])
    rows = file.read()
    assert [(shape_of(row)["T"], row["median"], row["rounds"]) for row in rows] == [
        ("128", "8", "1"),
        ("32", "5", "1"),
    ]
    with file.path.open() as text:
        assert next(csv.reader(text))[:4] == ["op", "provider", "mode", "shape"]
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_a_row_without_numbers_says_why(tmp_path):
    file = RowFile(tmp_path / "rows.csv")
    add(file, [], note="not run: too long")
    (row,) = file.read()
    assert (row["median"], row["rounds"], row["note"]) == ("", "0", "not run: too long")


def test_ratios_are_taken_within_rounds(tmp_path):
    file = RowFile(tmp_path / "rows.csv")
    slow, fast = (
        Timing([4.0, 40.0, 8.0], [3.0, 3.0, 3.0]),
        Timing([2.0, 10.0, 8.0], [1.0, 2.0, 3.0]),
    )
    write_ratios(file, slow, fast, of="literal", shape={"T": 1}, **COLUMNS)
    medians = {row["metric"]: row["median"] for row in file.read()}
    assert medians == {"times_faster_than literal": "2", "times_less_cpu_than literal": "1.5"}


def test_every_provider_runs_once_per_round_and_warm_ups_do_not_count():
    calls = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert len(timings["a"].wall) == len(timings["b"].cpu) == 2


def test_operations_by_hand():
    model = build_random(NEOX_TINY)
    weights = 64 * 192 + 64 * 64 + 2 * 64 * 128
    product = 2 * (3 * 4 / 2) * 64
    forward, vjp = layer_operations(model, 3)
    assert (forward, vjp) == (2 * weights * 3 + 2 * product, 2 * weights * 3 + 4 * product)
    assert operations(model, 3, graddrop=False) == 2 * (2 * forward + vjp)
    assert operations(model, 3, graddrop=True) == 2 * (2 * forward + 1.5 * vjp)


@pytest.mark.parametrize("shared", [0, 5])
def test_random_prompts_differ_everywhere_after_the_shared_part(shared):
    prompts = random_prompts(11, 20, 8, shared)
    differ = prompts.clean != prompts.corrupted
    assert not differ[:, :shared].any()
    assert differ[:, shared:].all()
    assert (prompts.answers != prompts.wrong_answers).all()
    assert random_pairs(build_random(NEOX_TINY), 2, 8, shared).split.tolist() == [shared] * 2


def test_product_paths():
    paths = product_paths(32, 64, 32)
    assert {"float32 default", "bfloat16"} <= set(paths)
    assert all(operations == 2 * 32 * 64 * 32 for _, operations in paths.values())


def test_spinning_threads_are_refused():
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    script = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import measure; measure.check_environment()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "OMP_WAIT_POLICY=passive" in done.stderr


@pytest.mark.parametrize(
    ("keys", "queries_at_once", "keys_at_once"), [(100, 16, 32), (64, 64, 8), (7, 32, 16)]
)
def test_the_roofline_counts_the_tiles_of_a_causal_square(keys, queries_at_once, keys_at_once):
    tiles = {
        (query // queries_at_once, key // keys_at_once)
        for query in range(keys)
        for key in range(query + 1)
    }
    assert tile_pairs(keys, queries_at_once, keys_at_once, "query") == len(tiles)
    assert tile_pairs(keys, keys_at_once, queries_at_once, "key") == len(tiles)
    whole = [(m, n) for m, n in tiles if m * queries_at_once >= (n + 1) * keys_at_once - 1]
    assert whole_pairs(keys, queries_at_once, keys_at_once, "query") == len(whole)
    assert whole_pairs(keys, keys_at_once, queries_at_once, "key") == len(whole)


def test_the_roofline_knows_the_traffic_of_every_kernel_it_predicts():
    cases = predicted("bf16", 64)
    assert {case.kernel for case in cases} == {name for names in OPS.values() for name in names}
    for case in cases:
        through, least = traffic(case, 128, 2, 1)
        assert least > 0 and 2 * traffic(case, 128, 1, 1)[0] == through


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_a_model_larger_than_its_card_takes_what_its_plan_says(tmp_path):
    """The plan from two layers is that of the whole model, fetches are counted exactly, and the measured peak is near."""
    pytest.importorskip("accelerate")
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(BENCH / "bench_large.py"), "--quick", "--out", str(tmp_path / "rows")],
        env=environment,
        check=True,
    )
    found = {}
    for row in RowFile(tmp_path / "rows").read():
        found.setdefault(row["op"], {})[row["metric"]] = float(row["median"])
    plan, run = found["plan"], found["run"]
    for metric in plan.keys() & run.keys() - {"planned_seconds", "planned_layer_seconds"}:
        assert plan[metric] == run[metric], metric
    off_card = run["host_bytes"] + run["disk_bytes"]
    assert off_card > run["card_bytes"] / 2
    assert run["read_bytes"] == run["planned_read_bytes"] == 2 * off_card
    assert 0.85 <= run["planned_peak_bytes"] / run["extra_peak_bytes"] <= 1.15, run
