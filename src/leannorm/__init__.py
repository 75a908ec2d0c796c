"""Batch normalization that costs next to nothing: a few samples while training, no normalization layer when shipped."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leannorm.activation import Activation
    from leannorm.backends import empty_cache
    from leannorm.conversion import convert, explain, freeze, fuse, recalibrate, revert, tune, unfreeze
    from leannorm.deploy.precision import execute_plan, plan_precision
    from leannorm.deploy.verify import verify
    from leannorm.graph import fold, prune, sparsity
    from leannorm.methods import (
        AccumulatedBatch,
        AdaptiveMomentum,
        BatchRenormalization,
        DiminishingAverage,
        EightBitNormalization,
        EnhancedTransform,
        GhostBatch,
        GroupNormalization,
        InstanceNormalization,
        L1Deviation,
        LayerNormalization,
        MaskedSequences,
        MixtureNormalization,
        MovingAverageNormalization,
        NoNormalization,
        RangeDeviation,
    )
    from leannorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
    from leannorm.sampling import BatchSampling, FeatureSampling, GridSampling, NaiveSampling
    from leannorm.spelling import parse_statistics, parse_target
    from leannorm.statistics import FullBatch, VirtualDataset, WeightedSum

_HOMES = {
    "AccumulatedBatch": "leannorm.methods",
    "Activation": "leannorm.activation",
    "AdaptiveMomentum": "leannorm.methods",
    "BatchNorm1d": "leannorm.nn",
    "BatchNorm2d": "leannorm.nn",
    "BatchNorm3d": "leannorm.nn",
    "BatchRenormalization": "leannorm.methods",
    "BatchSampling": "leannorm.sampling",
    "DiminishingAverage": "leannorm.methods",
    "EightBitNormalization": "leannorm.methods",
    "EnhancedTransform": "leannorm.methods",
    "FeatureSampling": "leannorm.sampling",
    "FullBatch": "leannorm.statistics",
    "GhostBatch": "leannorm.methods",
    "GridSampling": "leannorm.sampling",
    "GroupNormalization": "leannorm.methods",
    "InstanceNormalization": "leannorm.methods",
    "L1Deviation": "leannorm.methods",
    "LayerNormalization": "leannorm.methods",
    "MaskedSequences": "leannorm.methods",
    "MixtureNormalization": "leannorm.methods",
    "MovingAverageNormalization": "leannorm.methods",
    "NaiveSampling": "leannorm.sampling",
    "NoNormalization": "leannorm.methods",
    "RangeDeviation": "leannorm.methods",
    "VirtualDataset": "leannorm.statistics",
    "WeightedSum": "leannorm.statistics",
    "convert": "leannorm.conversion",
    "empty_cache": "leannorm.backends",
    "execute_plan": "leannorm.deploy.precision",
    "explain": "leannorm.conversion",
    "fold": "leannorm.graph",
    "freeze": "leannorm.conversion",
    "fuse": "leannorm.conversion",
    "parse_statistics": "leannorm.spelling",
    "parse_target": "leannorm.spelling",
    "plan_precision": "leannorm.deploy.precision",
    "prune": "leannorm.graph",
    "recalibrate": "leannorm.conversion",
    "revert": "leannorm.conversion",
    "sparsity": "leannorm.graph",
    "tune": "leannorm.conversion",
    "unfreeze": "leannorm.conversion",
    "verify": "leannorm.deploy.verify",
}

__version__ = "0.1.0.dev0"
__all__ = [
    "AccumulatedBatch",
    "Activation",
    "AdaptiveMomentum",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenormalization",
    "BatchSampling",
    "DiminishingAverage",
    "EightBitNormalization",
    "EnhancedTransform",
    "FeatureSampling",
    "FullBatch",
    "GhostBatch",
    "GridSampling",
    "GroupNormalization",
    "InstanceNormalization",
    "L1Deviation",
    "LayerNormalization",
    "MaskedSequences",
    "MixtureNormalization",
    "MovingAverageNormalization",
    "NaiveSampling",
    "NoNormalization",
    "RangeDeviation",
    "VirtualDataset",
    "WeightedSum",
    "convert",
    "empty_cache",
    "execute_plan",
    "explain",
    "fold",
    "freeze",
    "fuse",
    "parse_statistics",
    "parse_target",
    "plan_precision",
    "prune",
    "recalibrate",
    "revert",
    "sparsity",
    "tune",
    "unfreeze",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import leannorm` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'leannorm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
