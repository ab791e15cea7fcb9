"""Kernel starts per layer of the engine on half-precision models, and the time of the host, without a GPU (make bench-launches).

As launches.py counts them: every layer taped, nodes q, k, v, z and neuron. Rows go to bench/results/launches.csv, one per
phase (forwards, sweep, scoring) and their total; tests/launch_budget.json holds what may not be exceeded. Seconds per layer are those of
Python and torch on one thread, kernels' own left out; the literal code's beside them.
"""

from __future__ import annotations

import torch
from launches import FAMILIES, METHODS, PHASES, host_seconds, per_layer, started_seconds
from rows import RESULTS, RowFile

ROUNDS = 15


def main() -> None:
    torch.set_num_threads(1)
    file = RowFile(RESULTS / "launches.csv")
    for family in FAMILIES:
        for method in METHODS:
            found = per_layer(family, method)
            counts = {phase: sum(found[phase].values()) for phase in PHASES}
            for phase, count in {**counts, "total": sum(counts.values())}.items():
                file.add(
                    [count],
                    op=f"attribute, {phase}",
                    provider="atp_fast triton",
                    mode=method,
                    shape={"model": family, "T": 6, "B": 2},
                    dtype="bfloat16",
                    metric="starts_per_layer",
                )
            seconds = host_seconds(family, method, ROUNDS)
            if family == "llama":
                seconds |= started_seconds(family, method, ROUNDS)
            for provider, values in seconds.items():
                file.add(
                    values,
                    op="attribute, host",
                    provider=provider,
                    mode=method,
                    shape={"model": family, "T": 6, "B": 2},
                    dtype="bfloat16",
                    metric="seconds_per_layer",
                )


if __name__ == "__main__":
    main()
