"""What both measuring commands do around the measurement."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from leannorm import records
from leannorm.bench import launches, layers, training
from leannorm.bench.conditions import conditions
from leannorm.bench.plan import LayerPlan, Plan, TrainingPlan
from leannorm.bench.results import default_path

if TYPE_CHECKING:
    from leannorm.bench.launches import LaunchBenchmark
    from leannorm.bench.results import Conditions, LayerBenchmark, TrainingBenchmark


def measure(
    plan: Plan, *, threads: int | None = None, out: Path | None = None, overwrite: bool = False, progress: bool = False
) -> tuple[LayerBenchmark | TrainingBenchmark, Path]:
    """Run a plan and write the raw results: the checks, and anew after each case that was timed.

    Args:
        plan: of layers or of training.
        threads: of torch; None leaves its own choice.
        out: the file; None is `leannorm.bench.results.default_path`.
        overwrite: replace the file if it is there.
        progress: show a bar on standard error.

    Returns:
        The results and their file.

    Raises:
        FileExistsError: if the file is there; nothing is measured.
        RedGate: if a side is less accurate than it may be; the file then holds the checks, and no timings.
        ValueError: for a number of threads below 1, or a device that is not there.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    described = conditions(plan)
    out = _file("layers" if isinstance(plan, LayerPlan) else "training", described, out, overwrite)
    match plan:
        case LayerPlan():
            states = layers.run(plan, described, progress=progress)
        case TrainingPlan():
            states = training.run(plan, described, progress=progress)
        case _:
            raise TypeError(f"expected a LayerPlan or a TrainingPlan, got {plan!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    results = next(states)
    records.write(out, results)
    for results in states:
        records.write(out, results)
    return results, out


def measure_launches(
    plan: LayerPlan, *, out: Path | None = None, overwrite: bool = False
) -> tuple[LaunchBenchmark, Path]:
    """Count and time the launches of a plan's layers, and write the raw results; arguments as of `measure`.

    Raises:
        FileExistsError: if the file is there; nothing is measured.
        ValueError: for a device that is not there, or that is no GPU.
    """
    described = conditions(plan)
    out = _file("launches", described, out, overwrite)
    results = launches.run(plan, described)
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write(out, results)
    return results, out


def _file(kind: str, described: Conditions, out: Path | None, overwrite: bool) -> Path:
    out = out or default_path(kind, described, datetime.datetime.now(datetime.UTC).date())
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} holds earlier results: give another --out, or --overwrite")
    return out
