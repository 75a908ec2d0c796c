"""Batch norm of a concatenation along channels that is never written, by native kernels.

Forward reads the parts and writes y; backward reads the parts and dy and writes each part's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leannorm.backends.cpu import extension
from leannorm.backends.cpu.extension import (
    DTYPES,
    activation_code,
    addresses,
    empty_channels_last,
    empty_like,
    per_channel,
)
from leannorm.backends.memory import CHANNELS_LAST, PLAIN
from leannorm.ops import eager
from leannorm.ops.concatenated import concatenated_shape


def takes(parts: Sequence[Tensor]) -> bool:
    """Whether the kernels take the concatenation of these: channels-last, of one dtype, different in channels alone."""
    first = parts[0]
    order, shape = CHANNELS_LAST.get(first.ndim), list(first.shape)
    if extension.kernels is None or first.dtype not in DTYPES or order is None:
        return False
    for part in parts:
        shape[1] = part.shape[1] if part.ndim == first.ndim else -1
        if (
            type(part) not in PLAIN
            or not part.is_cpu
            or part.dtype is not first.dtype
            or list(part.shape) != shape
            or part.is_contiguous()  # an order that is both may become either when it is concatenated
            or not part.is_contiguous(memory_format=order)
        ):
            return False
    return True


@lru_cache(maxsize=4096)
def plan(shape: Sequence[int], boxes: Sequence[int], weights: Sequence[float], drawn: bool) -> Any:
    """Give what the kernels know of calls of this shape."""
    return extension.kernels.Plan(True, shape[1], [shape[0], *shape[2:]], list(boxes), list(weights), drawn)


def channels_of(parts: Sequence[Tensor]) -> list[int]:
    """Give how many channels each part has."""
    return [part.shape[1] for part in parts]


def batch_norm(parts, weight, bias, draw, boxes, weights, eps, activation, parameters):
    """Compute y, mean and variance of the parts, which `takes` takes, with statistics of some elements."""
    shape = concatenated_shape(parts)
    y, mean, var = empty_channels_last(shape, parts[0].dtype), torch.empty(shape[1]), torch.empty(shape[1])
    kernels = plan(shape, tuple(boxes), tuple(weights), draw is not None)
    constants = per_channel(weight), per_channel(bias)
    places = addresses(y, *constants, mean, var, draw)
    act = activation_code(activation, tuple(parameters))
    kernels.concatenated(DTYPES[y.dtype], addresses(*parts), channels_of(parts), *places, eps, *act)
    return y, mean, var


def batch_norm_backward(dy, parts, mean, var, weight, bias, draw, boxes, weights, eps, activation, parameters, wanted):
    """Compute the gradients of those parts that are ``wanted`` (else None), and the sums of g xhat and of g; None for
    parts that a hook on saved tensors gave another form.
    """
    if not takes(parts):
        return None
    shape, dtype = concatenated_shape(parts), parts[0].dtype
    dy = dy.to(dtype).contiguous(memory_format=CHANNELS_LAST[dy.ndim])
    dxs = [empty_like(part, part.stride()) if wants else None for part, wants in zip(parts, wanted, strict=True)]
    sum_g_xhat, sum_g = torch.empty_like(mean), torch.empty_like(mean)
    kernels = plan(shape, tuple(boxes), tuple(weights), draw is not None)
    constants = per_channel(weight), per_channel(bias)
    places = addresses(*constants, mean, var, sum_g_xhat, sum_g, draw)
    act = activation_code(activation, tuple(parameters))
    parts_at = addresses(*parts), addresses(*dxs), channels_of(parts)
    kernels.concatenated_backward(DTYPES[dtype], dy.data_ptr(), *parts_at, *places, eps, *act)
    return dxs, sum_g_xhat, sum_g


if extension.kernels is not None:
    eager.provide("concatenated_batch_norm", batch_norm, "cpu")
    eager.provide("concatenated_batch_norm_backward", batch_norm_backward, "cpu")
