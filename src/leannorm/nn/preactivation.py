"""A pointwise convolution between two batch norm layers, computed in the second one's call: DenseNet's bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from leannorm import functional
from leannorm.activation import Activation
from leannorm.nn import calls, folding
from leannorm.ops.concatenated import concatenated_shape
from leannorm.statistics import Regions, Statistics

if TYPE_CHECKING:
    from leannorm.nn.batchnorm import SampledBatchNorm


class Preactivation(NamedTuple):
    """The call of a layer whose result a convolution takes, before it is known how the two are computed.

    Args:
        layer: the batch norm layer.
        inputs: what it normalizes the concatenation of.
        activation: what follows it.
        computed: computes it.
    """

    layer: SampledBatchNorm
    inputs: Sequence[Tensor]
    activation: str | Activation | None
    computed: Callable[[], Tensor]


class PreactivatedFold(NamedTuple):
    """A pointwise convolution and the call before it, which the batch norm layer behind computes too."""

    before: Preactivation
    first_regions: Regions
    module: nn.Conv2d
    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: Regions

    def compute(
        self, layer: SampledBatchNorm, input: Tensor, residual: Tensor | None, activation: str | Activation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call `leannorm.functional.preactivated_conv_batch_norm`, and let the first layer take in its statistics."""
        if residual is not None:
            fold = folding.Fold(self.module, self.shape, self.dtype, self.regions)
            return fold.compute(layer, self.before.computed(), residual, activation)
        first = self.before.layer
        y, moments, (mean, var) = functional.preactivated_conv_batch_norm(
            self.before.inputs,
            functional.BatchNorm(first.weight, first.bias, self.first_regions, first.eps, self.before.activation),
            self.module.weight,
            functional.BatchNorm(layer.weight, layer.bias, self.regions, layer.eps, activation),
        )
        first._take_in(input, *moments, self.first_regions)
        return y, mean, var


def preactivated(before: Preactivation, module: nn.Module, layer: SampledBatchNorm) -> PreactivatedFold | None:
    """Give what a layer's call computes of a convolution and the call before it, or None where they stay apart."""
    first, inputs = before.layer, before.inputs
    if (
        not isinstance(module, nn.Conv2d)
        or folding.refusal(module) is not None
        or layer.folds_convolution is not True
        or not (layer.training and first.training and isinstance(first.target, Statistics))
        or module.bias is not None
        or (module.kernel_size, module.stride, module.groups) != ((1, 1), (1, 1), 1)
        or module.padding not in ((0, 0), "valid", "same")
        or torch.is_autocast_enabled("cpu")
        or calls.are_recorded()  # each for itself
        or not functional.takes_preactivated(inputs, module.weight)
    ):
        return None
    shape = concatenated_shape(inputs)
    if shape[1] != module.in_channels or shape[1] != first.num_features:
        return None
    outputs = (shape[0], module.out_channels, *shape[2:])
    pairs = ((first, shape), (layer, outputs))
    regions = [each.statistics.regions(of, each.place, by_rows=False) for each, of in pairs]
    if not all(of.boxes and of.inverse_count < 1 for of in regions):
        return None
    return PreactivatedFold(before, regions[0], module, outputs, inputs[0].dtype, regions[1])
