"""A patcher that measures nothing twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from atp_fast.patching.subsets import Floats, Patcher, Subset, measure


class Memo:
    """A patcher that measures nothing twice: single nodes come from the truth, subsets from memory.

    truth: (pairs, nodes), signed. The cost is charged as if everything were measured; `measured` counts what was.
    """

    def __init__(self, patcher: Patcher, truth: Floats) -> None:
        self._patcher = patcher
        self._truth = truth
        self._known: dict[bytes, Floats] = {}
        self.nodes = patcher.nodes
        self.pairs = patcher.pairs
        self.cost = 0.0
        self.measured = 0.0

    def effects(self, subsets: Sequence[Subset], pair: Sequence[int] | None = None) -> Floats:
        on = [-1] * len(subsets) if pair is None else [int(p) for p in pair]
        shape = (len(subsets),) if pair is not None else (len(subsets), self.pairs)
        self.cost += float(np.prod(shape))
        found = np.empty(shape)
        missing: dict[bytes, list[int]] = {}
        for row, (subset, p) in enumerate(zip(subsets, on, strict=True)):
            if len(subset) == 1:
                found[row] = (
                    self._truth[:, subset[0]] if pair is None else self._truth[p, subset[0]]
                )
                continue
            # Digests keep the memory small: a subset of thousands of nodes leaves 16 bytes.
            ids = np.array([p, *sorted(subset)], dtype=np.int64)
            key = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
            if key in self._known:
                found[row] = self._known[key]
            else:
                missing.setdefault(key, []).append(row)
        if missing:
            rows = [same[0] for same in missing.values()]
            chosen = None if pair is None else [on[row] for row in rows]
            effects = measure(self._patcher, [subsets[row] for row in rows], chosen)
            self.measured += float(effects.size)
            for (key, same), effect in zip(missing.items(), effects, strict=True):
                self._known[key] = effect
                found[same] = effect
        return found
