"""What all verbs share: errors and warnings as one line each, and notes that a pipe does not see."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

_USER_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    ImportError,
    FloatingPointError,
    OSError,
)


class Commands(TyperGroup):
    """A group of verbs whose errors are one clear line and exit code 2, or a traceback under --debug."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (
            "--debug" in args
        ):  # it belongs to the group, and is typed at the end of a line that went wrong
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                raise
            except _USER_ERRORS as error:
                if ctx.params.get("debug"):
                    raise
                typer.echo(f"error: {error or type(error).__name__}", err=True)
                raise typer.Exit(2) from error


def note(text: str) -> None:
    """What is going on, on stderr, for someone who watches."""
    if sys.stderr.isatty():
        typer.echo(text, err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)
