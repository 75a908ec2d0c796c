"""Frozen results of a precision plan: a number format for each layer, and why. Data of `leannorm.records`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RuntimeSupport:
    """What the runtime does with a layer of this operator and type: "native", "emulated" in fp32, or "unsupported"."""

    operator: str
    type: str
    computed: str
    detail: str


@dataclass(frozen=True)
class PrecisionCandidate:
    """A number format at a layer: the relative errors that it brings, and why it is rejected (None: it is not).

    ``weight_error`` and ``output_error`` are those of storing weights and outputs; ``layer_error`` is the error at the
    layer and ``model_error`` that of the model's outputs where this layer alone is rounded, None where not measured.
    """

    type: str
    weight_error: float
    output_error: float
    layer_error: float | None
    model_error: float | None
    rejected: str | None


@dataclass(frozen=True)
class LayerPrecision:
    """The number format of one layer, and what it was chosen by.

    ``predicted`` is the least ``beta - k |gamma|`` and largest ``beta + k |gamma|`` of its channels, ``outside``
    the share of outputs beyond their channel's own, both None where no batch normalization is known. ``underflow``
    and ``weight_underflow`` are the shares of non-zero values below fp16's smallest normal number, ``overflow`` that of
    outputs above its largest.
    """

    layer: str
    node: str
    operator: str
    predicted: tuple[float, float] | None
    measured: tuple[float, float]
    outside: float | None
    underflow: float
    overflow: float
    weight_underflow: float
    type: str
    computed: str
    reason: str
    candidates: tuple[PrecisionCandidate, ...]


@dataclass(frozen=True)
class PrecisionStep:
    """A layer that got more bits, since the relative error was ``error``: measured, or predicted from the layers'."""

    layer: str
    before: str
    after: str
    error: float
    measured: bool
    failure: str


@dataclass(frozen=True)
class PrecisionPlan:
    """A number format a layer.

    ``outside`` is the probability that a normal variable lies beyond ``k`` standard deviations; ``trail`` is the way
    from the cheapest formats allowed to ``layers``; ``relative_error`` is that of the file written by the plan and
    ``rounded_error`` that where every value of an emulated type is rounded as a runtime that has it would, None where
    not run or where nothing is emulated.
    """

    runtime: str
    k: float
    outside: float
    max_error: float
    types: tuple[str, ...]
    support: tuple[RuntimeSupport, ...]
    layers: tuple[LayerPrecision, ...]
    trail: tuple[PrecisionStep, ...] = ()
    relative_error: float | None = None
    rounded_error: float | None = None
    passed: bool | None = None
