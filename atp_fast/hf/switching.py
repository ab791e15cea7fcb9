"""Functions of single modules exchanged for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def switched(
    functions: Sequence[tuple[nn.Module, str]], replace: Callable[[Any, Function], Function]
) -> Iterator[None]:
    """Inside, module.name is replace(module, module.name) for each of these (module, name); all is restored at the end."""
    before = [(module, name, vars(module).get(name)) for module, name in functions]
    try:
        for module, name in functions:
            setattr(module, name, replace(module, getattr(module, name)))
        yield
    finally:
        for module, name, own in before:
            if own is None:  # the class's function
                vars(module).pop(name, None)
            else:
                setattr(module, name, own)
