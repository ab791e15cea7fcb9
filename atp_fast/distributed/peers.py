"""Processes that share one model and fail on a shard: whether all did, and which of them gives no sign any more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed.distributed_c10d import Store

GRACE = 10.0
_PAUSE = 0.05


class Peers:
    """The processes `ranks` that do `what` together, of which this is `rank`, and the store they talk through."""

    def __init__(
        self, store: Store, what: str, rank: int, ranks: Sequence[int], grace: float = GRACE
    ) -> None:
        self._store, self._what, self._rank, self._ranks = store, what, rank, ranks
        self._grace = grace

    def tell(self, text: str) -> None:
        """Leave word for those that may find out later that this process has given up."""
        with suppress(RuntimeError):
            self._store.set(f"{self._what} ended", text)

    def told(self) -> str | None:
        """The word that another has left."""
        with suppress(RuntimeError):
            if self._store.check([f"{self._what} ended"]):
                return self._store.get(f"{self._what} ended").decode()
        return None

    def missing(self) -> list[int]:
        """Say that this process has failed; those of the others that do not say so too within the grace period.

        Where none is missing, all are out of what they did together, and may try something else together.
        """
        try:
            self._store.set(self._key(self._rank), "failed")
            missing, since = self._unheard(), time.monotonic()
            while missing and time.monotonic() - since < self._grace:
                time.sleep(_PAUSE)
                missing = self._unheard()
            return missing
        except RuntimeError:  # the store went with its home
            return [rank for rank in self._ranks[:1] if rank != self._rank]

    def _unheard(self) -> list[int]:
        return [rank for rank in self._ranks if not self._store.check([self._key(rank)])]

    def _key(self, rank: int) -> str:
        return f"{self._what} failed on rank {rank}"
