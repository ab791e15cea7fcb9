"""In: scores of every node, exact effects of chosen ones. Out: tables, figures, the report, files.

May import: prompts and what stands before it.
"""

from atp_fast.results.agreement import Agreement, agreement
from atp_fast.results.attribution import Attribution
from atp_fast.results.figures import save_figure
from atp_fast.results.patch_effects import PatchEffects
from atp_fast.results.scores import By, NodeScores, Over, ScoredNode

__all__ = [
    "Agreement",
    "Attribution",
    "By",
    "NodeScores",
    "Over",
    "PatchEffects",
    "ScoredNode",
    "agreement",
    "save_figure",
]
