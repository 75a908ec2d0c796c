"""What a layer costs the host: kernel launches, and microseconds until they are submitted, forward and backward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from leannorm.bench import timing
from leannorm.bench.layers import Case, sides, stepping
from leannorm.bench.results import Conditions

if TYPE_CHECKING:
    from collections.abc import Callable

    from leannorm.bench.plan import LayerPlan

SHAPE = (2, 64, 8, 8)  # so small that the device is always done before the host


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
    """Time, then count; nothing is checked, since the same layers pass the gate of `leannorm.bench.layers`.

    Raises:
        ValueError: for a plan of another device than a GPU.
    """
    if torch.device(plan.device).type != "cuda":
        raise ValueError(f"launches are those of a GPU, got the device {plan.device!r}; use --device cuda")
    measured = []
    for operation in plan.operations:
        case = Case(operation, SHAPE, "channels_last", "bf16", plan.device, plan.seed)
        layers = sides(case, dataclasses.replace(plan, compiled=False))
        steps = {side: stepping(layer, case) for side, layer in layers.items()}
        timed = timing.interleave(steps, repeats=plan.repeats, seed=plan.seed, device=plan.device, submission=True)
        measured.append((operation, steps, timed))
    cases = [  # once all are timed, since a profiler may slow down what follows
        LaunchCase(operation, each.side, _launches(steps[each.side]), each.seconds)
        for operation, steps, timed in measured
        for each in timed
    ]
    return LaunchBenchmark("launches", conditions, tuple(cases))


def _launches(step: Callable[[], object]) -> int:
    with _profile():  # the first one may miss what is launched while it starts
        step()
        torch.cuda.synchronize()
    with _profile() as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


def _profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
