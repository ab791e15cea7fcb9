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
        return cls.made_product(grad, lambda: matrix, matrix.shape[1], multiply)

    @classmethod
    def made_product(
        cls,
        grad: Tensor,
        make: Callable[[], Tensor],
        depth: int,
        multiply: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Pending:
        """`product` with the matrix (columns, depth) that `make` returns, called when the product is computed."""
        rows = grad.reshape(-1, grad.shape[-1])

        def compute(before: Tensor | None, own: bool) -> Tensor:
            if multiply is not None:
                found = multiply(rows, make())
                return found if before is None else found.add_(before)
            if before is None:
                return rows @ make()
            return before.addmm_(rows, make()) if own else torch.addmm(before, rows, make())

        return cls((*grad.shape[:-1], depth), grad.dtype, compute)

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
