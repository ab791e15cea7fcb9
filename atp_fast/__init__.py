"""AtP*: which attention and MLP components of a language model cause a behaviour.

The names below are loaded on first use, so that `import atp_fast` alone imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atp_fast._version import __version__

if TYPE_CHECKING:
    from atp_fast import metrics as metrics
    from atp_fast import ops as ops
    from atp_fast import tasks as tasks
    from atp_fast.build import build_info
    from atp_fast.engine import Engine
    from atp_fast.metrics import Metric
    from atp_fast.models import load_model
    from atp_fast.nodes import Node, NodeSpace
    from atp_fast.pairs import PromptPairs
    from atp_fast.results import Attribution, PatchEffects

_MODULES = ("metrics", "ops", "tasks")
_HOMES = {
    "Attribution": "results",
    "Engine": "engine",
    "Metric": "metrics",
    "Node": "nodes",
    "NodeSpace": "nodes",
    "PatchEffects": "results",
    "PromptPairs": "pairs",
    "build_info": "build",
    "load_model": "models",
}

__all__ = [
    "Attribution",
    "Engine",
    "Metric",
    "Node",
    "NodeSpace",
    "PatchEffects",
    "PromptPairs",
    "__version__",
    "build_info",
    "load_model",
    "metrics",
    "ops",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"atp_fast.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"atp_fast.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'atp_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
