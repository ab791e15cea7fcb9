"""In: an engine and tasks. Out: how well AtP, AtP* and the baselines find the nodes that exact patching finds.

May import: engine and what stands before it.
"""

from atp_fast.study.curves import Found, find_top, irwrgm, oracle_cost, recall_cost, true_order
from atp_fast.study.rankings import (
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
from atp_fast.study.report import recall_curves, write_study
from atp_fast.study.runs import Case, Estimate, Plan, Study, run_study
from atp_fast.study.store import Store

__all__ = [
    "Blocks",
    "Case",
    "Estimate",
    "Found",
    "Given",
    "Hierarchical",
    "Iterative",
    "Plan",
    "Ranking",
    "Store",
    "Study",
    "Subsampling",
    "Verified",
    "Visit",
    "find_top",
    "irwrgm",
    "oracle_cost",
    "paper_settings",
    "recall_cost",
    "recall_curves",
    "run_study",
    "true_order",
    "walk",
    "write_study",
]
