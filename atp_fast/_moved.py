"""Modules that stay importable by the names they had before the folders, such as atp_fast.literal."""

from __future__ import annotations

import importlib
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOMES = {
    "atp_fast.diagnostics": "atp_fast.patching.diagnostics",
    "atp_fast.literal": "atp_fast.attribution.literal",
    "atp_fast.pairs": "atp_fast.prompts.pairs",
    "atp_fast.tasks": "atp_fast.prompts.tasks",
}


class Moved(MetaPathFinder, Loader):
    """Finds the old names; what is imported by one is the module at home, the same object."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in HOMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(HOMES[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import has put the old name's there
