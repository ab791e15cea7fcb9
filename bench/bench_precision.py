"""What half precision does to AtP* of the demo model on its IOI pair (make bench-precision).

Two changes against float32: cotangents in bfloat16 (Engine(precision="bf16")), and the whole model in bfloat16. Rows go to
bench/results/precision.csv, per node kind and for all kinds together: Spearman's rank correlation of the contributions,
the share of the best 20 and 100 nodes that stay among the best, and the largest difference relative to the largest
contribution.
"""

from __future__ import annotations

import argparse

import torch
from rows import RESULTS, RowFile
from scipy.stats import spearmanr
from torch import Tensor

from atp_fast import Engine, load_model, tasks

KINDS = ("q", "k", "v", "z", "neuron")


def agreement(exact: Tensor, other: Tensor) -> dict[str, float]:
    """How far a ranking by `other` is from one by `exact`."""
    live = exact > 0
    found = {"spearman": float(spearmanr(exact[live], other[live]).statistic)}
    for k in (20, 100):
        best = set(exact.topk(k).indices.tolist())
        found[f"share_of_top_{k}"] = len(best & set(other.topk(k).indices.tolist())) / k
    found["largest_difference"] = float((exact - other).abs().max() / exact.max())
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = RowFile(RESULTS / "precision.csv")
    model, tokenizer = load_model("smollm2-135m", dtype="float32")
    pairs = tasks.ioi_pair(tokenizer)

    def scores(engine: Engine) -> dict[str, Tensor]:
        found = engine.attribute(pairs, nodes=KINDS, progress=False).contribution
        flat = {kind: found[kind].float().flatten() for kind in KINDS}
        return {**flat, "all": torch.cat(list(flat.values()))}

    exact = scores(Engine(model))
    changed = {
        "cotangents in bfloat16": scores(Engine(model, precision="bf16")),
        "model in bfloat16": scores(Engine(model.to(torch.bfloat16))),
    }
    for what, other in changed.items():
        for kind in exact:
            for metric, value in agreement(exact[kind], other[kind]).items():
                rows.add(
                    [value],
                    op="attribute atp*",
                    provider="atp_fast",
                    mode=f"{what}, {kind}",
                    shape={"model": "smollm2-135m", "task": "ioi_pair", "B": 1},
                    dtype="float32" if what.startswith("cot") else "bfloat16",
                    metric=metric,
                )


if __name__ == "__main__":
    main()
