"""Affine maps per channel against ``W x + b``: pure tensor functions, in float64 whatever they are given.

A weight is seen as ``(groups, outputs, inputs, *kernel)``. It is stored ``(groups outputs, inputs, *kernel)`` by
convolutions and linear layers, and ``(groups inputs, outputs, *kernel)``, ``inputs_first``, by transposed convolutions
and bare matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped(weight: Tensor, groups: int, *, inputs_first: bool) -> Tensor:
    """A stored weight as ``(groups, outputs, inputs, *kernel)`` in float64."""
    split = weight.double().reshape(groups, -1, *weight.shape[1:])
    return split.transpose(1, 2) if inputs_first else split


def stored(weight: Tensor, *, inputs_first: bool) -> Tensor:
    """The inverse of `grouped`, still in float64."""
    return (weight.transpose(1, 2) if inputs_first else weight).flatten(0, 1)


def scale_outputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, groups: int = 1, inputs_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``scale (W x + b) + shift  =  (scale W) x + (scale b + shift)``.

    Only output channels are scaled, so stride, dilation, groups and any padding of the input leave it exact.

    Args:
        weight: as stored.
        bias: ``(outputs,)``, or None for no bias.
        scale: ``(outputs,)``, all groups together.
        shift: like ``scale``.
        groups: of the convolution.
        inputs_first: how the weight is stored.
    """
    parts = grouped(weight, groups, inputs_first=inputs_first)
    scaled = parts * scale.double().reshape(groups, -1, *[1] * (parts.ndim - 2))
    offset = shift.double() if bias is None else shift.double() + scale.double() * bias.double()
    return stored(scaled, inputs_first=inputs_first), offset


def scale_inputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, groups: int = 1, inputs_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``W (scale x + shift) + b  =  (W scale) x + (W shift + b)``.

    ``W shift`` sums over inputs and kernel, which is right where every output reads its whole kernel: not at a border
    of zeros.

    Args:
        weight: as stored.
        bias: ``(outputs,)``, or None for no bias.
        scale: ``(inputs,)``, all groups together.
        shift: like ``scale``.
        groups: of the convolution.
        inputs_first: how the weight is stored.
    """
    parts = grouped(weight, groups, inputs_first=inputs_first)
    per_input = (groups, 1, -1, *[1] * (parts.ndim - 3))
    offset = (parts * shift.double().reshape(per_input)).flatten(2).sum(2).flatten()
    scaled = stored(parts * scale.double().reshape(per_input), inputs_first=inputs_first)
    return scaled, offset if bias is None else offset + bias.double()


def identity_kernel(channels: int, groups: int, kernel: tuple[int, ...], place: tuple[int, ...]) -> Tensor:
    """Weight ``(channels, channels / groups, *kernel)`` of the convolution that hands every channel on unchanged.

    Args:
        channels: inputs and outputs.
        groups: of the convolution.
        kernel: its size.
        place: where in the kernel the one is.
    """
    weight = torch.zeros(channels, channels // groups, *kernel, dtype=torch.float64)
    for channel in range(channels):
        weight[(channel, channel % (channels // groups), *place)] = 1
    return weight


def embed(weight: Tensor, kernel: tuple[int, ...], place: tuple[int, ...]) -> Tensor:
    """A kernel as a part of a larger one that is zero elsewhere, in float64.

    Args:
        weight: ``(outputs, inputs, *smaller)``.
        kernel: the larger size.
        place: where the smaller kernel begins in it.
    """
    larger = weight.new_zeros(*weight.shape[:2], *kernel, dtype=torch.float64)
    inside = tuple(slice(begin, begin + size) for begin, size in zip(place, weight.shape[2:], strict=True))
    larger[(slice(None), slice(None), *inside)] = weight.double()
    return larger
