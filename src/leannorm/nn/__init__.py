"""Layers: state, mode and buffers; the arithmetic is in the operators."""

from leannorm.nn.accumulated import AccumulatedBatchNorm
from leannorm.nn.adaptive import AdaptiveBatchNorm
from leannorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from leannorm.nn.diminishing import DiminishingBatchNorm
from leannorm.nn.eight_bit import EightBitBatchNorm
from leannorm.nn.enhanced import EnhancedBatchNorm
from leannorm.nn.ghost import GhostBatchNorm
from leannorm.nn.l1 import L1BatchNorm
from leannorm.nn.masked import MaskedBatchNorm
from leannorm.nn.method import MethodNorm
from leannorm.nn.mixture import MixtureBatchNorm
from leannorm.nn.moving_average import MovingAverageBatchNorm
from leannorm.nn.none import NoNorm
from leannorm.nn.range import RangeBatchNorm
from leannorm.nn.renorm import BatchRenorm

# The layers of the methods that have one of their own; the others are torch's (`leannorm.nn.group`).
METHOD_LAYERS: dict[type, type[MethodNorm]] = {
    layer.takes: layer
    for layer in (
        AccumulatedBatchNorm,
        AdaptiveBatchNorm,
        BatchRenorm,
        DiminishingBatchNorm,
        EightBitBatchNorm,
        EnhancedBatchNorm,
        GhostBatchNorm,
        L1BatchNorm,
        MaskedBatchNorm,
        MixtureBatchNorm,
        MovingAverageBatchNorm,
        NoNorm,
        RangeBatchNorm,
    )
}

__all__ = [
    "METHOD_LAYERS",
    "AccumulatedBatchNorm",
    "AdaptiveBatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "DiminishingBatchNorm",
    "EightBitBatchNorm",
    "EnhancedBatchNorm",
    "GhostBatchNorm",
    "L1BatchNorm",
    "MaskedBatchNorm",
    "MixtureBatchNorm",
    "MovingAverageBatchNorm",
    "NoNorm",
    "RangeBatchNorm",
]
