"""The figures that are wanted of the GPU kernels, and what recorded results say about each."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leannorm import records
from leannorm.bench import results, summary
from leannorm.bench.launches import LaunchBenchmark
from leannorm.bench.results import LayerBenchmark, TrainingBenchmark
from leannorm.bench.timing import REPLAYED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leannorm.bench.results import Timing

    Recorded = Sequence[LayerBenchmark | TrainingBenchmark | LaunchBenchmark]
    Figure = Callable[[Recorded], float | None]

RESULTS = Path("benchmarks/results")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """A figure that is wanted, and how recorded results tell it; None where they do not."""

    what: str
    wanted: str
    figure: Figure
    spelling: str = "{:.2f}x"


def table(folder: Path = RESULTS) -> str:
    """Give every target with what was measured of it on each GPU, as a Markdown table."""
    recorded = _recorded(folder)
    devices = sorted({result.conditions.device for result in recorded}) or ["GPU"]
    lines = ["| figure | wanted | " + " | ".join(devices) + " |", "|---|---|" + "---|" * len(devices)]
    for target in TARGETS:
        shown = []
        for device in devices:
            figure = target.figure([result for result in recorded if result.conditions.device == device])
            shown.append(NOT_MEASURED if figure is None else target.spelling.format(figure))
        lines.append(f"| {target.what} | {target.wanted} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _recorded(folder: Path) -> Recorded:
    found: list[LayerBenchmark | TrainingBenchmark | LaunchBenchmark] = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("launches-"):
            found.append(records.read(LaunchBenchmark, path))
        elif path.name.startswith(("layers-", "training-")):
            found.append(results.read(path))
    return [result for result in found if result.conditions.device != "cpu" and not result.conditions.quick]


def _layer(operation: str, side: str, peer: str) -> Figure:
    """Times faster than the peer: over the shapes the geometric mean of medians."""

    def figure(recorded: Recorded) -> float | None:
        ratios = [_median_ratio(case.timings, side, peer) for case in _cases(recorded, operation)]
        known = [ratio for ratio in ratios if ratio is not None]
        return summary.geometric_mean(known) if known else None

    return figure


def _floor(operation: str, side: str) -> Figure:
    """The share of the measured copy bandwidth, over the shapes well beyond the cache."""

    def figure(recorded: Recorded) -> float | None:
        shares = [
            statistics.median(summary.floor_share(case, side))
            for result in recorded
            for case in _cases([result], operation)
            if summary.is_beyond_cache(case, result.conditions.cache_bytes)
            and side in {timing.side for timing in case.timings}
        ]
        return summary.geometric_mean(shares) if shares else None

    return figure


def _cases(recorded: Recorded, operation: str) -> list[results.LayerCase]:
    layers = [result for result in recorded if isinstance(result, LayerBenchmark)]
    return [case for result in layers for case in result.cases if case.operation == operation]


def _training(model: str, side: str, peer: str) -> Figure:
    def figure(recorded: Recorded) -> float | None:
        trained = [result for result in recorded if isinstance(result, TrainingBenchmark)]
        ratios = [_median_ratio(c.timings, side, peer) for result in trained for c in result.cases if c.model == model]
        known = [ratio for ratio in ratios if ratio is not None]
        return summary.geometric_mean(known) if known else None

    return figure


def _share_of_step(recorded: Recorded) -> float | None:
    faster = _training("resnet50", "ceiling", "torch")(recorded)
    return None if faster is None else 1 - 1 / faster


def _launching(operation: str, side: str) -> Figure:
    """The host's time for a step over torch's."""

    def figure(recorded: Recorded) -> float | None:
        for result in recorded:
            if isinstance(result, LaunchBenchmark):
                seconds = {c.side: statistics.median(c.seconds) for c in result.cases if c.operation == operation}
                if side in seconds:
                    return seconds[side] / seconds["torch"]
        return None

    return figure


def _median_ratio(timings: Sequence[Timing], side: str, peer: str) -> float | None:
    seconds = {timing.side: timing.seconds for timing in timings}
    if side not in seconds or peer not in seconds:
        return None
    return statistics.median(summary.ratios(seconds[peer], seconds[side]))


TARGETS = (
    *(
        Target(f"{operation}, {side}{how}, against {peer}", wanted, _layer(operation, side + how, peer + how))
        for operation in ("bn+relu", "bn+add+relu")
        for side in ("fs:1/32", "grid:1/32")
        for peer, wanted in (("torch", ">= 2.5x"), ("torch.compile", ">= 1.3x"))
        for how in ("", REPLAYED)
    ),
    *(
        Target(f"bn+relu, full{how}, against torch", ">= 1.5x", _layer("bn+relu", "full" + how, "torch" + how))
        for how in ("", REPLAYED)
    ),
    *(
        Target(
            f"bn+relu, {side}{REPLAYED}, of the copy bandwidth", ">= 75%", _floor("bn+relu", side + REPLAYED), "{:.0%}"
        )
        for side in ("full", "grid:1/32")
    ),
    Target("bn+add+relu, grid:1/32, host time over torch's", "<= 1", _launching("bn+add+relu", "grid:1/32"), "{:.2f}"),
    *(
        Target(f"{model} step, grid:1/32 + fuse, against {peer}", wanted, _training(model, "grid:1/32 + fuse", peer))
        for model, peer, wanted in (
            ("resnet50", "torch", ">= 1.25x"),
            ("resnet50", "torch.compile", ">= 1.05x"),
            ("densenet121", "torch", ">= 1.3x"),
        )
    ),
    Target("share of BN and ReLU in torch's resnet50 step", "", _share_of_step, "{:.0%}"),
)
