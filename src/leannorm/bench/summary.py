"""Raw results to figures: ratios within rounds, their quartiles, geometric means and the memory-bandwidth floor.

The floor of an operation is the time in which its tensors can go through memory once: BN and BN+ReLU take five passes
(read x, write y; read x, read dy, write dx), BN+add+ReLU seven (read x, read the residual, write y; read x, read dy,
write dx, write the residual's gradient). The mask of the ReLU is counted as nothing, sampled statistics too. A pass
takes half the time of a copy of the same tensor, which the same rounds measure.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leannorm.bench import gate
from leannorm.bench.timing import REPLAYED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leannorm.bench.results import LayerBenchmark, LayerCase, Timing, TrainingBenchmark, TrainingCase

PASSES = {"bn": 5, "bn+relu": 5, "bn+add+relu": 7}
BYTES = {"fp32": 4, "bf16": 2}
COPY_PASSES = 2
GATE_RED = "gate red"
BEYOND_CACHE = 2  # times the last-level cache: from here on a copy goes through memory


@dataclass(frozen=True)
class Quartiles:
    """The middle of some ratios, and where their middle half lies."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class LayerRow:
    """A side over all shapes: how many times faster than torch, geometric means of medians and of quartiles.

    ``of_floor`` is the share of the memory-bandwidth floor reached on tensors well over the last-level cache, a
    geometric mean; None where there is no such tensor.
    """

    operation: str
    layout: str
    dtype: str
    side: str
    speedup: Quartiles
    worst: float
    worst_shape: tuple[int, ...]
    of_floor: float | None


@dataclass(frozen=True)
class TrainingRow:
    """A side of a model's training step: how many times faster than torch, and the share of torch's saved bytes."""

    model: str
    side: str
    speedup: Quartiles
    saved: float | None


def layer_rows(benchmark: LayerBenchmark) -> list[LayerRow]:
    """Summarize each operation and side, over everything first and then by layout and dtype; the floor is a side."""
    rows = []
    timed = [case for case in benchmark.cases if case.timings]
    for operation in dict.fromkeys(case.operation for case in timed):
        cases = [case for case in timed if case.operation == operation]
        kinds = list(dict.fromkeys((case.layout, case.dtype) for case in cases))
        groups = {kind: [case for case in cases if (case.layout, case.dtype) == kind] for kind in kinds}
        if len(kinds) > 1:
            groups = {("all", "all"): cases} | groups
        for (layout, dtype), group in groups.items():
            sides = [timing.side for timing in group[0].timings if timing.side not in ("torch", "copy")]
            for side in [*sides, "torch", "floor"]:
                speedups = {case: quartiles(speedup(case, side)) for case in group}
                worst = min(group, key=lambda case: speedups[case].median)
                large = [case for case in group if is_beyond_cache(case, benchmark.conditions.cache_bytes)]
                rows.append(
                    LayerRow(
                        operation,
                        layout,
                        dtype,
                        side,
                        mean_quartiles(speedups.values()),
                        speedups[worst].median,
                        worst.shape,
                        geometric_mean([quartiles(floor_share(case, side)).median for case in large])
                        if large
                        else None,
                    )
                )
    return rows


def training_rows(benchmark: TrainingBenchmark) -> list[TrainingRow]:
    """Summarize each side of each model, then each side's geometric mean over the models."""
    rows = []
    for case in benchmark.cases:
        saved = {kept.side: kept.bytes for kept in case.saved}
        for timing in case.timings:
            if timing.side != "torch":
                share = saved[timing.side] / saved["torch"] if timing.side in saved else None
                faster = ratios(_timing(case.timings, "torch").seconds, timing.seconds)
                rows.append(TrainingRow(case.model, timing.side, quartiles(faster), share))
    for side in dict.fromkeys(row.side for row in rows):
        over = [row for row in rows if row.side == side]
        shares = [row.saved for row in over if row.saved is not None]
        mean = mean_quartiles(row.speedup for row in over)
        rows.append(TrainingRow("geometric mean", side, mean, geometric_mean(shares) if shares else None))
    return rows


def status(cases: Sequence[LayerCase | TrainingCase]) -> str:
    """Say what keeps cases from being told in full: a red gate, or that some were not timed; nothing where all were."""
    if gate.red(cases):
        return GATE_RED
    timed = sum(bool(case.timings) for case in cases)
    return "" if timed == len(cases) else f"{timed} of {len(cases)} cases"


def speedup(case: LayerCase, side: str) -> list[float]:
    """Give torch's time over the side's, for each round; where a graph was replayed, torch's graph."""
    peer = "torch" + REPLAYED if side.endswith(REPLAYED) else "torch"
    return ratios(_timing(case.timings, peer).seconds, _seconds(case, side))


def floor_share(case: LayerCase, side: str) -> list[float]:
    """Give the floor's time over the side's, for each round."""
    return ratios(_seconds(case, "floor"), _seconds(case, side))


def floor_bytes(case: LayerCase) -> int:
    """Give the bytes that the operation's passes move."""
    return PASSES[case.operation] * _input_bytes(case)


def is_beyond_cache(case: LayerCase, cache_bytes: int | None) -> bool:
    """Whether a copy of the input goes through memory: what it reads and writes is twice the last-level cache."""
    return cache_bytes is not None and COPY_PASSES * _input_bytes(case) >= BEYOND_CACHE * cache_bytes


def ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    """Divide the samples of the same rounds."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


def quartiles(values: Sequence[float]) -> Quartiles:
    """Give the quartiles, by linear interpolation.

    >>> quartiles([1.0, 2.0, 4.0])
    Quartiles(low=1.5, median=2.0, high=3.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def geometric_mean(values: Iterable[float]) -> float:
    """Give the geometric mean.

    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    return math.exp(statistics.fmean(map(math.log, values)))


def mean_quartiles(values: Iterable[Quartiles]) -> Quartiles:
    """Give the geometric means of medians and of quartiles."""
    values = list(values)
    return Quartiles(*(geometric_mean([getattr(q, name) for q in values]) for name in ("low", "median", "high")))


def _seconds(case: LayerCase, side: str) -> Sequence[float]:
    if side != "floor":
        return _timing(case.timings, side).seconds
    copy = _timing(case.timings, "copy").seconds
    bandwidths = [COPY_PASSES * _input_bytes(case) / seconds for seconds in copy]
    return [floor_bytes(case) / bandwidth for bandwidth in bandwidths]


def _input_bytes(case: LayerCase) -> int:
    return math.prod(case.shape) * BYTES[case.dtype]


def _timing(timings: Iterable[Timing], side: str) -> Timing:
    (timing,) = (timing for timing in timings if timing.side == side)
    return timing
