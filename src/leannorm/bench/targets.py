"""The figures that are wanted of the GPU kernels, and what recorded results say about each."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leannorm import records
from leannorm.bench import results, summary
from leannorm.bench.launches import LaunchBenchmark, LaunchCase
from leannorm.bench.layers import COMPILED, DECOMPOSED
from leannorm.bench.results import LayerBenchmark, TrainingBenchmark
from leannorm.bench.timing import REPLAYED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leannorm.bench.results import Conditions, LayerCase, Timing, TrainingCase

    Recorded = Sequence[LayerBenchmark | TrainingBenchmark | LaunchBenchmark]
    Cell = Callable[[Recorded], str | None]
    Figure = Callable[[Any, Conditions], float | None]

RESULTS = Path("benchmarks/results")
NOT_MEASURED = "not measured"
DECOMPOSED_KIND = "decomposed"


@dataclass(frozen=True)
class Target:
    """A figure that is wanted, and how recorded results tell it; None where they do not."""

    what: str
    wanted: str
    cell: Cell


def table(folder: Path = RESULTS) -> str:
    """Give every target with what was measured of it on each GPU at each commit, as a Markdown table."""
    columns: dict[str, list[LayerBenchmark | TrainingBenchmark | LaunchBenchmark]] = {}
    for result in _recorded(folder):
        columns.setdefault(f"{result.conditions.device}, {result.conditions.environment.commit[:7]}", []).append(result)
    columns = dict(sorted(columns.items())) or {"GPU": []}
    lines = ["| figure | wanted | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for target in TARGETS:
        cells = (target.cell(recorded) or NOT_MEASURED for recorded in columns.values())
        lines.append(f"| {target.what} | {target.wanted} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _recorded(folder: Path) -> Recorded:
    found: list[LayerBenchmark | TrainingBenchmark | LaunchBenchmark] = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("launches-"):
            found.append(records.read(LaunchBenchmark, path))
        elif path.name.startswith(f"layers-{DECOMPOSED_KIND}-"):
            found.append(replace(results.read(path), kind=DECOMPOSED_KIND))  # their "torch" is of another run
        elif path.name.startswith(("layers-", "training-")):
            found.append(results.read(path))
    return [result for result in found if result.conditions.device != "cpu" and not result.conditions.quick]


def _over_cases(
    name: str, figure: Figure, show: Callable[[float], str] = "{:.2f}x".format, *, decomposed: bool = False
) -> Cell:
    """Show the geometric mean of a figure over an operation's shapes, or over a model's results."""

    def cell(recorded: Recorded) -> str | None:
        told = [
            result
            for result in recorded
            if not isinstance(result, LaunchBenchmark)
            and name in map(_name, result.cases)
            and (result.kind == DECOMPOSED_KIND) == decomposed
        ]
        if any(summary.status(result.cases) == summary.GATE_RED for result in told):
            return summary.GATE_RED
        own = [(case, result.conditions) for result in told for case in result.cases if _name(case) == name]
        known = [found for case, where in own if case.timings and (found := figure(case, where)) is not None]
        if not known:
            return None
        partial = summary.status([case for case, _ in own])
        return show(summary.geometric_mean(known)) + (f" ({partial})" if partial else "")

    return cell


def _name(case: LayerCase | TrainingCase) -> str:
    return case.operation if isinstance(case, results.LayerCase) else case.model


def _layer(operation: str, side: str, peer: str, *, decomposed: bool = False) -> Cell:
    """Times faster than the peer."""
    return _over_cases(operation, lambda case, _: _median_ratio(case.timings, side, peer), decomposed=decomposed)


def _floor(operation: str, side: str) -> Cell:
    """The share of the measured copy bandwidth, over the shapes well beyond the cache."""

    def figure(case: LayerCase, conditions: Conditions) -> float | None:
        timed = side in {timing.side for timing in case.timings}
        if not timed or not summary.is_beyond_cache(case, conditions.cache_bytes):
            return None
        return statistics.median(summary.floor_share(case, side))

    return _over_cases(operation, figure, "{:.0%}".format)


def _training(model: str, side: str, peer: str, show: Callable[[float], str] = "{:.2f}x".format) -> Cell:
    """Times faster than the peer, or what is shown of it."""
    return _over_cases(model, lambda case, _: _median_ratio(case.timings, side, peer), show)


def _launching(operation: str, side: str, show: Callable[[LaunchCase, LaunchCase], str]) -> Cell:
    """What is shown of a side and of torch."""

    def cell(recorded: Recorded) -> str | None:
        for result in recorded:
            if isinstance(result, LaunchBenchmark):
                cases = {case.side: case for case in result.cases if case.operation == operation}
                if side in cases:
                    return show(cases[side], cases["torch"])
        return None

    return cell


def _host_time(ours: LaunchCase, torchs: LaunchCase) -> str:
    return f"{statistics.median(ours.seconds) / statistics.median(torchs.seconds):.2f}"


def _launches(ours: LaunchCase, torchs: LaunchCase) -> str:
    return f"{ours.launches} / {torchs.launches}"


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
        Target(f"bn+relu, {side}{REPLAYED}, of the copy bandwidth", ">= 75%", _floor("bn+relu", side + REPLAYED))
        for side in ("full", "grid:1/32")
    ),
    *(
        Target(
            f"bn+relu, {side} in torch.compile, one operator against decomposed",
            "",
            _layer("bn+relu", side + COMPILED, side + DECOMPOSED, decomposed=True),
        )
        for side in ("full", "grid:1/32")
    ),
    Target(
        "bn+add+relu, grid:1/32, host time over torch's", "<= 1", _launching("bn+add+relu", "grid:1/32", _host_time)
    ),
    Target(
        "bn+add+relu, grid:1/32, launches, ours / torch's",
        "<= torch's",
        _launching("bn+add+relu", "grid:1/32", _launches),
    ),
    *(
        Target(f"{model} step, grid:1/32 + fuse, against {peer}", wanted, _training(model, "grid:1/32 + fuse", peer))
        for model, peer, wanted in (
            ("resnet50", "torch", ">= 1.25x"),
            ("resnet50", "torch.compile", ">= 1.05x"),
            ("densenet121", "torch", ">= 1.3x"),
        )
    ),
    Target(
        "share of BN and ReLU in torch's resnet50 step",
        "",
        _training("resnet50", "ceiling", "torch", lambda faster: f"{1 - 1 / faster:.0%}"),
    ),
)
