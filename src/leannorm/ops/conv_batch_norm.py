"""A convolution and the batch norm after it as one operator: schema, fake kernel, autograd.

With sampled statistics the convolution's outputs at the sampled positions, which are few, can be computed first. Then
scale and shift are known before the convolution runs, and its own output never exists:

    forward    u_S = conv(x, W) at the sampled positions;  a = gamma / sigma;  b = beta - a mu
               y = act(conv(x, a W) + b + r);  where a W is rounded, a mu is the mean of conv(x, a W) at S
    backward   g = dy act'(y);  dbeta = sum g;  g' = g - w_i dbeta on S, w_i the weight of a sampled position
               dW~ = the filters' gradient for g';  dgamma = <W, dW~> / sigma, since sum_i g'_i (u_i - mu) = <W, dW~>
               g'' = g' - w_i xhat_i dgamma on S;  dx = the input's gradient for g'' and a W
               dW = a (dW~ - dgamma R),  R = the filters' gradient for w_i xhat_i on S alone;  dr = g

Legend, further to that of `leannorm.ops.contract`
    x            (N, C_in, *spatial); (N, C_in) for a linear layer
    weight       W: (C, C_in / groups, *kernel), (C, C_in) for a linear layer; of x's dtype or a wider one
    conv_bias    (C,) or None; batch norm cancels it, so that nothing reads it and its gradient is zero
    gamma, beta  (C,) or None: batch norm's weight and bias
    stride, padding, dilation  one number a spatial dimension, none for a linear layer; padding is with zeros
    boxes        at least one region, of the convolution's output
    mean, var    of the convolution without its bias
    sample       (m, C) the convolution at the sampled positions, region after region
    kept         z = conv(x, a W) + b + residual where act' needs it (not `takes_output`), else empty
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from leannorm.ops import definition, eager
from leannorm.ops.contract import accumulation_dtype, library, takes_output

_CONVOLUTION = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_REST = "Tensor? draw, SymInt[] boxes, float[] weights, float eps, str activation, float[] parameters"


def output_shape(
    x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Give the shape of a convolution's output from those of its input and weight."""
    spatial = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    ]
    return (x[0], weight[0], *spatial)


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Give the memory format of the output: channels-last where the input or the weight is, as torch has it."""
    last = _LAST.get(x.ndim)
    if last is None:
        return torch.contiguous_format
    return last if _channels_last(x, last) or _channels_last(weight, last) else torch.contiguous_format


def _channels_last(x: Tensor, last: torch.memory_format) -> bool:
    """Whether the channels lie closest in memory, also in a part of a tensor."""
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=last):  # as most are; the rest takes ten times as long
        return True
    batch, channel, *spatial = x.stride()
    return all(one >= other for one, other in pairwise((batch, *spatial, channel)))


def sampled_elements(boxes: Sequence[int], dimensions: int) -> list[int]:
    """Give the number of elements a channel of each region; ``dimensions`` are the samples and the spatial ones."""
    counts = boxes[2::4]
    regions = [counts[at : at + dimensions] for at in range(0, len(counts), dimensions)]
    return [_product(region) for region in regions]


def _product(numbers: Sequence[int]) -> int:
    product = 1
    for number in numbers:
        product = product * number
    return product


library.define(
    f"conv_batch_norm(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, Tensor? residual,"
    f" {_CONVOLUTION}, {_REST}) -> (Tensor y, Tensor mean, Tensor var, Tensor sample, Tensor kept)"
)


@torch.library.register_fake("leannorm::conv_batch_norm", lib=library)
def _(x, weight, conv_bias, gamma, beta, residual, stride, padding, dilation, groups, draw, boxes, *rest):
    *_, activation, _ = rest
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))
    mean = x.new_empty(shape[1], dtype=accumulation_dtype(x.dtype))
    sample = x.new_empty(sum(sampled_elements(boxes, len(shape) - 1)), shape[1])
    kept = x.new_empty(0) if not activation or takes_output(activation) else torch.empty_like(y)
    return y, mean, torch.empty_like(mean), sample, kept


# ``at`` is y or z, where act' is to be taken; dx and dresidual are empty unless they are wanted.

library.define(
    "conv_batch_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? gamma, Tensor? at, Tensor mean, Tensor var,"
    f" Tensor sample, {_CONVOLUTION}, {_REST}, bool input_gradient, bool residual_gradient)"
    " -> (Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta, Tensor dresidual)"
)


@torch.library.register_fake("leannorm::conv_batch_norm_backward", lib=library)
def _(dy, x, weight, gamma, at, mean, var, sample, *rest):
    input_gradient, residual_gradient = rest[-2:]
    dx = torch.empty_like(x) if input_gradient else x.new_empty(0)
    dresidual = x.new_empty(0)
    if residual_gradient:
        dresidual = torch.empty(dy.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))
    return dx, torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(mean), dresidual


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute a convolution, or a linear layer where there is no stride."""
    if not stride:
        return F.linear(x, weight, bias)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _setup_context(ctx, inputs, outputs):
    x, weight, _, gamma, beta, residual, stride, padding, dilation, groups, *places, eps, activation, parameters = (
        inputs
    )
    y, mean, var, sample, kept = outputs
    ctx.set_materialize_grads(False)
    at = (y if takes_output(activation) else kept) if activation else None
    draw, boxes, weights = places
    ctx.save_for_backward(x, weight, gamma, beta, at, mean, var, sample, draw)
    ctx.convolution = stride, padding, dilation, groups
    ctx.rest = boxes, weights, eps, activation, parameters
    ctx.has_residual = residual is not None


def _backward(ctx, dy, needed, held):
    x, weight, gamma, beta, at, mean, var, sample, draw = ctx.saved_tensors
    boxes, weights, eps, activation, parameters = ctx.rest
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, dy, needed)
    held = held if activation or not needed[5] else None  # else dy is the residual's gradient, too
    backward = eager.kernel_over("conv_batch_norm_backward", x, dy, held) or torch.ops.leannorm.conv_batch_norm_backward
    dx, dweight, dgamma, dbeta, dresidual = backward(
        dy, x, weight, gamma, at, mean, var, sample, *ctx.convolution, draw, boxes, weights, eps, activation,
        parameters, needed[0], needed[5] and activation != "",
    )  # fmt: skip
    return (
        dx if needed[0] else None,
        dweight if needed[1] else None,
        weight.new_zeros(weight.shape[0]) if needed[2] else None,
        dgamma.to(gamma.dtype) if needed[3] else None,
        dbeta.to(beta.dtype) if needed[4] else None,
        (dresidual if activation else dy) if needed[5] else None,
    )


def _differentiable_backward(ctx, dy, wanted):
    """Differentiate the two operators one after the other, so that the gradient has a gradient."""
    x, weight, gamma, beta, at, _, _, _, draw = ctx.saved_tensors
    boxes, weights, eps, activation, parameters = ctx.rest
    residual = ctx.has_residual
    if residual and activation:
        if not takes_output(activation):
            raise RuntimeError(
                f"leannorm.conv_batch_norm with a residual and {activation} has no second derivative: it does not keep "
                "the residual; use leannorm.fuse(model, convolution=False)"
            )
        # act' is piecewise constant: the mask stands for the activation.
        dy, activation, parameters = definition.activation_backward(dy, at, activation, parameters), "", ()
    u = convolution(x, weight.to(x.dtype), None, *ctx.convolution)
    y, _, _ = definition.batch_norm(u, gamma, beta, None, draw, boxes, weights, eps, activation, parameters)
    inputs = [x, weight, None, gamma, beta, None]
    needed = [i for i in range(6) if wanted[i] and inputs[i] is not None]
    found = torch.autograd.grad(y, [inputs[i] for i in needed], dy, create_graph=True)
    gradients: list[Tensor | None] = [None] * 6
    for i, gradient in zip(needed, found, strict=True):
        gradients[i] = gradient
    if wanted[2]:
        gradients[2] = weight.new_zeros(weight.shape[0])
    if wanted[5]:
        gradients[5] = dy
    return tuple(gradients)


_conv_batch_norm = eager.differentiable("conv_batch_norm", _setup_context, _backward, tensors=6)


def conv_batch_norm(x: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator of this name, with its derivative; give y, mean and var."""
    kernel = eager.kernel("conv_batch_norm", x)
    if kernel is None:
        y, mean, var, *_ = torch.ops.leannorm.conv_batch_norm(x, *others)
    else:
        y, mean, var, *_ = _conv_batch_norm(kernel, x, *others)
    return y, mean, var


def _refuse(ctx, *_):
    raise RuntimeError(
        "torch.ops.leannorm.conv_batch_norm_backward has no derivative; use leannorm.functional.conv_batch_norm, which "
        "has first and second derivatives"
    )


torch.library.register_autograd("leannorm::conv_batch_norm_backward", _refuse, lib=library)
