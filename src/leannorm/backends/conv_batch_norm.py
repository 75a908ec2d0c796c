"""The convolution folded with its batch norm while training, for any device and dtype.

The steps are apart so that processes can share what each computes: `sampled` and `pooled` give the moments before
the convolution runs; backward sums twice, before and after the filters' gradient. Legend: see
`leannorm.ops.conv_batch_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from leannorm.backends.activated_convolution import Convolution, activated
from leannorm.backends.choice import takes
from leannorm.backends.cpu import convolution as native
from leannorm.backends.sampled_windows import Window, windows
from leannorm.ops import definition, eager
from leannorm.ops.contract import accumulation_dtype, library, takes_output
from leannorm.ops.conv_batch_norm import convolution, memory_format, sampled_elements
from leannorm.ops.definition import per_channel, reduced_dimensions


def sampled(taken: Sequence[Window], weight: Tensor, groups: int) -> list[Tensor]:
    """Give for each region the convolution at its positions, (m, C)."""
    samples = []
    for window in taken:
        u = convolution(window.crop, weight, None, window.stride, window.padding, window.dilation, groups)
        samples.append(u.movedim(1, -1).contiguous().view(-1, u.shape[1]))
    return samples


def pooled(samples: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the mixture of the regions."""
    dtype = accumulation_dtype(samples[0].dtype)
    pairs = [_moments(sample.to(dtype)) for sample in samples]
    if len(pairs) == 1:
        return pairs[0]
    mean, var = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
    for weight, (one, _) in zip(weights, pairs, strict=True):
        mean += weight * one
    for weight, (one, within) in zip(weights, pairs, strict=True):
        var += weight * (within + (one - mean) ** 2)
    return mean, var


def _moments(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each column."""
    if not _on_host(sample):
        var, mean = torch.var_mean(sample, 0, correction=0)
        return mean, var
    mean = sample.mean(0)  # these steps take a fraction of what torch.var_mean does
    centred = sample - mean
    rest = centred.mean(0)  # of rounding
    return mean + rest, torch.addcmul(centred.square_().mean(0), rest, rest, value=-1).clamp_(min=0)


def _scale(var: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    return rstd if gamma is None else rstd * gamma.to(var.dtype)


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Give a W, rounded as the convolution takes it."""
    scaled = weight.to(scale.dtype) * scale.view(-1, *(1,) * (weight.ndim - 1))
    return scaled.to(dtype)


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _rounds(x: Tensor) -> bool:
    """Whether the convolution of x rounds a W more coarsely than the statistics are computed."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return True
    if x.dtype != torch.float32:
        return False
    backend = {"cuda": torch.backends.cudnn, "cpu": torch.backends.mkldnn}.get(x.device.type)
    return backend is not None and backend.conv.fp32_precision in ("tf32", "bf16")


def _conv_batch_norm(
    x, weight, conv_bias, gamma, beta, residual, stride, padding, dilation, groups, draw, boxes, weights, eps,
    activation, parameters,
):  # fmt: skip
    plan = native.plan(x, weight, stride, padding, dilation, groups, draw, boxes, weights)
    if plan is not None:
        return native.conv_batch_norm(
            plan, x, weight, gamma, beta, residual, stride, padding, dilation, draw, boxes, eps, activation, parameters
        )
    settings = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    taken = windows(x, weight.shape[2:], settings, draw, boxes, read_draw=_on_host(x))
    samples = sampled(taken, weight.to(x.dtype), groups)
    mean, var = pooled(samples, weights)
    scale = _scale(var, gamma, eps)
    scaled = _scaled(weight, scale, x.dtype)
    offset = pooled(sampled(taken, scaled, groups), weights)[0] if _rounds(x) else scale * mean
    shift = -offset if beta is None else beta.to(offset.dtype) - offset
    sample = samples[0] if len(samples) == 1 else torch.cat(samples)
    form = memory_format(x, weight)
    if not activation or takes_output(activation):
        y = activated(x, scaled, shift, residual, settings, activation, parameters)
        return y.contiguous(memory_format=form), mean, var, sample, x.new_empty(0)
    z = activated(x, scaled, shift, residual, settings, "", ()).contiguous(memory_format=form)
    return definition.activate(z, activation, parameters), mean, var, sample, z


def _conv_batch_norm_backward(
    dy, x, weight, gamma, at, mean, var, sample, stride, padding, dilation, groups, draw, boxes, weights, eps,
    activation, parameters, input_gradient, residual_gradient, in_place=False,
):  # fmt: skip
    plan = native.plan(x, weight, stride, padding, dilation, groups, draw, boxes, weights)
    if plan is not None:
        return native.conv_batch_norm_backward(
            plan, dy, x, weight, gamma, at, mean, var, sample, draw, eps, activation, parameters, input_gradient,
            residual_gradient,
        )  # fmt: skip
    settings = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    g, sum_g = _through_activation(dy, at, activation, parameters, memory_format(x, weight), in_place)
    scale, rstd = _scale(var, gamma, eps), torch.rsqrt(var + eps)
    scaled = _scaled(weight, scale, x.dtype)

    indices = list(definition.indices(g, draw, boxes, read_draw=_on_host(g)))
    counts = sampled_elements(boxes, g.ndim - 1)
    shares = [weight / count for weight, count in zip(weights, counts, strict=True)]  # of each sampled element
    before = [g[index].clone() for index in indices] if residual_gradient else []
    sum_of_centred = sum_g
    for index, share in zip(indices, shares, strict=True):
        # the sum is zero but for rounding, which a large mean makes felt
        part = g[index].to(mean.dtype, copy=True)
        g[index] = (part - per_channel(share * sum_g, g)).to(g.dtype)
        sum_of_centred = sum_of_centred - (part - g[index].to(mean.dtype)).sum(reduced_dimensions(part))
    centred = _filters_gradient(g, x, scaled, settings).to(mean.dtype)
    product = (weight.to(mean.dtype) * centred).flatten(1).sum(1)
    sum_g_xhat = (product - mean * sum_of_centred) * rstd

    rows = (-1, *(1,) * (weight.ndim - 1))
    corrected = centred
    taken = windows(x, weight.shape[2:], settings, draw, boxes, read_draw=_on_host(x))
    parts = ((sample.to(mean.dtype) - mean) * rstd).split(counts)
    for index, share, window, xhat in zip(indices, shares, taken, parts, strict=True):
        shape = g[index].movedim(1, -1).shape
        xhat = xhat.view(shape).movedim(-1, 1)
        g[index] = (g[index] - xhat * per_channel(share * sum_g_xhat, g)).to(g.dtype)
        # the root of the count is in both factors, so that no dtype overflows or loses bits
        root = math.sqrt(xhat.numel() // xhat.shape[1])
        places = Convolution(window.stride, window.padding, window.dilation, groups)
        found = _filters_gradient((xhat / root).to(x.dtype), window.crop, scaled, places)
        corrected = torch.addcmul(corrected, found.to(mean.dtype), sum_g_xhat.view(rows), value=-share * root)
    dx = _input_gradient(g, x, scaled, settings) if input_gradient else x.new_empty(0)
    for index, part in zip(indices, before, strict=False):
        g[index] = part
    return (
        dx if not input_gradient or _in_order(dx, x) else torch.empty_like(x).copy_(dx),
        torch.empty_like(weight).copy_(scale.view(rows) * corrected),
        sum_g_xhat,
        sum_g,
        g if residual_gradient else x.new_empty(0),
    )


def _in_order(dx: Tensor, x: Tensor) -> bool:
    return dx.stride() == torch.empty_like(x, device="meta").stride()


def _through_activation(
    dy: Tensor,
    at: Tensor | None,
    activation: str,
    parameters: Sequence[float],
    form: torch.memory_format,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Give g = dy act'(z), in memory of its own or of dy, and the sums of what it was rounded to."""
    at = dy if at is None else at
    if at.dtype is torch.float32 and takes(at):  # one pass: backward of a batch norm whose mean is 0 and variance 1
        zeros = at.new_zeros(at.shape[1])
        y = at if takes_output(activation) else None
        point = zeros, torch.ones_like(zeros), None, None, None, y, 0.0, activation, parameters
        name = "backward_fused_in_place" if in_place else "backward_fused"
        backward = eager.kernel(name, at, dy) or torch.ops.leannorm.backward_fused
        g, _, sum_g, _ = backward(dy, at, *point, False)
        return g.contiguous(memory_format=form), sum_g
    g = definition.activation_backward(dy, at, activation, parameters) if activation else dy
    g = g.clone(memory_format=form) if g is dy else g.contiguous(memory_format=form)
    return g, g.sum(reduced_dimensions(g), dtype=accumulation_dtype(g.dtype))


def _filters_gradient(g: Tensor, x: Tensor, weight: Tensor, settings: Convolution) -> Tensor:
    if not settings.stride:
        return g.T @ x
    return _convolution_backward(g, x, weight, settings, [False, True, False])[1]


def _input_gradient(g: Tensor, x: Tensor, weight: Tensor, settings: Convolution) -> Tensor:
    if not settings.stride:
        return g @ weight
    return _convolution_backward(g, x, weight, settings, [True, False, False])[0]


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, settings: Convolution, mask: list[bool]):
    return torch.ops.aten.convolution_backward(
        g, x, weight, [0], settings.stride, settings.padding, settings.dilation, False, [0] * len(settings.stride),
        settings.groups, mask,
    )  # fmt: skip


for _name, _kernel in (
    ("conv_batch_norm", _conv_batch_norm),
    ("conv_batch_norm_backward", _conv_batch_norm_backward),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    for _device in ("cpu", "cuda"):
        eager.provide(_name, _kernel, _device)
eager.provide("conv_batch_norm_backward_in_place", partial(_conv_batch_norm_backward, in_place=True), "cpu")
