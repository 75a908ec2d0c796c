"""Derivatives of the fused operators, and these as eager mode calls them; the others have none and say so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leannorm.ops import definition, eager
from leannorm.ops.contract import library, takes_output


def _setup_context(ctx, inputs, outputs):
    x, weight, bias, residual, draw, boxes, weights, *point = inputs
    y, mean, var, *signs = outputs
    _keep(ctx, x, weight, bias, residual, y, point, mean, var, draw, signs=signs[0] if signs else None)
    ctx.places = boxes, weights


def _keep(ctx, x, weight, bias, residual, y, point, *others, signs=None):
    """Save what backward reads: the residual where the activation needs it, or y or its signs in its place."""
    ctx.set_materialize_grads(False)
    _, activation, _ = ctx.point = point
    needs_output = residual is not None and takes_output(activation)
    kept_residual = residual if activation and not needs_output else None
    told_by = signs if signs is not None else y if needs_output else None
    ctx.save_for_backward(x, weight, bias, kept_residual, told_by, *others)
    ctx.has_residual = residual is not None
    ctx.strides_with_signs = None if signs is None else (x.stride(), y.stride())


def _backward(ctx, dy, needed, held):
    x, weight, bias, residual, y, mean, var, draw = ctx.saved_tensors
    (boxes, weights), (eps, activation, parameters) = ctx.places, ctx.point
    if torch.is_grad_enabled():

        def forward(x, weight, bias, residual, *activation):
            return definition.batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, *activation)[0]

        return _differentiable_gradients(ctx, dy, needed, forward)
    if ctx.strides_with_signs is not None and x.stride() != ctx.strides_with_signs[0]:
        # A hook on saved tensors gave x another memory order, in which the signs do not lie.
        dy, y, activation, parameters = _through_activation(ctx, dy, y), None, "", ()
    held = held if activation or not needed[3] else None  # else dy is the residual's gradient, too
    backward = eager.kernel_over("batch_norm_backward", x, dy, held) or torch.ops.leannorm.batch_norm_backward
    dx, dweight, dbias, dresidual = backward(
        dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, draw, boxes, weights,
        needed[3] and activation != "",
    )  # fmt: skip
    return _wanted(needed, (dx, dweight, dbias, dresidual if activation else dy), weight, bias)


def _wanted(needed, gradients, weight, bias):
    """Give those gradients that are needed, of weight and bias in their dtype."""
    dx, dweight, dbias, dresidual = gradients
    return (
        dx if needed[0] else None,
        _in_dtype_of(weight, dweight) if needed[1] else None,
        _in_dtype_of(bias, dbias) if needed[2] else None,
        dresidual if needed[3] else None,
    )


def _in_dtype_of(parameter, gradient):
    return gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)


def _differentiable_gradients(ctx, dy, wanted, forward):
    """Differentiate the definition, so that the gradients of x, weight, bias and residual have gradients."""
    x, weight, bias, residual, y, *_ = ctx.saved_tensors
    _, activation, parameters = ctx.point
    if ctx.has_residual and residual is None and activation:
        # z = act^-1(y) is not to be had, but act' is piecewise constant: the mask stands for the activation.
        dy, activation = _through_activation(ctx, dy, y), ""
    inputs = [x, weight, bias, residual]
    needed = [i for i in range(4) if wanted[i] and inputs[i] is not None]
    z = forward(*inputs, activation, parameters if activation else ())
    found = torch.autograd.grad(z, [inputs[i] for i in needed], dy, create_graph=True) if needed else ()
    gradients: list[Tensor | None] = [None] * 4
    for i, gradient in zip(needed, found, strict=True):
        gradients[i] = gradient
    if wanted[3] and gradients[3] is None:
        gradients[3] = dy
    return gradients


def _through_activation(ctx, dy, told_by):
    """Multiply by act'(z), which the output or its signs tell."""
    _, activation, parameters = ctx.point
    if ctx.strides_with_signs is None:
        return definition.activation_backward(dy, told_by, activation, parameters)
    return definition.activation_backward_by_signs(dy, told_by, ctx.strides_with_signs[1], activation, parameters)


_batch_norm = eager.differentiable("batch_norm", _setup_context, _backward, tensors=4)


def batch_norm(x: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator of this name, with its derivative."""
    _, _, residual, *_, activation, _ = others
    told_by_output = residual is not None and takes_output(activation) and torch.is_grad_enabled()
    kernel = eager.kernel("batch_norm_with_signs", x) if told_by_output else None
    kernel = kernel or eager.kernel("batch_norm", x)
    if kernel is None:
        return torch.ops.leannorm.batch_norm(x, *others)
    y, mean, var, *_ = _batch_norm(kernel, x, *others)
    return y, mean, var


# With given statistics, through which no gradient flows.


def _setup_normalize(ctx, inputs, outputs):
    x, mean, var, weight, bias, residual, *point = inputs
    _keep(ctx, x, weight, bias, residual, outputs[0], point, mean, var)


def _normalize_backward(ctx, dy, needed, held):
    x, weight, bias, residual, y, mean, var = ctx.saved_tensors
    x_needed, mean_needed, var_needed, *others_needed = needed
    if mean_needed or var_needed:
        raise RuntimeError(
            "torch.ops.leannorm.normalize takes mean and var for constants; detach them, "
            "or use leannorm.functional.normalize_by, through which their gradients flow"
        )
    eps, activation, parameters = ctx.point
    needed = (x_needed, *others_needed)
    if torch.is_grad_enabled():

        def forward(x, weight, bias, residual, *activation):
            return definition.normalize(x, mean, var, weight, bias, residual, eps, *activation)

        dx, *others = _differentiable_gradients(ctx, dy, needed, forward)
        return dx, None, None, *others
    held = held if activation or not needed[3] else None
    backward = eager.kernel_over("backward_fused", x, dy, held) or torch.ops.leannorm.backward_fused
    dx, dweight, dbias, dresidual = backward(
        dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, needed[3] and activation != ""
    )
    dx, *others = _wanted(needed, (dx, dweight, dbias, dresidual if activation else dy), weight, bias)
    return dx, None, None, *others


_normalize = eager.differentiable("normalize", _setup_normalize, _normalize_backward, tensors=6)


def normalize(kernel: Callable[..., Tensor], x: Tensor, *others) -> Tensor:
    """Call the operator of this name by a kernel that `eager.kernel` gave, with its derivative."""
    return _normalize(kernel, x, *others)[0] if torch.is_grad_enabled() else kernel(x, *others)


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
    "backward_reduce",
    "backward_apply",
    "backward_fused",
    "correct",
    "snapshot",
):
    _refuse(_name)
