"""Kernel starts per layer of the engine on half-precision models, counted without a GPU (make bench-launches).

As launches.py counts them: every layer taped, nodes q, k, v, z and neuron. Rows go to bench/results/launches.csv, one per
phase (forwards, sweep, scoring) and their total; tests/launch_budget.json holds what may not be exceeded.
"""

from __future__ import annotations

from launches import FAMILIES, METHODS, PHASES, per_layer
from rows import RESULTS, RowFile


def main() -> None:
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


if __name__ == "__main__":
    main()
