"""The alternatives to AtP that the paper compares with, and the exact subset effects that they rest on."""

from atp_fast.baselines.rankings import (
    Blocks,
    Given,
    Hierarchical,
    Iterative,
    Ranking,
    Subsampling,
    Verified,
    Visit,
    paper_settings,
    walk,
)
from atp_fast.baselines.subsets import (
    EnginePatcher,
    Patcher,
    SubsetStatistics,
    moving_ids,
    sample_subsets,
)

__all__ = [
    "Blocks",
    "EnginePatcher",
    "Given",
    "Hierarchical",
    "Iterative",
    "Patcher",
    "Ranking",
    "Subsampling",
    "SubsetStatistics",
    "Verified",
    "Visit",
    "moving_ids",
    "paper_settings",
    "sample_subsets",
    "walk",
]
