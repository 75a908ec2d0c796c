"""tune: for each convolution with its batch norm the form that is faster here, by measurement, remembered in a file."""

from __future__ import annotations

import copy
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from leannorm import records
from leannorm.conversion.fusion import fuse
from leannorm.conversion.fusion_check import training_outputs
from leannorm.nn import folding
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.virtual import VirtualMark
from leannorm.records import Change, TransformReport, TunedCall, TuningPlan

M = TypeVar("M", bound=nn.Module)

ROUNDS = 7
SHORTEST_SAMPLE = 5e-3  # seconds


def tune(
    model: M,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    prefer: Literal["speed", "memory"] = "speed",
    plan: str | Path | None = None,
) -> tuple[M, TransformReport]:
    """Fuse a model, and fold the convolution into each BN layer's operator where that is faster on this machine.

    Folding (`fuse` with ``convolution=True``) saves passes over the activations and keeps half as many, but convolves
    the sampled positions twice, which on small maps costs more than it saves. So each call of a layer in a training
    step is timed in both forms, forward and backward, on random tensors of its shapes; the model itself is only called
    once. What was measured is kept in a file, and not measured again: with the same file the choice is the same.

    Args:
        model: any module, with sampled statistics where there is to be something to choose.
        example_inputs: the arguments of a call, a tensor or a tuple, of the sizes that training has.
        prefer: "speed" takes the faster form; "memory" folds wherever it can, and measures nothing.
        plan: the file; None keeps one for each machine, number of threads and version of torch in the user's cache.

    Returns:
        The model, and a report of every BN layer as of `fuse`; those that had a choice with both times.

    Raises:
        ValueError: for another ``prefer``, or a file that holds no plan.
    """
    if prefer not in ("speed", "memory"):
        raise ValueError(f"tune prefers 'speed' or 'memory', got {prefer!r}")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    _, report = fuse(model, inputs, convolution=True)
    with folding.recorded() as calls:
        training_outputs(model, inputs, exact=False, gradients=True)
    if prefer == "memory" or not calls:
        return model, report
    path = _default_path(calls[0].device) if plan is None else Path(plan)
    known = {call.call: call for call in records.read(TuningPlan, path).calls} if path.exists() else {}
    chosen: dict[SampledBatchNorm, list[TunedCall]] = {}
    measured = False
    for call in calls:
        spelled = _spell(call)
        if spelled not in known:
            known[spelled] = TunedCall(spelled, *measure(call))
            measured = True
        chosen.setdefault(call.layer, []).append(known[spelled])
    if measured:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write(path, TuningPlan(tuple(known[name] for name in sorted(known))))
    notes = {layer: _choose(layer, timed) for layer, timed in chosen.items()}
    named = {
        name: notes[layer]
        for name, layer in model.named_modules()
        if isinstance(layer, SampledBatchNorm) and layer in notes
    }
    changes = [_with_times(change, named.get(change.module)) for change in report.changes]
    return model, TransformReport(tuple(changes), report.refusals)


def _choose(layer: SampledBatchNorm, timed: list[TunedCall]) -> tuple[float, float]:
    """Fold a layer's convolution if that is faster over all its calls; give both times."""
    apart, folded = (
        sum(seconds) for seconds in zip(*((c.apart_seconds, c.folded_seconds) for c in timed), strict=True)
    )
    layer.folds_convolution = folded < apart
    return apart, folded


def _with_times(change: Change, times: tuple[float, float] | None) -> Change:
    if times is None:
        return change
    apart, folded = times
    action = change.action if folded < apart else change.action.removeprefix("convolution + ")
    return Change(change.module, f"{action} ({1e3 * folded:.3g} ms folded, {1e3 * apart:.3g} ms apart)")


def measure(call: folding.Call) -> tuple[float, float]:
    """Time a call apart and folded, forward and backward, against each other; seconds, the medians of the rounds."""
    module, layer = copy.deepcopy(call.folded.module), copy.deepcopy(call.layer)
    if layer.virtual_mark is not None:
        layer.virtual_mark = VirtualMark(call.input.shape[0])
    x, residual = _like(call.input, call.device), _like(call.residual, call.device)
    folded, activation = call.folded._replace(module=module), None if layer.activation else call.activation
    forms = (
        lambda: layer(module(x), residual, activation),
        lambda: layer(x, residual, activation, folded),
    )
    steps = [_training_step(form) for form in forms]
    for step in steps:
        step()
    repeats = [max(1, round(SHORTEST_SAMPLE / _seconds(step, 1, call.device))) for step in steps]
    samples = [
        [_seconds(step, times, call.device) / times for step, times in zip(steps, repeats, strict=True)]
        for _ in range(ROUNDS)
    ]
    apart, together = (statistics.median(sample) for sample in zip(*samples, strict=True))
    return apart, together


def _like(sketch: Tensor | None, device: torch.device) -> Tensor | None:
    """Make a random tensor like one that was on no device."""
    if sketch is None:
        return None
    made = torch.empty_strided(sketch.shape, sketch.stride(), dtype=sketch.dtype, device=device)
    return made.normal_().requires_grad_(sketch.requires_grad)


def _training_step(form: Callable[[], Tensor]) -> Callable[[], None]:
    dy = torch.randn_like(form())

    def step() -> None:
        form().backward(dy)

    return step


def _seconds(step: Callable[[], None], times: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _spell(call: folding.Call) -> str:
    """Say all that the time of a call depends on, besides the machine."""
    x = call.input
    order = "".join(str(d) for d in sorted(range(x.ndim), key=lambda d: (-x.stride(d), d)))
    parts = [
        re.sub(r"\s+", " ", str(call.folded.module)),
        f"of {'x'.join(map(str, x.shape))} in order {order}, {call.folded.dtype} on {call.device.type}",
        f"statistics {call.layer.statistics}",
        *(["+ residual"] if call.residual is not None else []),
        *([f"+ {call.activation}"] if call.activation is not None else []),
        *([] if x.requires_grad else ["without the input's gradient"]),
    ]
    return ", ".join(parts)


def _default_path(device: torch.device) -> Path:
    name = f"{platform.machine()} {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leannorm"
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{device.type} {name} torch {torch.__version__}".lower())
    return folder / f"tune-{slug}.json"
