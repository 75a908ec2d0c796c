"""BNET: batch normalization with an enhanced linear transformation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import EnhancedTransform, Method
from leannorm.nn.method import MethodNorm
from leannorm.statistics import FullBatch

_CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class EnhancedBatchNorm(MethodNorm):
    r"""BN whose gamma is a k x k depth-wise convolution.

    .. math:: y = W * (x - \mu) / \sqrt{\sigma^2 + eps} + \beta

    with W of shape (C, 1, k, ...) and zero padding. It begins as what the layer was: gamma in W's centre, 0 elsewhere.
    W is a new Parameter, ``kernel``, in place of ``weight``: make the optimiser after `leannorm.convert`. In a deployed
    model the normalization folds into a convolution before it, and W stays as a convolution.

    Source: Xu et al., Batch Normalization with Enhanced Linear Transformation, arXiv 2011.14150, equation 2.
    """

    takes = EnhancedTransform
    needs_running_statistics = False
    method: EnhancedTransform
    kernel: nn.Parameter
    weight: Any

    def __init__(self, num_features: int, method: EnhancedTransform, *, dimensions: int = 2, **options) -> None:
        self.__dict__["dimensions"] = dimensions
        super().__init__(num_features, method, **options)

    @classmethod
    def why_not(cls, layer: nn.Module, method: Method) -> str | None:
        """Refuse a layer without gamma, too."""
        if getattr(layer, "kernel", layer.weight) is None:
            return "BNET replaces gamma and beta, which the layer does not have (affine=False)"
        return super().why_not(layer, method)

    def enter(self, method: Method) -> None:
        """Make the convolution."""
        super().enter(method)
        if self.plain_class is not None:
            self.dimensions = int(self.plain_class.__name__.removeprefix("BatchNorm")[0])
        weight = torch.zeros(self.num_features, 1, *(self.method.kernel,) * self.dimensions).to(self.weight)
        weight[self._centre] = self.weight.detach()
        self.kernel = nn.Parameter(weight, self.weight.requires_grad)
        self.weight = None

    @property
    def _centre(self) -> tuple[slice | int, ...]:
        return (slice(None), 0, *(self.method.kernel // 2,) * self.dimensions)

    def why_not_left(self) -> str | None:
        """Say that the convolution is more than a gamma, if it is."""
        others = self.kernel.detach().clone()
        others[self._centre] = 0
        return "its convolution mixes neighbouring positions, which no gamma does" if others.any() else None

    def leave(self) -> None:
        """Make the convolution's centre gamma again."""
        self.weight = nn.Parameter(self.kernel.detach()[self._centre].clone(), self.kernel.requires_grad)
        del self.kernel, self.dimensions

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        regions = FullBatch().regions(input.shape)
        y, mean, var = functional.batch_norm(input, eps=self.eps)
        self._take_in(input, mean, var, regions)
        return self._convolve(y, residual, activation)

    _exact_forward = _normalize

    def _eval_forward(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        y = functional.normalize(input, self.running_mean, self.running_var, eps=self.eps)
        return self._convolve(y, residual, activation)

    def _convolve(self, y: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        if y.ndim != self.dimensions + 2:
            raise ValueError(
                f"BNET convolves over the {self.dimensions} spatial dimensions of its input, got {tuple(y.shape)}"
            )
        kernel, bias = self.kernel.to(y.dtype), None if self.bias is None else self.bias.to(y.dtype)
        padding, groups = self.method.kernel // 2, self.num_features
        y = _CONVOLUTIONS[self.dimensions](y, kernel, bias, padding=padding, groups=groups)
        return functional.transform(y, y, residual=residual, activation=activation)
