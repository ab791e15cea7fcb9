"""Which prompt of a pair is run, and what the sign of an effect then means."""

from __future__ import annotations

from typing import Literal

from atp_fast.prompts.pairs import PromptPairs

Direction = Literal["noising", "denoising"]

_SIGNS = {
    "noising": "effect > 0: putting the corrupted value into the clean run raises the metric",
    "denoising": "effect > 0: putting the clean value into the corrupted run raises the metric",
}
DIRECTIONS = tuple(_SIGNS)


def sign_text(direction: str) -> str:
    """What a positive effect means, in words."""
    if direction not in _SIGNS:
        raise ValueError(f"direction must be 'noising' or 'denoising', got {direction!r}")
    return _SIGNS[direction]


def directed(pairs: PromptPairs, direction: str) -> PromptPairs:
    """Pairs whose first prompt is the one that is run and whose second gives the values patched in."""
    if not isinstance(pairs, PromptPairs):
        raise TypeError(f"pairs must be PromptPairs, got {type(pairs).__name__}")
    sign_text(direction)
    return pairs if direction == "noising" else pairs.swapped()
