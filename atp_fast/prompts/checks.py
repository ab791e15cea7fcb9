"""What the tensors and texts of PromptPairs must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_ids(
    name: str, x: Tensor, shape: tuple[int, ...] | None = None, like: Tensor | None = None
) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of token ids, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {x.dtype}")
    if shape is not None and tuple(x.shape) != shape:
        both = (
            ": both prompts of a pair need the same number of tokens"
            if name == "corrupted_ids"
            else ""
        )
        raise ValueError(
            f"{name} must have shape {shape} as clean_ids demands, got {tuple(x.shape)}{both}"
        )
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as clean_ids is, got {x.device}")
    if x.numel() and int(x.min()) < 0:
        raise ValueError(f"{name} must be token ids >= 0, got {int(x.min())}")
    return x.long()


def check_mask(name: str, mask: Tensor | None, ids: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(f"{name} must have shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
    if mask.device != ids.device:
        raise ValueError(f"{name} must be on {ids.device} as clean_ids is, got {mask.device}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} must hold 1 on real tokens and 0 on padding, got other values")
    mask = mask.bool()
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{name} must leave every pair at least one token, got none in pair {empty[0]}"
        )
    runs = mask[:, :1].int().sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    torn = (runs > 1).nonzero().flatten().tolist()
    if torn:
        raise ValueError(
            f"{name} must be one run of real tokens per pair, padding before or after, "
            f"got {int(runs[torn[0]])} runs in pair {torn[0]}"
        )
    return mask


def check_labels(
    name: str, tokens: Sequence[Sequence[str]] | None, lengths: Tensor
) -> list[list[str]] | None:
    if tokens is None:
        return None
    given, wanted = [len(row) for row in tokens], lengths.tolist()
    if given != wanted:
        raise ValueError(f"{name} must hold one text per real token: {wanted} of them, got {given}")
    return [list(row) for row in tokens]
