"""Batch normalization by the operators' definition: what sides are held to, with no kernel of leannorm's in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leannorm.activation import as_activation
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.ops import definition

if TYPE_CHECKING:
    from leannorm.activation import Activation
    from leannorm.statistics import Regions


def normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, regions: Regions, eps: float
) -> Tensor:
    """Give z, the normalized input plus the residual, differentiable by PyTorch's own derivatives.

    Random places are drawn as `leannorm.functional.batch_norm` draws them: the same seed gives the same.
    """
    draw = torch.randint(0, 2**62, (regions.draws,), device=x.device) if regions.draws else None
    mean, var = definition.moments(x, draw, regions.boxes, regions.weights)
    return definition.normalize(x, mean, var, weight, bias, residual, eps, "", ())


class ByDefinition(SampledBatchNorm):
    """A converted layer in training mode, without running statistics."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - a reference is never folded
        self, input: Tensor, residual: Tensor | None = None, activation: str | Activation | None = None
    ) -> Tensor:
        """Normalize, add, activate."""
        act = as_activation(activation) or self.activation
        regions = self.statistics.regions_of(input, self.place)
        z = normalized(input, self.weight, self.bias, residual, regions, self.eps)
        return definition.activate(z, act.kind, act.parameters) if act else z


def by_definition(model: nn.Module) -> nn.Module:
    """Make the converted layers of a model compute by definition, in place."""
    for module in model.modules():
        if isinstance(module, SampledBatchNorm):
            module.__class__ = ByDefinition
    return model
