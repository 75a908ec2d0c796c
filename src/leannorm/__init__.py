"""Batch normalization that costs next to nothing: a few samples while training, no normalization layer when shipped."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leannorm.activation import Activation
    from leannorm.conversion import convert, freeze, fuse, recalibrate, revert, tune, unfreeze
    from leannorm.deploy.verify import verify
    from leannorm.graph import fold
    from leannorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
    from leannorm.sampling import BatchSampling, FeatureSampling, GridSampling, NaiveSampling
    from leannorm.spelling import parse_statistics
    from leannorm.statistics import FullBatch, VirtualDataset, WeightedSum

_HOMES = {
    "Activation": "leannorm.activation",
    "BatchNorm1d": "leannorm.nn",
    "BatchNorm2d": "leannorm.nn",
    "BatchNorm3d": "leannorm.nn",
    "BatchSampling": "leannorm.sampling",
    "FeatureSampling": "leannorm.sampling",
    "FullBatch": "leannorm.statistics",
    "GridSampling": "leannorm.sampling",
    "NaiveSampling": "leannorm.sampling",
    "VirtualDataset": "leannorm.statistics",
    "WeightedSum": "leannorm.statistics",
    "convert": "leannorm.conversion",
    "fold": "leannorm.graph",
    "freeze": "leannorm.conversion",
    "fuse": "leannorm.conversion",
    "parse_statistics": "leannorm.spelling",
    "recalibrate": "leannorm.conversion",
    "revert": "leannorm.conversion",
    "tune": "leannorm.conversion",
    "unfreeze": "leannorm.conversion",
    "verify": "leannorm.deploy.verify",
}

__version__ = "0.1.0.dev0"
__all__ = [
    "Activation",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchSampling",
    "FeatureSampling",
    "FullBatch",
    "GridSampling",
    "NaiveSampling",
    "VirtualDataset",
    "WeightedSum",
    "convert",
    "fold",
    "freeze",
    "fuse",
    "parse_statistics",
    "recalibrate",
    "revert",
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
