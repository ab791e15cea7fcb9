"""Tensors that wait for their layer's next turn: where they are, or put away on the host and on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")


class Parcel:
    """A tensor that waits where it is."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def take(self) -> Tensor:
        return self._x

    def drop(self) -> None:
        """It is not needed any more."""

    def here(self) -> Parcel:
        """A parcel that waits where it is taken."""
        return self


class Waiting:
    """Tensors wait where they are."""

    def put(self, x: Tensor) -> Parcel:
        return Parcel(x)


class _Away(Parcel):
    """A tensor that waits elsewhere; `rows` of it where one stands for all."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device

    def take(self) -> Tensor:
        x = self._brought().to(self._device)
        return x if len(x) == self._rows else x.expand(self._rows, *x.shape[1:])

    def here(self) -> Parcel:
        x = self.take()
        self.drop()
        return _Brought(x)

    def _brought(self) -> Tensor:
        raise NotImplementedError


class _Brought(Parcel):
    """A tensor that has waited elsewhere."""

    def drop(self) -> None:
        del self._x


class _InMemory(_Away):
    def __init__(self, rows: int, device: torch.device, x: Tensor, room: dict[str, int], of: str):
        super().__init__(rows, device)
        self._x, self._room, self._of = x, room, of
        room[of] -= x.nbytes

    def _brought(self) -> Tensor:
        return self._x

    def drop(self) -> None:
        self._room[self._of] += self._x.nbytes
        del self._x


class _InFile(_Away):
    def __init__(self, rows: int, device: torch.device, x: Tensor, path: str) -> None:
        super().__init__(rows, device)
        self._path, self._shape, self._dtype = path, x.shape, x.dtype
        with open(path, "wb") as file:
            file.write(_bytes_of(x.cpu().contiguous()))

    def _brought(self) -> Tensor:
        x = torch.empty(self._shape, dtype=self._dtype)
        with open(self._path, "rb") as file:
            file.readinto(_bytes_of(x))
        return x

    def drop(self) -> None:
        os.unlink(self._path)


class Shelf(Waiting):
    """Tensors wait on their own device within `here` bytes, in host memory within `host`, and beyond it in files.

    The files lie in a temporary folder (TMPDIR), made for the first of them and removed when the shelf is closed; it is a context
    manager.
    """

    def __init__(self, here: int, host: int = 0) -> None:
        self._room = {"here": here, "host": host}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, x: Tensor) -> Parcel:
        """Raises OSError, saying what to do, where the disk is full."""
        rows, x = len(x), x.detach()
        if rows > 1 and x.stride(0) == 0:
            x = x[:1]  # the same for all rows
        if x.nbytes <= self._room["here"]:
            whole = x.untyped_storage().nbytes() == x.nbytes
            return _InMemory(rows, x.device, x if whole else x.clone(), self._room, "here")
        if x.device.type != "cpu" and x.nbytes <= self._room["host"]:
            return _InMemory(rows, x.device, x.cpu(), self._room, "host")
        path = self._new_file()
        try:
            return _InFile(rows, x.device, x, path)
        except OSError as error:
            raise OSError(
                error.errno,
                f"layer inputs that wait for their layer could not be written to {Path(path).parent} ({error.strerror}): give a "
                "larger memory_budget, fewer pairs, or a larger disk in TMPDIR",
            ) from error

    def _new_file(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="atp_fast-")
        self._files += 1
        return str(Path(self._folder.name, str(self._files)))


def _bytes_of(x: Tensor) -> Any:
    """The memory of a contiguous CPU tensor, to write from or read into."""
    return memoryview(x.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Each(Sequence[T]):
    """The items of a list of parcels, each made from its parcels when it is asked for."""

    def __init__(
        self, parcels: Sequence[Sequence[Parcel]], made: Callable[[list[Tensor]], T]
    ) -> None:
        self._parcels, self._made = parcels, made

    def __len__(self) -> int:
        return len(self._parcels)

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        return self._made([parcel.take() for parcel in self._parcels[number]])
