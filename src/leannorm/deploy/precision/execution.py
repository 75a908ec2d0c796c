"""execute_plan: write the file of a precision plan, run it, and give layers more bits until it passes."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx

from leannorm.deploy.export import save
from leannorm.deploy.precision import measure
from leannorm.deploy.precision.formats import LADDER
from leannorm.deploy.precision.layers import layers_of, spread
from leannorm.deploy.precision.mixed import with_casts, write_mixed
from leannorm.deploy.precision.support import opset_of, support
from leannorm.deploy.runtime import Session
from leannorm.deploy.verify import Model, verify
from leannorm.records import LayerPrecision, PrecisionCandidate, PrecisionPlan, PrecisionStep, Verification

MAX_ACCURACY_DROP = 0.005
HOPELESS = 2  # predicted errors beyond this times what is allowed are believed


def execute_plan(
    plan: PrecisionPlan,
    source: str | Path,
    path: str | Path,
    batches: Iterable[Any],
    validation: Iterable[Any],
    *,
    reference: Model | None = None,
) -> PrecisionPlan:
    r"""Write the mixed-precision file of a plan, after as many changes to the plan as it takes to pass.

    The file passes where its relative error is at most ``plan.max_error`` and, on labelled batches, it loses less than
    0.5 points of accuracy. While it does not, the layer that brings the largest measured error to the model's outputs
    goes to the next format that is allowed to it and brings a smaller one. Were the layers' errors independent, the
    file's would be :math:`\sqrt{\sum_i e_i^2}`; where that is more than twice what is allowed the file is not run.

    Where the runtime emulates a format, it skips the rounding of what such layers read and give; a copy of the file
    that rounds explicitly has to pass too.

    Args:
        plan: from `plan_precision`.
        source: the fp32 file that it was made for.
        path: the new file. It is written where everything had to go back to fp32 too.
        batches: calibration inputs, which are read once for each file that is tried: no iterator that is used up.
        validation: inputs, or ``(inputs, labels)``, read as often.
        reference: what the file is compared with; None means the fp32 file.

    Returns:
        The plan as the file has it, with the trail, and ``passed``.

    Raises:
        ValueError: if the plan is of another file, or batches can be read only once.
    """
    for name, given in (("batches", batches), ("validation", validation)):
        if iter(given) is given:
            raise ValueError(
                f"{name} are read several times: give a list or a data loader, got a {type(given).__name__}"
            )
    path, file = Path(path), onnx.load(source)
    layers = layers_of(file)
    if [layer.node for layer in layers] != [layer.node for layer in plan.layers]:
        raise ValueError(f"the plan is of another file than {source}: its layers differ")
    found, _ = measure.ranges(file, layers, batches, {})
    largest = {name: value.largest for name, value in found.items()}
    reference = Session(source) if reference is None else reference
    while True:
        error = predicted_error(plan)
        if error > HOPELESS * plan.max_error:
            failure, measured = f"the layers' errors add up to {error:.3g}, {plan.max_error:g} is allowed", False
        else:
            types = spread(file, {layer.node: layer.type for layer in plan.layers}, largest)
            run, simulated = _tried(source, path, types, batches, validation, reference, plan)
            failure, measured, error = _failure(run, plan), True, run.relative_error
            if failure is None and simulated is not None and (reason := _failure(simulated, plan)):
                failure, error = f"rounded as the formats say, {reason}", simulated.relative_error
            plan = dataclasses.replace(
                plan,
                relative_error=run.relative_error,
                rounded_error=None if simulated is None else simulated.relative_error,
                passed=failure is None,
            )
            if failure is None:
                return plan
        raised = _with_more_bits(plan, error, measured, failure, opset_of(file), {e.node: e.rank for e in layers})
        if raised is None:
            return plan
        plan = raised


def predicted_error(plan: PrecisionPlan) -> float:
    """The relative error of the outputs that the layers' errors would sum up to if they were independent."""
    return math.sqrt(sum((chosen(layer).model_error or 0.0) ** 2 for layer in plan.layers))


def chosen(layer: LayerPrecision) -> PrecisionCandidate:
    """The measurements of the format that a layer has."""
    return next(candidate for candidate in layer.candidates if candidate.type == layer.type)


def _tried(
    source: str | Path,
    path: Path,
    types: Mapping[str, str],
    batches: Iterable[Any],
    validation: Iterable[Any],
    reference: Model,
    plan: PrecisionPlan,
) -> tuple[Verification, Verification | None]:
    """Write the file; compare it, and the one that rounds explicitly where the runtime does not."""
    write_mixed(source, path, types, batches)
    run = verify(reference, Session(path), validation, max_error=plan.max_error)
    emulated = {layer.type for layer in plan.layers if layer.computed == "emulated"}
    if not emulated & {"fp16", "bf16"}:
        return run, None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        base, twin = Path(folder) / "base.onnx", Path(folder) / "rounded.onnx"
        write_mixed(source, base, {name: "int8" if kind == "int8" else "fp32" for name, kind in types.items()}, batches)
        save(with_casts(onnx.load(base), types, explicit=True), twin)
        return run, verify(reference, Session(twin), validation, max_error=plan.max_error)


def _failure(verification: Verification, plan: PrecisionPlan) -> str | None:
    if not verification.passed:
        return f"the relative error is {verification.relative_error:.4g}, {plan.max_error:g} is allowed"
    before, after = verification.reference_accuracy, verification.candidate_accuracy
    if before is not None and after is not None and before - after >= MAX_ACCURACY_DROP:
        lost, allowed = 100 * (before - after), 100 * MAX_ACCURACY_DROP
        return f"it loses {lost:.2f} points of accuracy, less than {allowed:g} is allowed"
    return None


def _with_more_bits(
    plan: PrecisionPlan, error: float, measured: bool, failure: str, opset: int, ranks: Mapping[str, int]
) -> PrecisionPlan | None:
    """The plan with the layer of the largest error in its next better format; None where all are in fp32."""
    low = [layer for layer in plan.layers if layer.type != "fp32"]
    if not low:
        return None
    worst = max(low, key=lambda layer: chosen(layer).model_error or 0.0)
    better = _next(worst)
    raised = dataclasses.replace(
        worst,
        type=better.type,
        computed=support(worst.operator, better.type, rank=ranks[worst.node], opset=opset).computed,
        reason=f"raised from {worst.type}: {failure}, and this layer brought the largest error of its own",
    )
    step = PrecisionStep(worst.layer, worst.type, better.type, error, measured, failure)
    layers = tuple(raised if layer is worst else layer for layer in plan.layers)
    return dataclasses.replace(plan, layers=layers, trail=(*plan.trail, step), passed=None)


def _next(layer: LayerPrecision) -> PrecisionCandidate:
    """The next larger format that is allowed and brings a smaller error; fp32 brings none."""
    now = chosen(layer)
    larger = LADDER[LADDER.index(now.type) + 1 :]
    return next(
        candidate
        for candidate in layer.candidates
        if candidate.type in larger
        and candidate.rejected is None
        and (candidate.type == "fp32" or (candidate.model_error or 0.0) < (now.model_error or 0.0))
    )
