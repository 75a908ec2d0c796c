"""Interleaved timing: every round takes one sample of every side, in random order."""

from __future__ import annotations

import gc
import math
import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from leannorm.bench.results import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SHORTEST_SAMPLE = 5e-3  # seconds; far above the clock's grain and a thread's wake-up
REPLAYED = ", replayed"  # of a side's name: its CUDA graph is timed


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    seed: int = 0,
    device: str = "cpu",
    shortest_sample: float = SHORTEST_SAMPLE,
    rest: float = 0.0,
    untimed: int = 0,
    submission: bool = False,
) -> tuple[Timing, ...]:
    """Time steps against each other.

    Each step is warmed up, and repeated within a sample until one sample lasts ``shortest_sample``. What slows the
    machine for a while then slows all sides of a round alike, so that ratios within a round are sound.

    Args:
        steps: what to time, by the side's name.
        repeats: samples of each side.
        seed: of the order within the rounds.
        device: "cpu" or "cuda"; on the latter events are timed.
        shortest_sample: seconds.
        rest: seconds to sleep before each sample, and then to warm up by one untimed iteration: threads of another
            side's library may go on spinning for a while after its last iteration.
        untimed: iterations before each sample, until caches and the allocator are as this side alone would have them.
        submission: on "cuda" time the host, until it has submitted a sample's work to an idle device.

    Returns:
        One timing a side, in the order of ``steps``.
    """
    on_cuda = _submission_seconds if submission else _cuda_seconds
    seconds_of = on_cuda if torch.device(device).type == "cuda" else _cpu_seconds
    iterations = {side: _iterations(step, seconds_of, shortest_sample) for side, step in steps.items()}
    samples: dict[str, list[float]] = {side: [] for side in steps}
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    with _no_garbage_collection():
        for _ in range(repeats):
            shuffle(order)
            for side in order:
                if rest:
                    time.sleep(rest)
                for _ in range(max(untimed, rest > 0)):
                    steps[side]()
                samples[side].append(seconds_of(steps[side], iterations[side]))
    return tuple(Timing(side, iterations[side], tuple(samples[side])) for side in steps)


def graph_of(step: Callable[[], object]) -> Callable[[], object]:
    """Capture what a step launches as a CUDA graph, and give the graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation and the libraries' first calls cannot be captured
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _iterations(step: Callable[[], object], seconds_of: Callable, shortest_sample: float) -> int:
    """Warm up, then give the number of iterations that a sample needs."""
    seconds_of(step, 1)
    iterations = 1
    while (elapsed := iterations * seconds_of(step, iterations)) < shortest_sample:
        iterations = max(iterations + 1, math.ceil(1.2 * iterations * shortest_sample / max(elapsed, 1e-7)))
    return iterations


def _cpu_seconds(step: Callable[[], object], iterations: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(iterations):
        step()
    return (time.perf_counter_ns() - start) / 1e9 / iterations


def _cuda_seconds(step: Callable[[], object], iterations: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(iterations):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / iterations


def _submission_seconds(step: Callable[[], object], iterations: int) -> float:
    torch.cuda.synchronize()
    seconds = _cpu_seconds(step, iterations)
    torch.cuda.synchronize()
    return seconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
