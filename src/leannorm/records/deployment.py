"""What was shipped, and how it compares with the model that was trained."""

from __future__ import annotations

from dataclasses import dataclass

from leannorm.records.precision import PrecisionPlan
from leannorm.records.training import TrainingRun
from leannorm.records.transforms import PruningReport, TransformReport


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
    pruning: PruningReport | None = None
    precision: PrecisionPlan | None = None
