"""What a command says, and its exit code, where it cannot go on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from leannorm.termination import left

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def clean_errors(interrupted: str | None = None) -> Iterator[None]:
    """Show what the user can mend as one message, and an interruption as what it means."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo(interrupted or f"interrupted: {left(error)}", err=True)
        raise typer.Exit(130) from error
