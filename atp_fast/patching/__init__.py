"""In: prompt pairs, a plugged model, nodes. Out: exact effects of nodes and of sets of nodes, and a bound on missed ones.

May import: attribution and what stands before it.
"""

from atp_fast.patching.diagnostics import MissedBound, bound_missed
from atp_fast.patching.sessions import Patching
from atp_fast.patching.subsets import (
    NodePatcher,
    Patcher,
    SubsetStatistics,
    moving_ids,
    sample_subsets,
)

__all__ = [
    "MissedBound",
    "NodePatcher",
    "Patcher",
    "Patching",
    "SubsetStatistics",
    "bound_missed",
    "moving_ids",
    "sample_subsets",
]
