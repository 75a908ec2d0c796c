"""Batch norm and activation of a concatenation, a pointwise convolution, and the batch norm and activation after it, as
one operator that eager mode alone has, where a back end provides ``preactivated``.

Forward saves neither the concatenation nor what is convolved: backward computes both anew from the parts, a block at a
time. The gradient is that of the operators one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leannorm.ops import definition, eager
from leannorm.ops.contract import takes_output
from leannorm.ops.conv_batch_norm import convolution


class Normalization(NamedTuple):
    """What a batch norm is called with besides its parameters; see `leannorm.ops.contract`."""

    draw: Tensor | None
    boxes: Sequence[int]
    weights: Sequence[float]
    eps: float
    activation: str
    parameters: Sequence[float]


class _Preactivated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, first, second, constants, *tensors):
        parameters, parts = tensors[:5], tensors[5:]
        y, first_mean, first_var, mean, var, sample, kept = kernel(parts, *parameters, first, second)
        at = (y if takes_output(second.activation) else kept) if second.activation else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(at, first_mean, first_var, mean, var, sample, first.draw, second.draw, *tensors)
        ctx.settings = first._replace(draw=None), second._replace(draw=None)
        constants += first_mean, first_var, mean, var
        return y

    @staticmethod
    def backward(ctx, *gradients):
        (dy,) = gradients
        needed = ctx.needs_input_grad[4:]
        if dy is None:
            return (None,) * (4 + len(needed))
        saved = ctx.saved_tensors
        at, *moments, sample, first_draw, second_draw = saved[:8]
        tensors = saved[8:]
        first, second = ctx.settings
        first, second = first._replace(draw=first_draw), second._replace(draw=second_draw)
        found = None
        if not torch.is_grad_enabled():
            kernel = eager.kernel("preactivated_backward", tensors[-1], dy)
            found = kernel and kernel(dy, tensors[5:], *tensors[:5], first, second, at, moments, sample, needed[5:])
        if found is None:
            found = _by_definition(dy, tensors, first, second, needed)
        wanted = (gradient if wants else None for gradient, wants in zip(found, needed, strict=True))
        return None, None, None, None, *wanted


def _by_definition(dy, tensors: Sequence[Any], first, second, needed):
    """Differentiate the operators one after the other; the gradient has a gradient where that is asked for."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            tensors = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        first_weight, first_bias, weight, gamma, beta, *parts = tensors
        z, _, _ = definition.batch_norm(torch.cat(parts, 1), first_weight, first_bias, None, *first)
        u = convolution(z, weight, None, (1, 1), (0, 0), (1, 1), 1)
        y, _, _ = definition.batch_norm(u, gamma, beta, None, *second)
        inputs = [t for t, wants in zip(tensors, needed, strict=True) if wants]
        found = iter(torch.autograd.grad(y, inputs, dy, create_graph=create_graph))
    return [next(found) if wants else None for wants in needed]


def preactivated(
    kernel: Callable[..., Any],
    parts: Sequence[Tensor],
    parameters: tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None],
    first: Normalization,
    second: Normalization,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Call a kernel that `eager.kernel` gave.

    Args:
        kernel: of the name ``preactivated``.
        parts: (N, C_i, H, W), channels-last, K channels together.
        parameters: gamma and beta of the first batch norm, (K,); the filters, (C, K, 1, 1); those of the second, (C,).
        first: how the concatenation is normalized.
        second: how the convolution's output is.

    Returns:
        y, (N, C, H, W); mean and variance of the first batch norm, and of the second.
    """
    constants: list[Tensor] = []
    y: Any = _Preactivated.apply(kernel, first, second, constants, *parameters, *parts)
    first_mean, first_var, mean, var = constants
    return y, (first_mean, first_var), (mean, var)
