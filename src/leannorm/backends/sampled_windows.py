"""Cut out of a convolution's input what its outputs at the sampled positions see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leannorm.backends.activated_convolution import Convolution


@dataclass(frozen=True)
class Window:
    """A region's part of the input, and the convolution that gives the region's outputs of it, and no others."""

    crop: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def windows(
    x: Tensor,
    kernel: Sequence[int],
    settings: Convolution,
    draw: Tensor | None,
    boxes: Sequence[int],
    *,
    read_draw: bool,
) -> list[Window]:
    """Give the window of each region.

    Args:
        x: the convolution's input.
        kernel: its kernel's sizes.
        settings: its settings.
        draw: the random integers, or None.
        boxes: the regions of the output.
        read_draw: read ``draw`` on the host and cut with slices; else index with tensors and never wait for the device.
    """
    dimensions = 1 + len(kernel)
    drawn = draw.tolist() if draw is not None and read_draw else draw
    found = []
    for first in range(0, len(boxes) // 4, dimensions):
        crop, paddings, strides = x, [], []
        for k in range(dimensions):
            start, span, count, step = boxes[4 * (first + k) : 4 * (first + k) + 4]
            if drawn is not None:
                start = start + drawn[first + k] % span
            if k == 0:
                crop, stride, around = _cut(crop, 0, start, count, step, 1)
            else:
                extent = settings.dilation[k - 1] * (kernel[k - 1] - 1) + 1
                start = start * settings.stride[k - 1] - settings.padding[k - 1]
                crop, stride, around = _cut(crop, k + 1, start, count, step * settings.stride[k - 1], extent)
                strides.append(stride)
                paddings.append(around)
        if any(before != after for before, after in paddings) or 0 in crop.shape[2:]:  # torch refuses an empty input
            crop = F.pad(crop, [size for around in reversed(paddings) for size in around])
            paddings = [(0, 0)] * len(paddings)
        found.append(Window(crop, tuple(strides), tuple(before for before, _ in paddings), settings.dilation))
    return found


def _cut(
    x: Tensor, dimension: int, start: int | Tensor, count: int, step: int, extent: int
) -> tuple[Tensor, int, tuple[int, int]]:
    """Cut out what ``count`` windows of ``extent`` see, ``step`` apart, the first from ``start`` on.

    Returns:
        The part that lies in x, the step that is left between windows, and how much lies before and after x.
    """
    size = x.shape[dimension]
    inside, step = (step, 1) if extent == 1 else (1, step)  # between the elements of the cut, and then of the windows
    length = (count - 1) * step + extent
    if isinstance(start, Tensor):
        positions = start + inside * torch.arange(length, device=x.device)
        cut = x.index_select(dimension, positions.clamp(0, size - 1))
        if dimension == 0:
            return cut, step, (0, 0)
        there = ((positions >= 0) & (positions < size)).view(-1, *(1,) * (x.ndim - 1 - dimension))
        return torch.where(there, cut, 0), step, (0, 0)
    before = min(length, -(min(0, start) // inside))
    last = min(length, max(0, -((start - size) // inside)))
    index = [slice(None)] * x.ndim
    index[dimension] = (
        slice(start + before * inside, start + (last - 1) * inside + 1, inside) if before < last else slice(0)
    )
    return x[tuple(index)], step, (before, length - last)
