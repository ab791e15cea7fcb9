"""AtP*: which attention and MLP components of a language model cause a behaviour.

The folders in the order in which data flows, each importing only what stands before it:
prompts -> ops -> hf -> attribution -> patching -> results -> engine -> study -> distributed -> integrations -> cli.
The names below are loaded on first use, so that `import atp_fast` alone imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from atp_fast._moved import Moved
from atp_fast._version import __version__

if TYPE_CHECKING:
    from atp_fast import metrics as metrics
    from atp_fast import ops as ops
    from atp_fast.attribution import literal as literal
    from atp_fast.engine import Engine
    from atp_fast.metrics import Metric
    from atp_fast.models import load_model
    from atp_fast.nodes import Node, NodeSpace
    from atp_fast.ops.build import build_info
    from atp_fast.prompts import tasks as tasks
    from atp_fast.prompts.pairs import PromptPairs
    from atp_fast.results import Attribution, PatchEffects

_MODULES = {
    "literal": "attribution.literal",
    "metrics": "metrics",
    "ops": "ops",
    "tasks": "prompts.tasks",
}
_HOMES = {
    "Attribution": "results",
    "Engine": "engine",
    "Metric": "metrics",
    "Node": "nodes",
    "NodeSpace": "nodes",
    "PatchEffects": "results",
    "PromptPairs": "prompts.pairs",
    "build_info": "ops.build",
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
    "literal",
    "load_model",
    "metrics",
    "ops",
    "tasks",
]

sys.meta_path.append(Moved())


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(f"atp_fast.{_MODULES[name]}")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"atp_fast.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'atp_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
