"""Batch normalization in fixed-point numbers of few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import EightBitNormalization
from leannorm.nn.method import MethodNorm, count, unbiased
from leannorm.ops.contract import accumulation_dtype
from leannorm.ops.definition import per_channel, reduced_dimensions

_STEP = 2.0**-15


class EightBitBatchNorm(MethodNorm):
    r"""BN whose values are rounded to fixed-point numbers, in training and in eval mode.

    .. math:: Q(x, k) = round(2^{k-1} x) / 2^{k-1}, \quad
        \hat x = Q\left(\frac{x - Q(\mu, 16)}{Q(\sqrt{\sigma^2}, 16) + 2^{-15}}, 8\right), \quad
        y = Q(\gamma, 8) \hat x + Q(\beta, 8)

    The gradient of Q is by definition that of the identity (straight through), and those of gamma and beta are rounded
    to 15 bits. ``eps`` of the BN layer is not used. The bits say the resolution; values beyond 1 take more, as in the
    source. This simulates the arithmetic: tensors stay floating.

    Source: Yang et al., Training High-Performance and Large-Scale Deep Neural Networks with Full 8-bit Integers
    (WAGEUBN), arXiv 1909.02384, section III.
    """

    takes = EightBitNormalization
    why_not_recalibrated = "its layer rounds its statistics: recalibrate the batch normalization that it was"
    why_not_folded = "its rounded values are no affine map per channel"
    method: EightBitNormalization

    def why_not_left(self) -> None:
        """It has no state of its own."""

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        elements, x = count(input), input.to(accumulation_dtype(input.dtype))
        var, mean = torch.var_mean(x, reduced_dimensions(x), correction=0)
        if self._counts(input):
            self._track(mean.detach(), unbiased(var.detach(), elements))
        return self._quantize(x, mean, var, input, residual, activation)

    def _eval_forward(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        dtype = accumulation_dtype(input.dtype)
        mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
        return self._quantize(input.to(dtype), mean, var, input, residual, activation)

    def _quantize(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        input: Tensor,
        residual: Tensor | None,
        activation: str | Activation | None,
    ) -> Tensor:
        method = self.method
        sigma = var.clamp(min=torch.finfo(var.dtype).tiny).sqrt()
        mean, sigma = (_Round.apply(v, method.statistics_bits, None) for v in (mean, sigma))
        normalized = (x - per_channel(mean, x)) / per_channel(sigma + _STEP, x)
        normalized = _Round.apply(normalized, method.bits, None)
        weight, bias = (
            None if v is None else _Round.apply(v, method.bits, method.gradient_bits) for v in (self.weight, self.bias)
        )
        return functional.transform(normalized, input, weight, bias, residual=residual, activation=activation)


class _Round(torch.autograd.Function):
    """Q(x, bits); its gradient passes through, rounded to gradient_bits if given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, gradient_bits: int | None) -> Tensor:
        ctx.gradient_bits = gradient_bits
        return quantized(x, bits)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g if ctx.gradient_bits is None else quantized(g, ctx.gradient_bits), None, None


def quantized(x: Tensor, bits: int) -> Tensor:
    """Round to multiples of 2^(1 - bits)."""
    return torch.round(x * 2.0 ** (bits - 1)) / 2.0 ** (bits - 1)
