"""Gradients that are computed once it is known what they are added to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Pending:
    """A gradient not yet computed; `onto` adds it to another one at the cost of computing it alone.

    shape: (cotangents, ..., width); compute: (sum or None, whether the sum may be overwritten), as rows of `width` -> rows.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        compute: Callable[[Tensor | None, bool], Tensor],
    ) -> None:
        self.shape, self.dtype, self._compute = shape, dtype, compute

    @classmethod
    def product(
        cls,
        grad: Tensor,
        matrix: Tensor,
        multiply: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Pending:
        """grad (C, ..., columns) @ matrix (columns, depth), by torch's product or another one."""
        rows = grad.reshape(-1, grad.shape[-1])

        def compute(before: Tensor | None, own: bool) -> Tensor:
            if multiply is not None:
                found = multiply(rows, matrix)
                return found if before is None else found.add_(before)
            if before is None:
                return rows @ matrix
            return before.addmm_(rows, matrix) if own else torch.addmm(before, rows, matrix)

        return cls((*grad.shape[:-1], matrix.shape[1]), grad.dtype, compute)

    def reshaped(self, shape: tuple[int, ...]) -> Pending:
        """The same numbers in another shape of the same width."""
        return Pending(shape, self.dtype, self._compute)

    def alone(self) -> Tensor:
        return self._compute(None, False).view(self.shape)

    def onto(self, before: Tensor, own: bool) -> Tensor:
        """The sum; `before` may be overwritten where it is nobody else's (own)."""
        if before.dtype != self.dtype:
            return before + self.alone()
        own = own and before.is_contiguous()
        return self._compute(before.reshape(-1, self.shape[-1]), own).view(self.shape)
