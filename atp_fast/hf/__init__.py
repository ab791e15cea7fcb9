"""In: a transformers model. Out: a Plug, which runs it piece by piece; the only room that knows transformers.

May import: ops and what stands before it.
"""

from atp_fast.hf.attention import LayerRun, Prefix, Visit
from atp_fast.hf.dictionaries import Dictionary, read_dictionary, side_by_side
from atp_fast.hf.inspection import FiniteCheck, Inspection, check_finite
from atp_fast.hf.layers import LayerArguments
from atp_fast.hf.options import AttentionOptions
from atp_fast.hf.parallel import held_tensor
from atp_fast.hf.placement import ENDS
from atp_fast.hf.plug import Plug
from atp_fast.hf.switching import alone_with, modules_of, recording

__all__ = [
    "ENDS",
    "AttentionOptions",
    "Dictionary",
    "Inspection",
    "LayerArguments",
    "LayerRun",
    "Plug",
    "Prefix",
    "Visit",
    "FiniteCheck",
    "alone_with",
    "check_finite",
    "held_tensor",
    "modules_of",
    "read_dictionary",
    "recording",
    "side_by_side",
]
