"""Derivatives of the fused operator, and the operator as eager mode calls it; the others have none and say so."""

from __future__ import annotations

import torch
from torch import Tensor

from leannorm.ops import definition, eager
from leannorm.ops.contract import library, takes_output


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    needs_output = takes_output(activation) and residual is not None
    kept_residual = residual if activation and not needs_output else None
    ctx.save_for_backward(x, weight, bias, kept_residual, y if needs_output else None, mean, var, draw)
    ctx.has_residual = residual is not None
    ctx.places = boxes, weights
    ctx.point = eps, activation, parameters


def _backward(ctx, dy, _dmean, _dvar):
    if dy is None:
        return (None,) * 10
    x, weight, bias, residual, y, mean, var, draw = ctx.saved_tensors
    (boxes, weights), (eps, activation, parameters) = ctx.places, ctx.point
    x_needed, weight_needed, bias_needed, residual_needed = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, dy)
    backward = eager.kernel("batch_norm_backward", x) or torch.ops.leannorm.batch_norm_backward
    dx, dweight, dbias, dresidual = backward(
        dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, draw, boxes, weights,
        residual_needed and activation != "",
    )  # fmt: skip
    if residual_needed and not activation:
        dresidual = dy
    return (
        dx if x_needed else None,
        dweight.to(weight.dtype) if weight_needed else None,
        dbias.to(bias.dtype) if bias_needed else None,
        dresidual if residual_needed else None,
        *(None,) * 6,
    )


def _differentiable_backward(ctx, dy):
    """Differentiate the definition, so that the gradient has a gradient."""
    x, weight, bias, residual, y, _, _, draw = ctx.saved_tensors
    (boxes, weights), (eps, activation, parameters) = ctx.places, ctx.point
    if ctx.has_residual and residual is None and activation:
        # z = act^-1(y) is not to be had, but act' is piecewise constant: the mask stands for the activation.
        dy, activation = definition.activation_backward(dy, y, activation, parameters), ""
    inputs = [x, weight, bias, residual]
    needed = [i for i in range(4) if ctx.needs_input_grad[i] and inputs[i] is not None]
    outputs = definition.batch_norm(
        x, weight, bias, residual, draw, boxes, weights, eps, activation, () if not activation else parameters
    )
    found = torch.autograd.grad(outputs[0], [inputs[i] for i in needed], dy, create_graph=True)
    gradients: list[Tensor | None] = [None] * 10
    for i, gradient in zip(needed, found, strict=True):
        gradients[i] = gradient
    if ctx.needs_input_grad[3] and gradients[3] is None:
        gradients[3] = dy
    return tuple(gradients)


torch.library.register_autograd("leannorm::batch_norm", _backward, setup_context=_setup_context, lib=library)


class _BatchNorm(torch.autograd.Function):
    """The operator by its kernel, the last argument; what `register_autograd` makes of the same lines is slower."""

    @staticmethod
    def forward(ctx, *inputs_and_kernel):
        *inputs, kernel = inputs_and_kernel
        output = kernel(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return (*_backward(ctx, *gradients), None)


def batch_norm(x: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator of this name, with its derivative."""
    kernel = eager.kernel("batch_norm", x)
    if kernel is None:
        return torch.ops.leannorm.batch_norm(x, *others)
    return _BatchNorm.apply(x, *others, kernel)


def _refuse(name: str) -> None:
    def backward(ctx, *_):
        raise RuntimeError(
            f"torch.ops.leannorm.{name} has no derivative; use leannorm.functional.batch_norm, "
            "which has first and second derivatives"
        )

    torch.library.register_autograd(f"leannorm::{name}", backward, lib=library)


for _name in (
    "batch_norm_backward",
    "moments",
    "normalize",
    "backward_reduce",
    "backward_apply",
    "backward_fused",
    "correct",
    "snapshot",
):
    _refuse(_name)
