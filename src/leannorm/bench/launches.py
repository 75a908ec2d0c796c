"""What a layer costs the host: kernel launches, and microseconds until they are submitted, forward and backward."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from leannorm.bench.layers import Case, sides, stepping
from leannorm.bench.results import Conditions

if TYPE_CHECKING:
    from collections.abc import Callable

    from leannorm.bench.plan import LayerPlan

SHAPE = (2, 64, 8, 8)  # so small that the device is always done before the host
STEPS, WARM_UP = 50, 20


@dataclass(frozen=True)
class LaunchCase:
    """One side of one operation; ``seconds`` are those of the host for a step, one sample a repeat."""

    operation: str
    side: str
    launches: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class LaunchBenchmark:
    """The launch cost of every side of every operation of a plan."""

    kind: str
    conditions: Conditions
    cases: tuple[LaunchCase, ...]


def run(plan: LayerPlan, conditions: Conditions) -> LaunchBenchmark:
    """Count and time; nothing is checked, since the same layers pass the gate of `leannorm.bench.layers`.

    Raises:
        ValueError: for a plan of another device than a GPU.
    """
    if torch.device(plan.device).type != "cuda":
        raise ValueError(f"launches are those of a GPU, got the device {plan.device!r}; use --device cuda")
    cases = []
    for operation in plan.operations:
        case = Case(operation, SHAPE, "channels_last", "bf16", plan.device, plan.seed)
        for side, layer in sides(case, dataclasses.replace(plan, compiled=False)).items():
            step = stepping(layer, case)
            for _ in range(WARM_UP):
                step()
            seconds = tuple(_submitted(step) for _ in range(plan.repeats))
            cases.append(LaunchCase(operation, side, _launches(step), seconds))
    return LaunchBenchmark("launches", conditions, tuple(cases))


def _submitted(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(STEPS):
        step()
    elapsed = time.perf_counter_ns() - start
    torch.cuda.synchronize()
    return elapsed / 1e9 / STEPS


def _launches(step: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())
