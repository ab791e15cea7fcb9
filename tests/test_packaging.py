"""The sdist holds the project: what make test, the benchmarks and the documentation need, without the repository."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tracked files are git's to list")
def test_the_sdist_holds_every_tracked_file_and_nothing_built(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path]
    done = subprocess.run([*map(str, command), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {m.name.partition("/")[2] for m in files.getmembers() if m.isfile()}
    assert tracked <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}
