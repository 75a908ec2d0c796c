"""What the kernels know of memory: its orders, and the running statistics that they move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # types that have memory to read
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool | None:
    """Whether the channels come last in memory, or None for an order that the kernels do not know."""
    if x.is_contiguous():
        return x.numel() == x.shape[0] * x.shape[1]
    if x.ndim in CHANNELS_LAST:
        return True if x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim]) else None
    return True if x.movedim(1, -1).is_contiguous() else None


def in_order_of(x: Tensor, other: Tensor) -> Tensor:
    """Give other in x's memory order."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)


def are_plain_statistics(
    statistics: tuple[Tensor, ...], batches: Tensor | None, is_there: Callable[[Tensor], bool]
) -> bool:
    """Whether the kernels may move these: dense float32 vectors of one length, and an int64 counter or none."""
    shape = statistics[0].shape
    for t in statistics:
        if t.dtype is not torch.float32 or t.shape != shape or type(t) not in PLAIN or not t.is_contiguous():
            return False
        if not is_there(t):
            return False
    return batches is None or (type(batches) in PLAIN and batches.dtype is torch.int64 and is_there(batches))
