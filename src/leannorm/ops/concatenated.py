"""Batch norm of a concatenation along channels that no kernel writes: eager mode's alternative to `torch.cat` and
`torch.ops.leannorm.batch_norm`, where a back end provides ``concatenated_batch_norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from leannorm.ops import definition, eager


def concatenated_shape(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Give the shape of a concatenation along channels."""
    samples, _, *sizes = inputs[0].shape
    return samples, sum(x.shape[1] for x in inputs), *sizes


class _ConcatenatedBatchNorm(torch.autograd.Function):
    """Backward keeps the parts, as they are, in place of their concatenation."""

    @staticmethod
    def forward(ctx, kernel, settings, constants, weight, bias, *parts):
        draw, *rest = settings
        y, mean, var = kernel(parts, weight, bias, draw, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, bias, mean, var, draw, *parts)
        ctx.rest = rest
        constants += mean, var
        return y

    @staticmethod
    def backward(ctx, *gradients):
        (dy,) = gradients
        needed = ctx.needs_input_grad[3:]
        if dy is None:
            return (None,) * (3 + len(needed))
        weight, bias, mean, var, draw, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable(dy, weight, bias, parts, draw, ctx.rest, needed)
        boxes, weights, *point = ctx.rest
        kernel = eager.kernel("concatenated_batch_norm_backward", parts[0], dy)
        found = kernel and kernel(dy, parts, mean, var, weight, bias, draw, boxes, weights, *point, needed[2:])
        if found is None:
            x = torch.cat(parts, 1)
            backward = torch.ops.leannorm.batch_norm_backward
            dx, dweight, dbias, _ = backward(
                dy, x, mean, var, weight, bias, None, None, *point, draw, boxes, weights, False
            )
            dxs = dx.split([part.shape[1] for part in parts], 1)
        else:
            dxs, dweight, dbias = found
        dweight = dweight.to(weight.dtype) if needed[0] else None
        dbias = dbias.to(bias.dtype) if needed[1] else None
        dxs = [dx if wanted else None for dx, wanted in zip(dxs, needed[2:], strict=True)]
        return None, None, None, dweight, dbias, *dxs


def _differentiable(dy, weight, bias, parts, draw, rest, needed):
    """Differentiate the definition, so that the gradient has a gradient."""
    y, _, _ = definition.batch_norm(torch.cat(parts, 1), weight, bias, None, draw, *rest)
    inputs = [weight, bias, *parts]
    found = iter(
        torch.autograd.grad(y, [x for x, wanted in zip(inputs, needed, strict=True) if wanted], dy, create_graph=True)
    )
    return [next(found) if wanted else None for wanted in needed]


def batch_norm(
    kernel: Callable[..., Any], parts: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Call a kernel that `eager.kernel` gave with draw, boxes, weights, eps, activation and parameters; give y, mean
    and var.
    """
    constants: list[Tensor] = []
    y: Any = _ConcatenatedBatchNorm.apply(kernel, settings, constants, weight, bias, *parts)
    mean, var = constants
    return y, mean, var
