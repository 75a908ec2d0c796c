"""Convolutions folded with their batch norm, by native kernels; see `leannorm.ops.conv_batch_norm`.

Depthwise ones are bound by memory, as batch norm is, so that the two as one kernel take little more than either:
forward reads x and writes y; backward reads x, dy and y for the sums, then dy and y for dx. Pointwise ones (1x1) are
products of matrices, whose kernels read x and write y, and in backward read dy, y and x and write dx, once each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leannorm.backends.cpu import extension
from leannorm.backends.cpu.extension import DTYPES, activation_code, addresses, empty_channels_last, per_channel
from leannorm.backends.memory import PLAIN
from leannorm.ops.contract import takes_output
from leannorm.ops.conv_batch_norm import memory_format, output_shape, sampled_elements

_MOST_TAPS = 128
_MOST_WEIGHTS = 1 << 22  # of which each thread keeps as many sums


def plan(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    draw: Tensor | None,
    boxes: Sequence[int],
    weights: Sequence[float],
) -> Any:
    """Give what the kernels know of a call, or None where they do not take it."""
    places, rest = tuple(stride), (tuple(boxes), tuple(weights), draw is not None)
    if _takes_depthwise(x, weight, groups):
        return _depthwise(x.shape, weight.shape[2:], places, tuple(padding), tuple(dilation), *rest)
    if x.dtype is torch.float32 and _takes_filters(x, weight, padding, groups):
        return pointwise_plan(x.shape, len(weight), places, *rest)
    return None


def pays(
    x: Tensor, weight: Tensor, dtype: torch.dtype, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether the kernels take a convolution that computes in this dtype, and the two as one are faster for certain.

    Depthwise ones are. What pointwise ones save are passes over the maps; what they cost are passes over the filters,
    which are packed, and whose gradient every thread adds up for itself.
    """
    if _takes_depthwise(x, weight, groups):
        return True
    if dtype is not torch.float32 or not _takes_filters(x, weight, padding, groups):
        return False
    positions = math.prod(-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True))
    return x.shape[0] * positions * (x.shape[1] + len(weight)) >= 2 * weight.numel()


def _takes_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    if not 1 < groups == x.shape[1] == weight.shape[0]:
        return False
    return weight.shape[2:].numel() <= _MOST_TAPS and _takes(x, weight)


def _takes_filters(x: Tensor, weight: Tensor, padding: Sequence[int], groups: int) -> bool:
    return groups == 1 and not any(padding) and _takes(x, weight) and takes_pointwise(weight)


def _takes(x: Tensor, weight: Tensor) -> bool:
    return (
        x.ndim == 4
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and x.is_cpu
        and weight.is_cpu
        and x.dtype in DTYPES
        and weight.dtype in DTYPES
        and extension.kernels is not None
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and memory_format(x, weight) == torch.channels_last
    )


def takes_pointwise(weight: Tensor) -> bool:
    """Whether the kernels take filters of one element."""
    plain = type(weight) in PLAIN and weight.is_cpu and weight.dtype in DTYPES and weight.ndim == 4
    return plain and weight.shape[2:].numel() == 1 and weight.numel() <= _MOST_WEIGHTS


@lru_cache(maxsize=1024)
def _depthwise(shape, kernel, stride, padding, dilation, boxes, weights, drawn):
    sizes = list(shape[2:]), list(kernel), list(stride), list(padding), list(dilation)
    return extension.kernels.DepthwisePlan(shape[0], shape[1], *sizes, list(boxes), list(weights), drawn)


@lru_cache(maxsize=1024)
def pointwise_plan(shape, outputs, stride, boxes, weights, drawn):
    """Give what the kernels know of pointwise convolutions of inputs of this shape."""
    sizes = list(shape[2:]), list(stride)
    return extension.kernels.PointwisePlan(shape[0], shape[1], outputs, *sizes, list(boxes), list(weights), drawn)


def conv_batch_norm(
    plan, x, weight, gamma, beta, residual, stride, padding, dilation, draw, boxes, eps, activation, parameters
):
    """Compute the operator of this name."""
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    y = empty_channels_last(shape, x.dtype)
    kept = empty_channels_last(shape, x.dtype) if activation and not takes_output(activation) else None
    mean, var = torch.empty(shape[1]), torch.empty(shape[1])
    sample = x.new_empty(sum(sampled_elements(boxes, 3)), shape[1])
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    constants = per_channel(weight), per_channel(gamma), per_channel(beta)
    places = addresses(x, residual, y, kept, sample, *constants, mean, var, draw)
    plan.forward(DTYPES[x.dtype], *places, eps, *activation_code(activation, tuple(parameters)))
    return y, mean, var, sample, x.new_empty(0) if kept is None else kept


def conv_batch_norm_backward(
    plan, dy, x, weight, gamma, at, mean, var, sample, draw, eps, activation, parameters, input_gradient,
    residual_gradient,
):  # fmt: skip
    """Compute the operator of this name."""
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    at = None if at is None else at.contiguous(memory_format=torch.channels_last)
    dx = empty_channels_last(x.shape, x.dtype) if input_gradient else None
    dresidual = empty_channels_last(dy.shape, x.dtype) if residual_gradient else None
    direct = weight.dtype is torch.float32 and weight.is_contiguous()
    dweight = torch.empty_like(weight) if direct else torch.empty(weight.shape)
    sum_g_xhat, sum_g = torch.empty_like(mean), torch.empty_like(mean)
    constants = per_channel(weight), per_channel(gamma), mean, var
    places = addresses(dy, x, at, dx, dresidual, sample, *constants, dweight, sum_g_xhat, sum_g, draw)
    plan.backward(DTYPES[x.dtype], *places, eps, *activation_code(activation, tuple(parameters)))
    dweight = dweight if direct else torch.empty_like(weight).copy_(dweight)
    none = x.new_empty(0)
    return none if dx is None else dx, dweight, sum_g_xhat, sum_g, none if dresidual is None else dresidual
