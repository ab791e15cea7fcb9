"""The only package that knows transformers: where a model's layers, heads and neurons are, and how to run them."""

from atp_fast.hf.attention import AttentionOptions, LayerRun, Prefix, Visit
from atp_fast.hf.inspection import FiniteCheck, Inspection, check_finite
from atp_fast.hf.plug import LayerArguments, Plug, inspect_model

__all__ = [
    "AttentionOptions",
    "Inspection",
    "LayerArguments",
    "LayerRun",
    "Plug",
    "Prefix",
    "Visit",
    "FiniteCheck",
    "check_finite",
    "inspect_model",
]
