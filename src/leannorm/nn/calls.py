"""Calls of batch norm layers in training, recorded so that `leannorm.tune` can time each in its other forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from leannorm.activation import Activation, as_activation

if TYPE_CHECKING:
    from leannorm.nn.batchnorm import SampledBatchNorm
    from leannorm.nn.folding import Fold


class Call(NamedTuple):
    """A call, of a layer alone or with the convolution ``folded`` into it; its tensors are on no device."""

    folded: Fold | None
    layer: SampledBatchNorm
    input: Tensor
    residual: Tensor | None
    activation: Activation | None
    device: torch.device


_recording: list[Call] | None = None


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collect the calls that are made meanwhile."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def are_recorded() -> bool:
    """Whether calls are collected."""
    return _recording is not None


def record(
    folded: Fold | None,
    layer: SampledBatchNorm,
    input: Tensor | Sequence[Tensor],
    residual: Tensor | None,
    activation: str | Activation | None,
) -> None:
    """Note a call where calls are recorded; of several inputs their concatenation along channels is noted."""
    if _recording is None:
        return
    parts = [input] if isinstance(input, Tensor) else input
    kept = None if residual is None else _sketch([residual])
    _recording.append(Call(folded, layer, _sketch(parts), kept, as_activation(activation), parts[0].device))


def _sketch(parts: Sequence[Tensor]) -> Tensor:
    sketches = [torch.empty_like(part, device="meta", requires_grad=part.requires_grad) for part in parts]
    return sketches[0] if len(sketches) == 1 else torch.cat(sketches, 1)
