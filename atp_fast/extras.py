"""Packages that only some of atp_fast needs."""

from __future__ import annotations

import importlib
from typing import Any


def require(package: str, what: str, extra: str = "reports") -> Any:
    """A package of an extra; ImportError that names the extra if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"{what} needs {name}: pip install 'atp_fast[{extra}]'") from error
