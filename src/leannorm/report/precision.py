"""A precision plan in words: the tables of the page, and the sentence of the summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leannorm.report.wording import NOT_MEASURED, counted, error, share, significant

if TYPE_CHECKING:
    from leannorm.records import LayerPrecision, PrecisionPlan


@dataclass(frozen=True)
class Table:
    """Cells in words under their headings."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def formats(plan: PrecisionPlan) -> str:
    """Say how many layers have which number format, and which of these are emulated."""
    layers = Counter((layer.type, layer.computed) for layer in plan.layers)
    parts = [f"{kind} in {count:,}{_emulated(computed)}" for (kind, computed), count in sorted(layers.items())]
    return f"{', '.join(parts)} of {counted(len(plan.layers), 'layer', 'layers')}"


def emulation(kind: str) -> str:
    """Say that a latency is not that of a number format."""
    return f"{kind} is emulated, the time is not what {kind} takes where it is native"


def tables(plan: PrecisionPlan) -> tuple[Table, ...]:
    """Return the layers, what was rejected for them, the changes while running, and what the runtime computes."""
    layers = Table(
        "Number format of each layer",
        f"Outputs: predicted by batch normalization, \N{GREEK SMALL LETTER BETA} \N{PLUS-MINUS SIGN} {plan.k:g} "
        f"|\N{GREEK SMALL LETTER GAMMA}| (a normal value lies outside with probability {plan.outside:.1g}), and "
        "measured on calibration data.",
        (
            "Layer",
            "Operator",
            "Predicted",
            "Measured",
            "Outside",
            "Below fp16",
            "Above fp16",
            "Type",
            "Computed",
            "Reason",
        ),
        tuple(
            (
                layer.layer,
                layer.operator,
                _range(layer.predicted),
                _range(layer.measured),
                share(layer.outside),
                share(layer.underflow),
                share(layer.overflow),
                layer.type,
                layer.computed,
                layer.reason,
            )
            for layer in plan.layers
        ),
    )
    candidates = [
        (layer, candidate) for layer in plan.layers for candidate in layer.candidates if candidate.type != "fp32"
    ]
    considered = Table(
        "What else was considered",
        "Relative errors: of storing weights and outputs, and with the layer alone computed so, at the layer and at "
        "the model's outputs.",
        ("Layer", "Type", "Weights", "Outputs", "Layer", "Model", "Rejected"),
        tuple(
            (
                layer.layer,
                candidate.type,
                error(candidate.weight_error),
                error(candidate.output_error),
                _maybe(candidate.layer_error),
                _maybe(candidate.model_error),
                candidate.rejected or _verdict(candidate.type, layer),
            )
            for layer, candidate in candidates
        ),
    )
    trail = Table(
        f"{counted(len(plan.trail), 'layer', 'layers')} given more bits until the file passed",
        "In this order.",
        ("Layer", "From", "To", "Why"),
        tuple((s.layer, s.before, s.after, s.failure + ("" if s.measured else " (predicted)")) for s in plan.trail),
    )
    runtime = Table(
        "What the runtime computes",
        "Found by running a model of one such layer.",
        ("Operator", "Type", "Computed", "Found"),
        tuple((entry.operator, entry.type, entry.computed, entry.detail) for entry in plan.support),
    )
    return (layers, considered, *([trail] if plan.trail else []), runtime)


def _range(values: tuple[float, float] | None) -> str:
    return NOT_MEASURED if values is None else f"{significant(values[0])} to {significant(values[1])}"


def _verdict(kind: str, layer: LayerPrecision) -> str:
    """What became of a format that was not rejected; candidates stand in the order of their size."""
    if kind == layer.type:
        return "chosen"
    types = [candidate.type for candidate in layer.candidates]
    return "allowed alone, but not with the other layers" if layer.type in types[types.index(kind) :] else "allowed"


def _maybe(value: float | None) -> str:
    return NOT_MEASURED if value is None else error(value)


def _emulated(computed: str) -> str:
    return "" if computed == "native" else f" ({computed})"
