"""tests/sharded.py's run by processes of which two at a time share a model: python split_run.py FOLDER.

TROUBLED_RANKS: those that meet the trouble, all if it is not set.
"""

import os
import sys
from pathlib import Path

import torch

import sharded
from atp_fast.distributed import attribute_sharded

if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["RANK"] not in os.environ.get("TROUBLED_RANKS", "0 1 2 3"):
        os.environ["TROUBLE"] = ""
    folder = Path(sys.argv[1])
    engine = sharded.make_split_engine()
    found = attribute_sharded(
        engine, sharded.make_pairs(), folder, metric=sharded.difference, **sharded.OPTIONS
    )
    found.save(folder / f"found_{os.environ['RANK']}.safetensors")
