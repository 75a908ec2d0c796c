"""A concatenation along channels that the batch norm layer after it reads from where its parts lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from leannorm import functional
from leannorm.activation import Activation
from leannorm.nn import calls
from leannorm.ops.concatenated import concatenated_shape
from leannorm.statistics import Regions, Statistics

if TYPE_CHECKING:
    from leannorm.nn.batchnorm import SampledBatchNorm


class Concatenation(NamedTuple):
    """Tensors whose concatenation a batch norm layer's call computes too, with the shape and dtype it would have."""

    parts: Sequence[Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: Regions

    def compute(
        self, layer: SampledBatchNorm, input: Tensor, residual: Tensor | None, activation: str | Activation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call `leannorm.functional.concatenated_batch_norm` with the layer's parameters; the parts are the input."""
        calls.record(None, layer, self.parts, residual, activation)
        return functional.concatenated_batch_norm(
            self.parts,
            layer.weight,
            layer.bias,
            statistics=self.regions,
            eps=layer.eps,
            residual=residual,
            activation=activation,
        )


def concatenation(layer: SampledBatchNorm, parts: Sequence[Tensor]) -> Concatenation | None:
    """Give what a layer's call on the concatenation of these computes, or None where that is to be written."""
    if not (layer.training and isinstance(layer.target, Statistics) and functional.takes_concatenation(parts)):
        return None
    shape = concatenated_shape(parts)
    regions = layer.statistics.regions(shape, layer.place, by_rows=False)
    return Concatenation(parts, shape, parts[0].dtype, regions) if regions.boxes and regions.inverse_count < 1 else None
