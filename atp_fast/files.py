"""Files that are whole or absent: text, CSV tables, and tensors with a header of JSON texts (safetensors, no pickle)."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "atp_fast.{kind}/2"
_WITHOUT_DIGEST = "atp_fast.{kind}/1"


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder, put in place of `path` when the block ends without an exception.

    Raises OSError naming `path` if its folder cannot be written; nothing half-written is left behind.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: {target.parent} is not a folder")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that nobody else may read
        temporary.replace(target)
    except OSError as error:
        raise type(error)(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8). Raises OSError naming the path."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(
    path: str | os.PathLike[str], header: Iterable[str], rows: Iterable[Iterable[Any]]
) -> None:
    """Write a CSV table (UTF-8); None becomes an empty cell. Raises OSError naming the path."""
    with (
        written_whole(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
) -> None:
    """Write tensors, and a header of anything JSON holds, as a file of this kind. Raises OSError naming the path."""
    # imports torch, which the command line's help does without
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory, and views of a larger tensor often do.
    whole = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    texts = {name: json.dumps(value) for name, value in header.items()}
    texts["format"] = _FORMAT.format(kind=kind)
    with written_whole(path) as temporary:
        try:
            save_file(whole, temporary, metadata=texts | {"digest": _digest(whole, texts)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """SHA-256 of everything that a file says: a number that a disk has changed is then no number."""
    import torch

    seen = hashlib.sha256(json.dumps(sorted(texts.items())).encode())
    for name, x in sorted(tensors.items()):
        seen.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        seen.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


class loading:
    """The tensors and header of a saved result; whatever goes wrong becomes one ValueError naming the path."""

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path, self.kind = Path(path), kind

    def __enter__(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self.path.exists():
            raise FileNotFoundError(f"no result file at {self.path}")
        wanted, older = (text.format(kind=self.kind) for text in (_FORMAT, _WITHOUT_DIGEST))
        try:
            with safe_open(self.path, framework="pt") as file:
                header = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path} must be a file written by save, whole and readable, got: {error}"
            ) from error
        found, digest = header.get("format", "no format at all"), header.pop("digest", None)
        if found != wanted and (found != older or digest is not None):
            version = " (of another version of atp_fast)" if _same_kind(found, wanted) else ""
            raise ValueError(f"{self.path} must hold {wanted}, got {found}{version}")
        if found == wanted and digest != _digest(tensors, header):
            raise ValueError(
                f"{self.path} must be what save wrote, its digest says that it was changed"
            )
        del header["format"]
        try:
            return tensors, {name: json.loads(text) for name, text in header.items()}
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} must have a header of JSON texts, got {error}"
            ) from error

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, IndexError)):
            raise ValueError(
                f"{self.path} must hold {self.kind} in full, got: {error!r}"
            ) from error


def _same_kind(one: str, other: str) -> bool:
    return one.partition("/")[0] == other.partition("/")[0]
