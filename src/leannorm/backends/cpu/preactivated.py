"""Batch norm, activation, pointwise convolution, batch norm and activation as one operator, by native kernels.

Forward reads the parts of a concatenation and writes y; backward reads dy, y and the parts and writes their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leannorm.backends.cpu import concatenated, convolution, extension
from leannorm.backends.cpu.extension import activation_code, addresses, empty_channels_last, empty_like, per_channel
from leannorm.ops import eager
from leannorm.ops.concatenated import concatenated_shape
from leannorm.ops.contract import takes_output
from leannorm.ops.conv_batch_norm import sampled_elements


def takes(parts: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether the kernels take a convolution of the concatenation of these, of stride 1 and one group."""
    return (
        concatenated.takes(parts)
        and parts[0].dtype is torch.float32
        and parts[0].ndim == 4
        and weight.dtype is torch.float32
        and convolution.takes_pointwise(weight)
    )


def _point(constants, moments, settings) -> tuple[Any, ...]:
    act = activation_code(settings.activation, tuple(settings.parameters))
    return *addresses(*constants, *moments, settings.draw), settings.eps, *act


def _plans(parts, weight, first, second):
    samples, channels, height, width = shape = concatenated_shape(parts)
    places = [(tuple(s.boxes), tuple(s.weights), s.draw is not None) for s in (first, second)]
    pointwise = convolution.pointwise_plan((samples, channels, height, width), len(weight), (1, 1), *places[1])
    return concatenated.plan(shape, *places[0]), pointwise


def preactivated(parts, first_weight, first_bias, weight, gamma, beta, first, second):
    """Compute y, mean and variance of both batch norms, the second one's sample, and z where backward needs it."""
    samples, channels, *sizes = concatenated_shape(parts)
    first_plan, plan = _plans(parts, weight, first, second)
    y = empty_channels_last((samples, len(weight), *sizes), torch.float32)
    kept = None
    if second.activation and not takes_output(second.activation):
        kept = empty_channels_last(y.shape, torch.float32)
    first_moments, moments = [torch.empty(2, count).unbind() for count in (channels, len(weight))]
    sample = torch.empty(sum(sampled_elements(second.boxes, 3)), len(weight))
    constants = [per_channel(t) for t in (first_weight, first_bias, weight, gamma, beta)]
    plan.preactivated(
        first_plan,
        addresses(*parts),
        concatenated.channels_of(parts),
        _point(constants[:2], first_moments, first),
        *addresses(y, kept, sample, constants[2]),
        _point(constants[3:], moments, second),
    )
    return y, *first_moments, *moments, sample, kept


def preactivated_backward(
    dy, parts, first_weight, first_bias, weight, gamma, beta, first, second, at, moments, sample, wanted
):
    """Compute the gradients of the parameters and of those parts that are ``wanted`` (else None); None for tensors that
    a hook on saved tensors gave another form.
    """
    if not takes(parts, weight):
        return None
    first_plan, plan = _plans(parts, weight, first, second)
    dy = dy.to(torch.float32).contiguous(memory_format=torch.channels_last)
    at = None if at is None else at.contiguous(memory_format=torch.channels_last)
    dxs = [empty_like(part, part.stride()) if wants else None for part, wants in zip(parts, wanted, strict=True)]
    dweight = torch.empty(weight.shape)
    first_sums, sums = [torch.empty(2, count).unbind() for count in (weight.shape[1], len(weight))]
    constants = [per_channel(t) for t in (first_weight, first_bias, weight, gamma, beta)]
    plan.preactivated_backward(
        first_plan,
        dy.data_ptr(),
        addresses(*parts),
        addresses(*dxs),
        concatenated.channels_of(parts),
        _point(constants[:2], moments[:2], first),
        *addresses(at, sample, constants[2]),
        _point(constants[3:], moments[2:], second),
        *addresses(*first_sums, dweight, *sums),
    )
    gradients = zip((*first_sums, dweight, *sums), (first_weight, first_bias, weight, gamma, beta), strict=True)
    return *(None if t is None else torch.empty_like(t).copy_(gradient) for gradient, t in gradients), *dxs


if extension.kernels is not None:
    eager.provide("preactivated", preactivated, "cpu")
    eager.provide("preactivated_backward", preactivated_backward, "cpu")
