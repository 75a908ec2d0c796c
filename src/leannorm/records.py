"""Frozen results that leannorm's commands produce: plain data, JSON in and out, no logic.

Every record is a frozen dataclass whose fields are strings, numbers, booleans, None, records, or tuples of these, so
that ``from_json(cls, to_json(record)) == record`` holds for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from leannorm.precision import PrecisionPlan

T = TypeVar("T")


@dataclass(frozen=True)
class Change:
    """One thing that a transform did to the module with this qualified name."""

    module: str
    action: str


@dataclass(frozen=True)
class Refusal:
    """One thing that a transform left alone, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class TransformReport:
    """What a model transform did and what it refused."""

    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class TunedCall:
    """What a convolution with its batch norm takes, forward and backward: one after the other, and folded."""

    call: str
    apart_seconds: float
    folded_seconds: float


@dataclass(frozen=True)
class TuningPlan:
    """What `leannorm.tune` measured on one machine."""

    calls: tuple[TunedCall, ...] = ()


@dataclass(frozen=True)
class Epoch:
    """Metrics of one training epoch; losses in nats, accuracies in [0, 1]."""

    epoch: int
    training_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class TrainingRun:
    """What was trained, how, and how it went."""

    model: str
    data: str
    statistics: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    history: tuple[Epoch, ...]
    environment: Environment


@dataclass(frozen=True)
class Environment:
    """Where a result was made: machine, versions, and the commit of leannorm ("unknown" outside a repository)."""

    machine: str
    cores: int
    python: str
    versions: tuple[tuple[str, str], ...]
    commit: str


@dataclass(frozen=True)
class LayerPoint:
    """What a normalization layer gives in one training step, over all its channels.

    ``mean`` and ``variance`` are those of its output: the mean over channels of |mean|, and of the variance. ``shift``
    is how far the channels' means have moved since the step before, ||mean_t - mean_(t-1)|| / ||sigma_t||, None in the
    first step. ``gradient_norm`` is the 2-norm of the loss's gradient at that output.
    """

    step: int
    mean: float
    variance: float
    shift: float | None
    gradient_norm: float


@dataclass(frozen=True)
class LayerTrace:
    """A layer's points, by its qualified name."""

    layer: str
    points: tuple[LayerPoint, ...]


@dataclass(frozen=True)
class SmoothnessPoint:
    """The loss of one batch along its own gradient, w - a g.

    ``lowest`` and ``highest`` are the extremes over the lengths a; ``gradient_change`` is ||g(w - a g) - g|| / ||g|| at
    the training's own step length.
    """

    step: int
    loss: float
    lowest: float
    highest: float
    gradient_change: float


@dataclass(frozen=True)
class TrainingTrace:
    """What the layers and the loss did while training."""

    statistics: str
    layers: tuple[LayerTrace, ...]
    smoothness: tuple[SmoothnessPoint, ...]


@dataclass(frozen=True)
class LayerError:
    """How far a candidate is from its reference at one layer, by the errors of `Verification`."""

    layer: str
    relative_error: float
    maximum_error: float


@dataclass(frozen=True)
class Verification:
    """How far a candidate is from its reference on the same batches.

    ``relative_error`` is ``||candidate - reference|| / ||reference||`` over all outputs (2-norms), ``maximum_error``
    the largest absolute difference; agreement and accuracies are shares in [0, 1], None where labels or classes are
    missing; ``passed`` is ``relative_error <= max_error``. ``layers`` compares the first batch at each layer that both
    have, in the order in which the reference runs them; ``first_wrong_layer`` is the first above ``max_error``.
    """

    samples: int
    relative_error: float
    maximum_error: float
    argmax_agreement: float | None
    reference_accuracy: float | None
    candidate_accuracy: float | None
    max_error: float
    passed: bool
    layers: tuple[LayerError, ...] = ()
    first_wrong_layer: str | None = None


@dataclass(frozen=True)
class Recalibration:
    """The trained moving averages against statistics recomputed over training batches, by validation accuracy."""

    kept: str
    trained_accuracy: float
    recalibrated_accuracy: float
    batches: int


@dataclass(frozen=True)
class ShippedFile:
    """One deployed file.

    ``normalization_nodes`` names what is left of normalization in its graph, ``failures`` says in sentences why the
    file does not pass (empty: nothing, it passes), ``emulated`` names the types that the runtime computes in fp32:
    the latency is not theirs.
    """

    file: str
    precision: str
    bytes: int
    latency_ms: float
    normalization_nodes: tuple[str, ...]
    verification: Verification
    failures: tuple[str, ...]
    emulated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deployment:
    """Everything `leannorm deploy` did to one checkpoint."""

    checkpoint: str
    training: TrainingRun
    recalibration: Recalibration
    fold: TransformReport
    reference_latency_ms: float
    files: tuple[ShippedFile, ...]
    passed: bool
    precision: PrecisionPlan | None = None


def to_json(record: Any) -> str:
    """Spell a record as JSON text."""
    return json.dumps(dataclasses.asdict(record), indent=2, allow_nan=True) + "\n"


def from_json(cls: type[T], text: str) -> T:
    """Read a record of type ``cls`` from JSON text.

    Raises:
        ValueError: if a field without a default is missing, or one is unknown or of another type than the record says.
    """
    return _decode(cls, json.loads(text), cls.__name__)


def write(path: str | Path, record: Any) -> None:
    """Write a record's JSON to a file, through a temporary name, so that a reader never sees half a file."""
    write_text(path, to_json(record))


def write_text(path: str | Path, text: str) -> None:
    """Write text to a file through a temporary name in the same folder."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(cls: type[T], path: str | Path) -> T:
    """Read a record of type ``cls`` from a JSON file."""
    return from_json(cls, Path(path).read_text(encoding="utf-8"))


def _decode(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        required = {field.name for field in dataclasses.fields(hint) if field.default is dataclasses.MISSING}
        if not isinstance(value, dict) or not required <= value.keys() <= hints.keys():
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {got}")
        return hint(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in value})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise ValueError(f"{where}: expected {len(arguments)} items, got {len(value)}")
        return tuple(
            _decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (kind for kind in arguments if kind is not type(None))
        return _decode(hint, value, where)
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value
