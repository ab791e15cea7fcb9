"""One library's way of one task, in a process of its own: reads commands, runs once per command, reports seconds.

python worker.py LIBRARY WAY MODEL POSITIONS PAIRS. One line of JSON answers each line of input:
  (start)      {"ready": true, "version": ...} when the model is built and wrapped
  first PATH   run once, save the scores to PATH: {"extra_peak_bytes": ...}
  run          {"wall": ..., "cpu": ..., "foreign": ...}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import Case
from measure import extra_peak, release, reset_peak, timed

LIBRARIES = {
    "hooks": "with_hooks",
    "transformer-lens": "with_transformer_lens",
    "nnsight": "with_nnsight",
    "atp_fast": "with_atp_fast",
    "atp_fast in transformer-lens": "with_integrations",
}


def main(library: str, way: str, model: str, positions: str, pairs: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; answers keep a channel of their own

    def answer(**found: object) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    module = importlib.import_module(LIBRARIES[library])
    call = module.WAYS[way](Case.make(model, int(positions), int(pairs)))
    before = reset_peak()
    answer(ready=True, version=module.version())
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "first":
            scores = call()
            peak = extra_peak(before)
            torch.save(scores, argument)
            del scores
            answer(extra_peak_bytes=peak)
        else:
            wall, cpu, foreign = timed(call)
            answer(wall=wall, cpu=cpu, foreign=foreign)
        release()


if __name__ == "__main__":
    main(*sys.argv[1:])
