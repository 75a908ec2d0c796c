"""A progress bar on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from leannorm.train.models import require

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, shown: bool) -> Iterable[T]:
    """Go through items, and show how far it is."""
    if not shown:
        return items
    require("rich", extra="train")
    from rich.console import Console
    from rich.progress import track as bar

    return bar(items, description, console=Console(stderr=True))
