"""Packages that only some of atp_fast needs."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from packaging.version import Version


def require(package: str, what: str, extra: str = "reports") -> Any:
    """A package of an extra; ImportError that names the extra if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"{what} needs {name}: pip install 'atp_fast[{extra}]'") from error


def require_version(package: str, lowest: str, below: str, extra: str) -> None:
    """ImportError that names the extra unless the installed package's version lies in [lowest, below)."""
    wanted = f"{package} >= {lowest}, < {below}"
    remedy = f"pip install 'atp_fast[{extra}]'"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"this needs {wanted}, which is not installed: {remedy}") from error
    if not Version(lowest) <= Version(found) < Version(below):
        raise ImportError(f"this needs {wanted}, found {found}: {remedy}")
