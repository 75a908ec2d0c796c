"""Steps in processes of their own, so that none finds in the C library what another one left there.

How fast a step is depends on the memory that freed tensors have left: on the CPU the C library returns some of it to
the system and keeps the rest, as sizes and order have it. A training has its process for itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.connection import Connection

    Made = tuple["T", Callable[[], object]]

T = TypeVar("T")


class Process(Generic[T]):
    """A process that has made something, and a step, which it takes when it is called."""

    def __init__(self, name: str, make: Callable[[], Made[T]]) -> None:
        context = multiprocessing.get_context("spawn")  # what this process has in memory is not to be there
        self._name = name
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, torch.get_num_threads()), daemon=True)
        self._process.start()
        there.close()

    def made(self) -> T:
        """Wait for what the process makes."""
        return self._received()

    def step(self) -> None:
        """Have the process take a step, and wait for it."""
        self._here.send(True)
        self._received()

    def end(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join()

    def _received(self) -> Any:
        try:
            return self._here.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the process of {self._name} ended with code {self._process.exitcode}; what it said is above"
            ) from None


@contextmanager
def apart(makers: Mapping[str, Callable[[], Made[T]]]) -> Iterator[dict[str, Made[T]]]:
    """Make things and their steps in a process each, one after the other, by functions that pickle.

    Yields:
        What they made, by name, and functions that take the steps, each some 50 microseconds longer than the step.

    Raises:
        RuntimeError: if a process ends before it is asked to.
    """
    with ExitStack() as processes:
        made = {}
        for name, make in makers.items():
            process: Process[T] = Process(name, make)
            processes.callback(process.end)
            made[name] = process.made(), process.step
        yield made


def _serve(there: Connection, make: Callable[[], Made[T]], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks for the steps ends this one
    torch.set_num_threads(threads)
    made, step = make()
    gc.collect()
    gc.disable()
    there.send(made)
    while _is_asked(there):
        step()
        there.send(None)


def _is_asked(there: Connection) -> bool:
    try:
        return there.recv()
    except EOFError:
        return False
