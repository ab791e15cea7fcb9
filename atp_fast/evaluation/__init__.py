"""How good a method is: cost of verified recall, IRWRGM, agreement with exact effects, and the method study."""

from atp_fast.evaluation.curves import Found, find_top, irwrgm, oracle_cost, recall_cost, true_order
from atp_fast.evaluation.report import write_study
from atp_fast.evaluation.store import Store
from atp_fast.evaluation.study import Case, Estimate, Plan, Study, run_study

__all__ = [
    "Case",
    "Estimate",
    "Found",
    "Plan",
    "Store",
    "Study",
    "find_top",
    "irwrgm",
    "oracle_cost",
    "recall_cost",
    "run_study",
    "true_order",
    "write_study",
]
