"""Frozen results that leannorm's commands produce: plain data, JSON in and out, no logic.

Every record is a frozen dataclass whose fields are strings, numbers, booleans, None, records, or tuples of these, so
that ``from_json(cls, to_json(record)) == record`` holds for all of them.
"""

from leannorm.records.deployment import (
    Deployment,
    LayerError,
    Recalibration,
    ShippedFile,
    Verification,
)
from leannorm.records.files import (
    from_json,
    read,
    to_json,
    write,
    write_text,
)
from leannorm.records.precision import (
    LayerPrecision,
    PrecisionCandidate,
    PrecisionPlan,
    PrecisionStep,
    RuntimeSupport,
)
from leannorm.records.training import (
    Environment,
    Epoch,
    LayerPoint,
    LayerTrace,
    SmoothnessPoint,
    TrainingRun,
    TrainingTrace,
)
from leannorm.records.transforms import (
    Change,
    CompiledCall,
    Explanation,
    LayerExplanation,
    LayerSparsity,
    PrunedLayer,
    PruningReport,
    Refusal,
    Sparsity,
    TransformReport,
    TunedCall,
    TuningPlan,
)

__all__ = [
    "Change",
    "CompiledCall",
    "Deployment",
    "Environment",
    "Epoch",
    "Explanation",
    "LayerError",
    "LayerExplanation",
    "LayerPoint",
    "LayerPrecision",
    "LayerSparsity",
    "LayerTrace",
    "PrecisionCandidate",
    "PrecisionPlan",
    "PrecisionStep",
    "PrunedLayer",
    "PruningReport",
    "Recalibration",
    "Refusal",
    "RuntimeSupport",
    "ShippedFile",
    "SmoothnessPoint",
    "Sparsity",
    "TrainingRun",
    "TrainingTrace",
    "TransformReport",
    "TunedCall",
    "TuningPlan",
    "Verification",
    "from_json",
    "read",
    "to_json",
    "write",
    "write_text",
]
