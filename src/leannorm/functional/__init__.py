"""The functional form of the layers: validates, then calls `torch.ops.leannorm.*`."""

from __future__ import annotations

from leannorm.functional.checks import one_element
from leannorm.functional.given import normalize, normalize_by, scale_shift, transform
from leannorm.functional.preactivated import BatchNorm, preactivated_conv_batch_norm, takes_preactivated
from leannorm.functional.sampled import (
    batch_norm,
    concatenated_batch_norm,
    conv_batch_norm,
    conv_batch_norm_pays,
    moments,
    snapshot,
    takes_concatenation,
)

__all__ = [
    "BatchNorm",
    "batch_norm",
    "concatenated_batch_norm",
    "conv_batch_norm",
    "conv_batch_norm_pays",
    "moments",
    "normalize",
    "normalize_by",
    "one_element",
    "preactivated_conv_batch_norm",
    "scale_shift",
    "snapshot",
    "takes_concatenation",
    "takes_preactivated",
    "transform",
]
