"""Memory orders that the kernels know."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool | None:
    """Whether the channels come last in memory, or None for an order that the kernels do not know."""
    if x.is_contiguous():
        return x.numel() == x.shape[0] * x.shape[1]
    if x.ndim in _CHANNELS_LAST:
        return True if x.is_contiguous(memory_format=_CHANNELS_LAST[x.ndim]) else None
    return True if x.movedim(1, -1).is_contiguous() else None


def in_order_of(x: Tensor, other: Tensor) -> Tensor:
    """Give other in x's memory order."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)
