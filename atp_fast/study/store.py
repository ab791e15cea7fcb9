"""Finished pieces of long work on disk: a killed run, started again, computes only what is missing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from atp_fast.files import written_whole

Piece = dict[str, NDArray[Any]]


class Store:
    """Pieces by name and by what they were computed from: named arrays in .npz files, written whole or not at all.

    A change in what a piece depends on gives it another file name, so that stale pieces are never read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, identity: Mapping[str, Any]) -> Path:
        """identity: everything the piece depends on, JSON-able."""
        text = json.dumps(identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        safe = re.sub(r"[^A-Za-z0-9.+_-]", "_", name.replace("*", "star"))
        return self.folder / f"{safe}-{digest}.npz"

    def get(self, name: str, identity: Mapping[str, Any], compute: Callable[[], Piece]) -> Piece:
        """The stored piece, or what compute() returns, stored first. Arrays are plain: no pickle in either direction.

        Raises ValueError naming the file for one that cannot be read.
        """
        path = self.path(name, identity)
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as file:
                    return dict(file)
            except (BadZipFile, OSError, ValueError, EOFError) as error:
                raise ValueError(
                    f"cannot read the stored piece {path}: {error}; delete it to compute it again"
                ) from error
        piece = compute()
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **piece)
        return piece
