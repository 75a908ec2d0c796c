"""Steps in processes of their own, so that none finds in the C library what another one left there.

How fast a step is depends on the memory that freed tensors have left: on the CPU the C library returns some of it to
the system and keeps the rest, as sizes and order have it. A training has its process for itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Generic, TypeVar

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
        with self._told_if_it_ends():
            return self._here.recv()

    def step(self) -> None:
        """Have the process take a step, and wait for it."""
        with self._told_if_it_ends():
            self._here.send(True)
            self._here.recv()

    def end(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join()

    @contextmanager
    def _told_if_it_ends(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            killed = code == -signal.SIGKILL
            why = "the system, perhaps for want of memory" if killed else "itself; what it said is above"
            raise RuntimeError(f"the process of {self._name} was ended with code {code} by {why}") from None


def isolated(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own, so that the memory that it took is free again."""
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as executor:
        return executor.submit(function, *arguments).result()


@contextmanager
def apart(makers: Mapping[str, Callable[[], Made[T]]]) -> Iterator[dict[str, Made[T]]]:
    """Make things and their steps in a process each, one after the other, by functions that pickle.

    Yields:
        What they made, by name, and functions that take the steps: a message there, the step, a message back.

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
    with suppress(EOFError, ConnectionError):  # nobody asks any more
        there.send(made)
        while there.recv():
            step()
            there.send(None)
