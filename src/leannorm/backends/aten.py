"""The readable reference of every operator, for any device and dtype. Legend: see `leannorm.ops.contract`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leannorm.ops import definition
from leannorm.ops.contract import library
from leannorm.ops.definition import per_channel, reduced_dimensions


def _like(x: Tensor, value: Tensor) -> Tensor:
    """Give value the dtype and layout of x, as the contract promises."""
    value = value.to(x.dtype)
    out = torch.empty_like(x)
    return value if value.stride() == out.stride() else out.copy_(value)


def _residual_gradient(x: Tensor, g: Tensor, dy: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    return g.clone() if g is dy else _like(x, g)


def batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters):
    """Compute the operator of this name; other back ends call it where they cannot serve."""
    y, mean, var = definition.batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters)
    return _like(x, y), mean, var


def _normalize(x, mean, var, weight, bias, residual, eps, activation, parameters):
    return _like(x, definition.normalize(x, mean, var, weight, bias, residual, eps, activation, parameters))


def _scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    return rstd if weight is None else rstd * weight.to(var.dtype)


def _gradient(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters) -> tuple[Tensor, Tensor]:
    """Give g = dy act'(z) and xhat in the accumulation dtype."""
    dtype = mean.dtype
    xhat = (x.to(dtype) - per_channel(mean, x)) * per_channel(torch.rsqrt(var + eps), x)
    g = dy.to(dtype)
    if not activation:
        return g, xhat
    if y is not None:
        return definition.activation_backward(g, y.to(dtype), activation, parameters), xhat
    z = xhat if weight is None else xhat * per_channel(weight.to(dtype), x)
    z = z if bias is None else z + per_channel(bias.to(dtype), x)
    z = z if residual is None else z + residual.to(dtype)
    return definition.activation_backward(g, z, activation, parameters), xhat


def _sums(g: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
    dimensions = reduced_dimensions(g)
    return (g * xhat).sum(dimensions), g.sum(dimensions)


def _exact_dx(g: Tensor, xhat: Tensor, scale: Tensor, sum_g_xhat: Tensor, sum_g: Tensor, count: Tensor | int) -> Tensor:
    return per_channel(scale, g) * (g - per_channel(sum_g / count, g) - xhat * per_channel(sum_g_xhat / count, g))


def _correct_(
    dx: Tensor,
    xhat: Tensor,
    scale: Tensor,
    sum_g_xhat: Tensor,
    sum_g: Tensor,
    draw: Tensor | None,
    boxes: Sequence[int],
    weights: Sequence[float],
) -> None:
    """Subtract scale w_i (sum_g + xhat_i sum_g_xhat) from the sampled elements, w_i each element's weight."""
    indices = definition.indices(dx, draw, boxes, read_draw=definition.reads_draw(dx))
    for index, weight in zip(indices, weights, strict=True):
        sample = xhat[index]
        share = weight * sample.shape[1] / sample.numel()
        correction = per_channel(scale * sum_g, sample) + sample * per_channel(scale * sum_g_xhat, sample)
        dx[index] = dx[index] - share * correction


def batch_norm_backward(
    dy,
    x,
    mean,
    var,
    weight,
    bias,
    residual,
    y,
    eps,
    activation,
    parameters,
    draw,
    boxes,
    weights,
    residual_gradient,
):
    """Compute the operator of this name; other back ends call it where they cannot serve."""
    g, xhat = _gradient(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters)
    scale = _scale(var, weight, eps)
    sum_g_xhat, sum_g = _sums(g, xhat)
    if boxes and x.numel():
        dx = per_channel(scale, x) * g
        _correct_(dx, xhat, scale, sum_g_xhat, sum_g, draw, boxes, weights)
    else:
        dx = _exact_dx(g, xhat, scale, sum_g_xhat, sum_g, max(1, x.numel() // max(1, x.shape[1])))
    return _like(x, dx), sum_g_xhat, sum_g, _residual_gradient(x, g, dy, residual_gradient)


def _backward_reduce(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters):
    return _sums(*_gradient(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters))


def _backward_apply(
    dy,
    x,
    mean,
    var,
    weight,
    bias,
    residual,
    y,
    eps,
    activation,
    parameters,
    sum_g_xhat,
    sum_g,
    count,
    residual_gradient,
):
    g, xhat = _gradient(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters)
    dx = _exact_dx(g, xhat, _scale(var, weight, eps), sum_g_xhat, sum_g, count)
    return _like(x, dx), _residual_gradient(x, g, dy, residual_gradient)


def _backward_fused(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient):
    g, xhat = _gradient(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters)
    dx = per_channel(_scale(var, weight, eps), x) * g
    return _like(x, dx), *_sums(g, xhat), _residual_gradient(x, g, dy, residual_gradient)


def _correct(dx, x, mean, var, weight, sum_g_xhat, sum_g, eps, draw, boxes, weights):
    corrected = dx.to(mean.dtype, copy=True)
    if x.numel():
        xhat = (x.to(mean.dtype) - per_channel(mean, x)) * per_channel(torch.rsqrt(var + eps), x)
        _correct_(corrected, xhat, _scale(var, weight, eps), sum_g_xhat, sum_g, draw, boxes, weights)
    return _like(x, corrected)


kernels = {  # other back ends call them where they cannot serve
    "batch_norm": batch_norm,
    "batch_norm_backward": batch_norm_backward,
    "moments": definition.moments,
    "normalize": _normalize,
    "backward_reduce": _backward_reduce,
    "backward_apply": _backward_apply,
    "backward_fused": _backward_fused,
    "correct": _correct,
    "snapshot": torch.clone,
}
for _name, _kernel in kernels.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
