"""tune: for each batch norm, and the convolution before it, the form that is faster here, measured and remembered."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from leannorm import backends, records
from leannorm.backends.cpu import extension
from leannorm.conversion.fusion import fuse
from leannorm.conversion.fusion_check import training_outputs
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.calls import Call, recorded
from leannorm.nn.method import MethodNorm
from leannorm.nn.virtual import VirtualMark
from leannorm.records import Change, CompiledCall, TransformReport, TunedCall, TuningPlan

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", TunedCall, CompiledCall)

ROUNDS = 7
SHORTEST_SAMPLE = 5e-3  # seconds


def tune(
    model: M,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    prefer: Literal["speed", "memory"] = "speed",
    compiled: bool = False,
    plan: str | Path | None = None,
) -> tuple[M, TransformReport]:
    """Fuse a model, and fold the convolution into each BN layer's operator where that is faster on this machine.

    Folding (`fuse` with ``convolution=True``) saves passes over the activations and keeps half as many, but convolves
    the sampled positions twice, which on small maps costs more than it saves. So each call of a layer in a training
    step is timed in both forms, forward and backward, on random tensors of its shapes; the model itself is only called
    once or twice. What was measured is kept in a file, and not measured again: with the same file the choice is the
    same.

    Args:
        model: any module, with sampled statistics where there is to be something to choose.
        example_inputs: the arguments of a call, a tensor or a tuple, of the sizes that training has.
        prefer: "speed" takes the faster form; "memory" folds wherever it can, and measures nothing of that.
        compiled: the model will run under `torch.compile`: time there, too, each batch norm that is not folded, as the
            one operator that the compiler calls and decomposed into PyTorch's, which it fuses, and take the faster.
            Drops what was compiled before.
        plan: the file; None keeps one for each machine, number of threads, version of torch and build of the kernels in
            the user's cache.

    Returns:
        The model, and a report of every BN layer as of `fuse`; those that had a choice with both times.

    Raises:
        ValueError: for another ``prefer``, or a file that holds no plan.
    """
    if prefer not in ("speed", "memory"):
        raise ValueError(f"tune prefers 'speed' or 'memory', got {prefer!r}")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    _, report = fuse(model, inputs, convolution=True)
    calls = _calls(model, inputs)
    if not calls:
        return model, report
    path = _default_path(calls[0].device) if plan is None else Path(plan)
    times: dict[SampledBatchNorm, list[str]] = {}
    if prefer == "speed":
        _choose_folded([call for call in calls if call.folded is not None], path, times)
    if compiled:
        apart = (call for call in _calls(model, inputs) if call.folded is None)
        _choose_decomposed([call for call in apart if not isinstance(call.layer, MethodNorm)], path, times)
    layers = dict(model.named_modules())
    changes = [_with_times(change, layers.get(change.module), times) for change in report.changes]
    return model, TransformReport(tuple(changes), report.refusals)


def _calls(model: nn.Module, inputs: tuple[Any, ...]) -> list[Call]:
    with recorded() as calls:
        training_outputs(model, inputs, exact=False, gradients=True)
    return calls


def _choose_folded(calls: list[Call], path: Path, times: dict[SampledBatchNorm, list[str]]) -> None:
    """Fold a layer's convolution if that is faster over all its calls."""
    for layer, timed in _timed(calls, "calls", TunedCall, measure, path).items():
        apart, folded = sum(call.apart_seconds for call in timed), sum(call.folded_seconds for call in timed)
        layer.folds_convolution = folded < apart
        times.setdefault(layer, []).append(f"{1e3 * folded:.3g} ms folded, {1e3 * apart:.3g} ms apart")


def _choose_decomposed(calls: list[Call], path: Path, times: dict[SampledBatchNorm, list[str]]) -> None:
    """Decompose a layer under `torch.compile` if that is faster over all its calls."""
    for layer, timed in _timed(calls, "compiled", CompiledCall, measure_compiled, path).items():
        operator = sum(call.operator_seconds for call in timed)
        decomposed = sum(call.decomposed_seconds for call in timed)
        layer.decomposes = decomposed < operator
        said = f"compiled {1e3 * operator:.3g} ms as one operator, {1e3 * decomposed:.3g} ms decomposed"
        times.setdefault(layer, []).append(said)


def _timed(
    calls: list[Call], kind: str, record: type[T], measure: Callable[[Call], tuple[float, float]], path: Path
) -> dict[SampledBatchNorm, list[T]]:
    """Give what each layer's calls take, from the file or measured and then kept there."""
    plan = records.read(TuningPlan, path) if path.exists() else TuningPlan()
    known = {timed.call: timed for timed in getattr(plan, kind)}
    found: dict[SampledBatchNorm, list[T]] = {}
    new = False
    for call in calls:
        spelled = _spell(call)
        if spelled not in known:
            known[spelled] = record(spelled, *measure(call))
            new = True
        found.setdefault(call.layer, []).append(known[spelled])
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        ordered = tuple(known[name] for name in sorted(known))
        records.write(path, dataclasses.replace(plan, **{kind: ordered}))
    return found


def _with_times(change: Change, layer: nn.Module | None, times: dict[SampledBatchNorm, list[str]]) -> Change:
    if not isinstance(layer, SampledBatchNorm) or layer not in times:
        return change
    action = change.action if layer.folds_convolution else change.action.removeprefix("convolution + ")
    return Change(change.module, f"{action} ({'; '.join(times[layer])})")


def measure(call: Call) -> tuple[float, float]:
    """Time a call apart and folded, forward and backward, against each other; seconds, the medians of the rounds."""
    assert call.folded is not None
    module, layer = copy.deepcopy(call.folded.module), _copied(call)
    x, residual = _like(call.input, call.device), _like(call.residual, call.device)
    folded, activation = call.folded._replace(module=module), None if layer.activation else call.activation
    return _against_each_other(
        lambda: layer(module(x), residual, activation),
        lambda: layer(x, residual, activation, folded),
        call.device,
    )


def measure_compiled(call: Call) -> tuple[float, float]:
    """Time a call under `torch.compile`, forward and backward, as one operator and decomposed; as `measure`."""
    operator, decomposed = _copied(call), _copied(call)
    operator.decomposes, decomposed.decomposes = False, True
    x, residual = _like(call.input, call.device), _like(call.residual, call.device)
    activation = None if operator.activation else call.activation
    torch.compiler.reset()  # else later calls meet the limit of recompilations and run eagerly
    one, other = (
        partial(torch.compile(layer, fullgraph=True, dynamic=False), x, residual, activation)
        for layer in (operator, decomposed)
    )
    times = _against_each_other(one, other, call.device)
    torch.compiler.reset()
    return times


def _copied(call: Call) -> SampledBatchNorm:
    layer = copy.deepcopy(call.layer)
    if layer.virtual_mark is not None:
        layer.virtual_mark = VirtualMark(call.input.shape[0])
    return layer


def _against_each_other(
    one: Callable[[], Tensor], other: Callable[[], Tensor], device: torch.device
) -> tuple[float, float]:
    steps = [_training_step(form) for form in (one, other)]
    for step in steps:
        step()
    repeats = [max(1, round(SHORTEST_SAMPLE / _seconds(step, 1, device))) for step in steps]
    samples = [
        [_seconds(step, times, device) / times for step, times in zip(steps, repeats, strict=True)]
        for _ in range(ROUNDS)
    ]
    first, second = (statistics.median(sample) for sample in zip(*samples, strict=True))
    return first, second


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


def _spell(call: Call) -> str:
    """Say all that the time of a call depends on, besides the machine."""
    x = call.input
    what, dtype = ("batch norm", x.dtype) if call.folded is None else (str(call.folded.module), call.folded.dtype)
    order = "".join(str(d) for d in sorted(range(x.ndim), key=lambda d: (-x.stride(d), d)))
    parts = [
        re.sub(r"\s+", " ", what),
        f"of {'x'.join(map(str, x.shape))} in order {order}, {dtype} on {call.device.type}",
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
    return folder / f"tune-{slug}-{_fingerprint()}.json"


@functools.cache
def _fingerprint() -> str:
    """Tell one build of the back ends from another: what was measured of one says nothing about the other."""
    files = sorted(Path(backends.__file__).parent.rglob("*.py"))
    if extension.kernels is not None:
        files.append(Path(extension.kernels.__file__))
    digest = hashlib.blake2b(digest_size=4)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
