"""Moving average batch normalization, and the convolutions with centered weights that it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import Method, MovingAverageNormalization
from leannorm.nn.method import MethodNorm, count
from leannorm.nn.tracing import Unscriptable, is_traced, record
from leannorm.ops.contract import accumulation_dtype
from leannorm.ops.definition import per_channel, reduced_dimensions


class MovingAverageBatchNorm(MethodNorm):
    r"""Normalization by second moments alone, whose statistics in both directions are averages over batches.

    .. math:: \chi^2 = \frac1m \sum_{j<m} E_B[x^2]_{t-j}, \quad z = x / \sqrt{\chi^2 + eps}, \quad
        \hat x = r z, \quad r = clip(\sqrt{(\chi^2 + eps) / (\bar\chi^2 + eps)}, 1 / r_{max}, r_{max})

    with the exponential average chi-bar as it was before the batch, and in the backward pass, g the gradient of
    x-hat and no gradient through r,

    .. math:: \psi = \frac1m \sum_{j<m} E_B[r g z]_{t-j}, \quad dx = (r g - z \psi) / \sqrt{\chi^2 + eps}

    so that dx is the derivative of what is computed only in the warm-up, where both statistics are those of the batch
    alone. A second derivative raises. Means are not subtracted: `leannorm.convert` centers the weights of all
    convolutions instead, over inputs and kernel. ``running_var`` is chi-bar squared and ``running_mean`` stays 0, so
    that eval mode is BN's. The psi of a batch enters its buffer in its backward pass.

    Source: Yan et al., Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, ICLR 2020,
    arXiv 2001.06838, sections 4.2 and 4.3, with the warm-up and clipping of the authors' code.
    """

    takes = MovingAverageNormalization
    reads_state = True
    why_not_recalibrated = "it normalizes by second moments, which recalibrate does not pool"
    method: MovingAverageNormalization
    squares: Tensor
    products: Tensor

    def enter(self, method: Method) -> None:
        """Make the buffers, and the running second moment from mean and variance."""
        super().enter(method)
        for name in ("squares", "products"):
            self._register(name, self.method.batches, self.num_features)
        with torch.no_grad():
            self.running_var.add_(self.running_mean**2)
            self.running_mean.zero_()

    def leave(self) -> None:
        """Take the buffers away."""
        del self.squares, self.products

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        count(input)
        method, dtype = self.method, accumulation_dtype(input.dtype)
        x = input.to(dtype)
        with torch.no_grad():
            square = x.square().mean(reduced_dimensions(x))
            self.num_batches_tracked.add_(1)
            step = self.num_batches_tracked.clone()
            slot = (step - 1) % method.batches
            self.squares.index_copy_(0, slot.view(1), square.to(self.squares.dtype)[None])
            warm = (step <= method.batches) | (step < method.warmup)
            square = torch.where(warm, square, self.squares.to(dtype).mean(0))
            old = torch.where(step == 1, square, self.running_var.to(dtype))
            limit = torch.where(step <= max(method.r_start, method.warmup), 1.0, method.r_max).to(dtype)
            r = torch.sqrt((square + self.eps) / (old + self.eps)).clamp(1 / limit, limit)
            factor = 1 / step if self.momentum is None else self.momentum
            self._track(torch.zeros_like(square), square, torch.where(step == 1, 1.0, factor))
        kept = map(functional.snapshot, (torch.rsqrt(square + self.eps), r, slot, warm))
        normalized = _Normalize.apply(x, self.products, *kept)
        return functional.transform(normalized, input, self.weight, self.bias, residual=residual, activation=activation)


class _Normalize(torch.autograd.Function):
    """x-hat from the inverse of chi, with the averaged backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, products: Tensor, inverse: Tensor, r: Tensor, slot: Tensor, warm: Tensor
    ) -> Tensor:
        z = x * per_channel(inverse, x)
        ctx.save_for_backward(z, inverse, r, slot, warm)
        ctx.products = products  # written in the backward pass, so not saved for it
        return z * per_channel(r, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, inverse, r, slot, warm = ctx.saved_tensors
        g = g * per_channel(r, z)
        product = (g * z).mean(reduced_dimensions(z))
        ctx.products.index_copy_(0, slot.view(1), product.to(ctx.products.dtype)[None])
        psi = torch.where(warm, product, ctx.products.to(z.dtype).mean(0))
        return (g - z * per_channel(psi, z)) * per_channel(inverse, z), None, None, None, None, None


def centered(weight: Tensor) -> Tensor:
    """Subtract from a convolution's weight, (C, C_in / groups, *kernel), each output channel's mean."""
    return weight - weight.mean(list(range(1, weight.ndim)), keepdim=True)


class _Centered(Unscriptable, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        return record(self, input) if is_traced(input) else self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, centered(weight), bias)


class CenteredConv1d(_Centered, nn.Conv1d):
    """`torch.nn.Conv1d` that computes with centered weights."""


class CenteredConv2d(_Centered, nn.Conv2d):
    """`torch.nn.Conv2d` that computes with centered weights."""


class CenteredConv3d(_Centered, nn.Conv3d):
    """`torch.nn.Conv3d` that computes with centered weights."""


CENTERED = {nn.Conv1d: CenteredConv1d, nn.Conv2d: CenteredConv2d, nn.Conv3d: CenteredConv3d}
