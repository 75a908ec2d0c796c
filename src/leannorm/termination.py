"""SIGTERM for commands that write files: as an interruption, it lets them clean up."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def unwound() -> Iterator[None]:
    """Let SIGTERM unwind what is under way, so that it removes what it made, and exit by the signal's convention.

    Not for `train`: Lightning has a handler of its own.
    """

    def terminate(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleaning up
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM:
            print(f"terminated: {left(end)}", file=sys.stderr)  # noqa: T201 - the command's last words
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def left(end: BaseException) -> str:
    """Say what a command that was stopped has left: what the exception's notes say, or nothing."""
    return "; ".join(getattr(end, "__notes__", ())) or "nothing was changed"
