"""The number formats of a layer: their limits, and values rounded to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

LADDER = ("int8", "fp16", "bf16", "fp32")
"""All formats, from the smallest numbers to the most exact."""


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format of 16 bits."""

    dtype: torch.dtype
    onnx: int

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return torch.finfo(self.dtype).max

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with all bits of its significand; below it some are lost."""
        return torch.finfo(self.dtype).smallest_normal


# The numbers are those of onnx.TensorProto.DataType.
FLOATS = {"fp16": FloatFormat(torch.float16, 10), "bf16": FloatFormat(torch.bfloat16, 16)}


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """Values in fp32 after a visit to a 16-bit format; what is too large becomes infinite."""
    return torch.tensor(values).to(FLOATS[kind].dtype).float().numpy()


def stored(values: np.ndarray, kind: str) -> bytes:
    """The bytes of values in a 16-bit format, as ONNX files hold them."""
    return torch.tensor(values).to(FLOATS[kind].dtype).view(torch.int16).numpy().tobytes()


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of unsigned 8-bit integers over a range, which is widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))


def rounded_activations(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values in fp32 after a visit to unsigned 8-bit integers with one scale (`activation_scale`)."""
    scale, zero = activation_scale(low, high)
    return ((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def rounded_weights(values: np.ndarray, axis: int) -> np.ndarray:
    """Weights in fp32 after a visit to signed 8-bit integers with a scale for each index along ``axis``."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.abs(values).max(axis=others, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return (np.clip(np.rint(values / scale), -127, 127) * scale).astype(np.float32)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """``||got - expected|| / ||expected||`` in float64; NaN where a value is not finite, 0 / 0 is no error."""
    expected = expected.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        error = float(np.linalg.norm(got.astype(np.float64) - expected))
    if not math.isfinite(error):
        return math.nan
    norm = float(np.linalg.norm(expected))
    return error / norm if norm else (math.inf if error else 0.0)
