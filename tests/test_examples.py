"""The examples run, on a tiny model where they take one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LLAMA = Path(__file__).parent / "data" / "tiny_llama_2L"


def run(name, *args):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_find_verify_bound():
    out = run(
        "find_verify_bound.py", "--model", LLAMA, "--verify", 12, "--forwards", 200
    ).splitlines()
    assert out[0].split() == ["estimated", "exact", "node"]
    rows = [
        re.fullmatch(r" *(\S+) +(\S+) <(.*): contribution (.*), .*>", line) for line in out[1:11]
    ]
    estimates, exact, contributions = ([float(row[i]) for row in rows] for i in (1, 2, 4))
    assert contributions == sorted(contributions, reverse=True)
    assert len({row[3] for row in rows}) == 10
    assert exact[0] < -1
    for estimate, right in zip(estimates, exact, strict=True):
        assert estimate == pytest.approx(right, rel=0.25)
    assert "200 forwards" in out[11]


def test_kernels_in_your_library():
    assert "(1, 1, 64, 2)" in run("kernels_in_your_library.py")


def test_no_example_is_left_out():
    text = Path(__file__).read_text()
    assert all(path.name in text for path in EXAMPLES.glob("*.py"))
