"""Memory as a budget: how many pairs, cotangents and patched rows are taken at once, and which layers leave tapes.

The estimates count the tensors that are alive at the peak of one layer's work, per position; tests/test_memory.py
compares them with measured peaks.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch

from atp_fast.hf import Plug

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
# Rows (pairs x positions x cotangents) beyond which matrix products gain nothing more from a larger batch.
_ROWS_ENOUGH = {"cpu": 4096, "cuda": 65536}
# Under "auto" tapes, which save at most two forwards, take this share of the budget; an explicit one is used up.
_AUTO_TAPE_SHARE = 1 / 64
_PATCHED_ROWS = 1024


class SweepPlan(NamedTuple):
    """Pairs run together, cotangents taken at once, and the first layer that leaves a tape."""

    pairs: int
    chunk: int
    taped_from: int


class Budget(NamedTuple):
    """Bytes that a call may take beyond the model and the result; `auto` when they come from what is free."""

    bytes: int
    auto: bool


def read_budget(memory_budget: int | str | None) -> int | None:
    """Bytes of a budget such as 2_000_000_000, "8GiB" or "500 MB"; None for None and "auto".

    Raises TypeError or ValueError naming memory_budget for anything else.
    """
    if memory_budget is None or memory_budget == "auto":
        return None
    if isinstance(memory_budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", memory_budget.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(
                f"memory_budget must be bytes, a size such as '8GiB' or 'auto', got {memory_budget!r}"
            )
        size = int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(memory_budget, int) and not isinstance(memory_budget, bool):
        size = memory_budget
    else:
        raise TypeError(
            f"memory_budget must be an int or a string, got {type(memory_budget).__name__}"
        )
    if size <= 0:
        raise ValueError(f"memory_budget must be positive, got {memory_budget!r}")
    return size


def free_memory(device: torch.device) -> int:
    """Bytes free on a device: CUDA's own figure, or the machine's available memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30  # no figure to be had (macOS): what any machine that runs a language model has


def budget_for(plug: Plug, asked: int | None) -> Budget:
    """The asked budget, or half of what is free on the model's device, shared by torchrun's processes on a machine."""
    if asked is not None:
        return Budget(asked, auto=False)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if plug.device.type == "cpu" else 1
    return Budget(free_memory(plug.device) // 2 // sharing, auto=True)


class Costs(NamedTuple):
    """Bytes per pair and position."""

    stored: int  # both runs' layer inputs
    tape: int  # one layer's graph, node values of both runs and their differences
    cotangent: int  # one carried cotangent
    work: int  # one cotangent on its way through a layer


def costs(plug: Plug) -> Costs:
    found, item = plug.inspection, plug.itemsize
    heads = found.heads * (found.head_dim + found.v_dim)
    kv_heads = found.kv_heads * (found.head_dim + found.v_dim)
    nodes = heads + kv_heads + found.neurons + 2 * found.hidden
    return Costs(
        stored=item * 2 * len(plug.layers) * found.hidden,
        tape=found.tape_bytes + item * 2 * nodes,
        cotangent=item * 2 * found.hidden,
        work=item * (3 * found.hidden + 2 * heads + 2 * kv_heads + 4 * found.neurons),
    )


def plan_sweep(
    plug: Plug, budget: Budget, *, pairs: int, positions: int, cotangents: int, together: bool
) -> SweepPlan:
    """Fit a sweep into a budget.

    pairs, positions: at most so many pairs, of so many positions each; cotangents: at the lowest layer;
    together: all pairs must be run at once.
    """
    cost, layers = costs(plug), len(plug.layers)
    fixed = positions * (cost.stored + cost.tape + cotangents * cost.cotangent)
    rows = _ROWS_ENOUGH.get(plug.device.type, _ROWS_ENOUGH["cuda"])
    batch = pairs
    if not together:
        by_memory = budget.bytes // (fixed + positions * cotangents * cost.work)
        by_rows = -(-rows // (positions * cotangents))
        batch = max(1, min(pairs, by_memory, by_rows))
    left = budget.bytes - batch * fixed
    chunk = left // (batch * positions * cost.work)
    chunk = max(1, min(cotangents, chunk, max(1, rows // (batch * positions))))
    left -= chunk * batch * positions * cost.work
    if budget.auto:
        left = min(left, int(budget.bytes * _AUTO_TAPE_SHARE))
    taped = max(0, min(layers, left // (batch * positions * cost.tape)))
    if plug.offloaded:
        taped = 0
    return SweepPlan(batch, chunk, layers - taped)


def estimate_sweep(plug: Plug, plan: SweepPlan, positions: int, cotangents: int) -> int:
    """Bytes a sweep under this plan takes at its peak, beside the model and the scores."""
    cost = costs(plug)
    taped = max(1, len(plug.layers) - plan.taped_from)
    per_position = (
        cost.stored + taped * cost.tape + cotangents * cost.cotangent + plan.chunk * cost.work
    )
    return plan.pairs * positions * per_position


def patched_rows(plug: Plug, budget: Budget, positions: int) -> int:
    """Rows of exact patching run at once, each of so many positions."""
    found, item = plug.inspection, plug.itemsize
    heads = found.heads * (found.head_dim + found.v_dim) + found.kv_heads * (
        found.head_dim + found.v_dim
    )
    per_row = item * (
        positions * (4 * found.hidden + 2 * heads + 3 * found.neurons) + 2 * plug.vocabulary
    )
    return int(max(1, min(_PATCHED_ROWS, budget.bytes // 4 // per_row)))
