"""plan_precision: a number format a layer, from its range, from measured errors and from what the runtime computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from leannorm.deploy.precision import measure
from leannorm.deploy.precision.formats import (
    FLOATS,
    LADDER,
    relative_error,
    rounded,
    rounded_activations,
    rounded_weights,
)
from leannorm.deploy.precision.layers import Layer, batch_norms, constant, layers_of, predicted_range, require_plannable
from leannorm.deploy.precision.measure import Bounds, Range, Rounding
from leannorm.deploy.precision.support import RUNTIME, opset_of, support
from leannorm.records import LayerPrecision, PrecisionCandidate, PrecisionPlan, RuntimeSupport

MAX_LAYER_ERROR = 0.1
MAX_UNDERFLOW = 0.01


def plan_precision(
    source: str | Path,
    batches: Iterable[Any],
    *,
    model: nn.Module | None = None,
    types: Sequence[str] | None = None,
    k: float = 6.0,
    max_error: float = 0.01,
) -> PrecisionPlan:
    r"""Choose fp32, bf16, fp16 or INT8 for each convolution and matrix product of a folded fp32 ONNX file.

    A layer takes the smallest format that nothing speaks against, in the order int8, fp16, bf16, fp32:

    - overflow: inputs or outputs measured, or outputs predicted by the batch normalization that the layer has taken up,
      :math:`\beta \pm k |\gamma|`, are beyond the format's largest number;
    - underflow: more than 1% of the non-zero inputs or outputs are below fp16's smallest normal number (bf16 has the
      exponents of fp32);
    - the runtime has no kernel, or one that computes in fp32 (`support`);
    - measured error: with this layer alone rounded (weights, inputs and outputs), the model's outputs change by more
      than ``max_error``, or the layer's by more than 10%.

    What the layers do together is not known then: `execute_plan` writes the file, runs it and takes back what fails.

    Args:
        source: the file, as `leannorm.deploy.export.export_onnx` writes it; one input.
        batches: calibration inputs; of a tuple the first item is the input.
        model: that the file was made from, for gamma and beta of its batch normalizations; without it nothing is
            predicted.
        types: the formats that may be used. Formats named here are used where they are emulated too, for a device that
            has them; None means all that this runtime computes natively.
        k: standard deviations to each side that the predicted range spans.
        max_error: the largest relative error of the outputs.

    Returns:
        The plan; layers in the order of the graph.

    Raises:
        ValueError: if types, k or max_error are not what they should be, there are no batches or no layers in fp32,
            the file has several inputs or control flow, or it gives NaN or infinity.
    """
    listed = _checked_types(types)
    if not (k > 0 and math.isfinite(k)):
        raise ValueError(f"k must be a positive number of standard deviations, got {k}")
    if not (max_error >= 0 and math.isfinite(max_error)):
        raise ValueError(f"max_error must be a finite number >= 0, got {max_error}")
    file = onnx.load(source)
    require_plannable(file)
    layers = layers_of(file)
    if not layers:
        raise ValueError(f"{source} holds no convolution or matrix product with fp32 weights: plan from the fp32 file")
    norms = {} if model is None else batch_norms(model)
    bounds = {layer.output: predicted_range(*norms[name], k) for layer in layers if (name := _norm(layer, norms))}
    found, sample = measure.ranges(file, layers, batches, bounds)
    opset = opset_of(file)
    planner = _Planner(file, found, Rounding(file, found, sample), listed, types is None, max_error, k)
    planned, used = [], {}
    for layer in layers:
        runs = {kind: support(layer.operator, kind, rank=layer.rank, opset=opset) for kind in LADDER}
        used |= {(entry.operator, entry.type, entry.computed): entry for entry in runs.values()}
        planned.append(planner.plan(layer, bounds.get(layer.output), runs))
    return PrecisionPlan(
        runtime=RUNTIME,
        k=k,
        outside=math.erfc(k / math.sqrt(2)),
        max_error=max_error,
        types=listed,
        support=tuple(used.values()),
        layers=tuple(planned),
    )


@dataclass(frozen=True)
class _Planner:
    """What the choice for a layer rests on."""

    file: onnx.ModelProto
    found: dict[str, Range]
    rounding: Rounding
    listed: tuple[str, ...]
    native_only: bool
    max_error: float
    k: float

    def plan(self, layer: Layer, bounds: Bounds | None, runs: dict[str, RuntimeSupport]) -> LayerPrecision:
        measured, weight = self.found[layer.output], constant(self.file, layer.weight)
        predicted = None if bounds is None else (float(bounds[0].min()), float(bounds[1].max()))
        exact = self.rounding.exact(layer)
        output = exact[0]
        candidates = []
        for kind in self.listed:
            if kind == "fp32":
                candidates.append(PrecisionCandidate("fp32", 0.0, 0.0, 0.0, 0.0, None))
                continue
            if kind in FLOATS:
                stored = rounded(weight, kind), rounded(output, kind)
            else:
                stored = (
                    rounded_weights(weight, layer.weight_axis),
                    rounded_activations(output, measured.low, measured.high),
                )
            errors: tuple[float | None, float | None] = (None, None)
            rejected = self._out_of_range(layer, kind, predicted) or self._not_computed(kind, runs[kind])
            if rejected is None:
                errors = self.rounding.errors(layer, kind, exact)
                rejected = self._too_wrong(*errors)
            weight_error, output_error = relative_error(stored[0], weight), relative_error(stored[1], output)
            candidates.append(PrecisionCandidate(kind, weight_error, output_error, *errors, rejected))
        chosen = next(candidate for candidate in candidates if candidate.rejected is None)
        return LayerPrecision(
            layer=layer.name,
            node=layer.node,
            operator=layer.operator,
            predicted=predicted,
            measured=(measured.low, measured.high),
            outside=None if bounds is None else measure.share(measured.outside, measured.elements),
            underflow=measure.share(measured.below, measured.nonzero),
            overflow=measure.share(measured.above, measured.elements),
            weight_underflow=measure.underflow(weight),
            type=chosen.type,
            computed=runs[chosen.type].computed,
            reason=self._reason(chosen),
            candidates=tuple(candidates),
        )

    def _out_of_range(self, layer: Layer, kind: str, predicted: tuple[float, float] | None) -> str | None:
        if kind not in FLOATS:
            return None  # INT8 has the range that calibration saw
        number = FLOATS[kind]
        both = {"inputs": self.found[layer.input], "outputs": self.found[layer.output]}
        for name, measured in both.items():
            if measured.largest > number.largest:
                return f"overflow: its {name} reach {measured.largest:.3g}, {kind} ends at {number.largest:.5g}"
        reach = 0.0 if predicted is None else max(map(abs, predicted))
        if reach > number.largest:
            return (
                f"overflow: its batch normalization gives values up to {reach:.3g} at {self.k:g} standard deviations, "
                f"{kind} ends at {number.largest:.5g}"
            )
        for name, measured in both.items():
            below = measure.share(measured.below, measured.nonzero)
            if kind == "fp16" and below > MAX_UNDERFLOW:
                return (
                    f"underflow: {below:.2%} of its non-zero {name} become zero or subnormal in fp16 "
                    f"(below {number.smallest_normal:.2g}), {MAX_UNDERFLOW:.0%} is allowed"
                )
        return None

    def _not_computed(self, kind: str, runs: RuntimeSupport) -> str | None:
        if runs.computed == "unsupported":
            return f"not supported: onnxruntime has no {runs.operator} in {kind} on the CPU"
        if runs.computed == "emulated" and self.native_only:
            return f"emulated: onnxruntime computes {runs.operator} in fp32 for {kind} on the CPU, which gains no time"
        return None

    def _too_wrong(self, at_layer: float, at_outputs: float) -> str | None:
        if not at_outputs <= self.max_error:
            return (
                f"measured error: alone it changes the model's outputs by {at_outputs:.3g}, {self.max_error:g} is "
                f"allowed (the layer's own by {at_layer:.2g})"
            )
        if not at_layer <= MAX_LAYER_ERROR:
            return f"measured error: it changes the layer's outputs by {at_layer:.2g}, {MAX_LAYER_ERROR:g} is allowed"
        return None

    def _reason(self, chosen: PrecisionCandidate) -> str:
        if chosen.type == "fp32":
            return "every smaller format is rejected" if len(self.listed) > 1 else "no other format was asked for"
        return f"the smallest format allowed: alone it changes the model's outputs by {chosen.model_error:.2g}"


def _checked_types(types: Sequence[str] | None) -> tuple[str, ...]:
    """The formats to consider, from the smallest; fp32 is always one of them."""
    if types is None:
        return LADDER
    if isinstance(types, str) or not types or set(types) - set(LADDER):
        raise ValueError(f"types must be some of {', '.join(LADDER)} in a list or tuple, got {types!r}")
    return tuple(kind for kind in LADDER if kind in types or kind == "fp32")


def _norm(layer: Layer, norms: dict[str, Any]) -> str | None:
    """The batch normalization whose values a layer's outputs are; a matrix product's get their bias later."""
    name = layer.name.partition("@")[0]
    return name if name in norms and layer.operator != "MatMul" and len(norms[name][0]) == layer.out_channels else None
