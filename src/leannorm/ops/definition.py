"""The forward operators written with differentiable torch functions: what the contract means.

The ATen back end computes with these; autograd uses them for second derivatives. Legend: see `leannorm.ops.contract`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leannorm.ops.contract import accumulation_dtype

Index = tuple[slice | Tensor, ...]


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """View a (C,) tensor so that it broadcasts over (N, C, *spatial)."""
    return v.view(-1, *(1,) * (like.ndim - 2))


def reduced_dimensions(x: Tensor) -> list[int]:
    """All dimensions but the channels."""
    return [0, *range(2, x.ndim)]


def activate(z: Tensor, activation: str, parameters: Sequence[float]) -> Tensor:
    """Apply an activation by its kind."""
    match activation:
        case "":
            return z
        case "relu":
            return F.relu(z)
        case "clamp":
            return F.hardtanh(z, parameters[0], parameters[1])
        case "leaky_relu":
            return F.leaky_relu(z, parameters[0])
        case "silu":
            return F.silu(z)
        case "hardswish":
            return F.hardswish(z)
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
    raise ValueError(f"unknown activation kind {activation!r}")


def activation_backward(g: Tensor, at: Tensor, activation: str, parameters: Sequence[float]) -> Tensor:
    """Multiply g by act'(z); ``at`` is z, or y = act(z) where `contract.takes_output` allows it."""
    aten = torch.ops.aten
    match activation:
        case "":
            return g
        case "relu":
            return aten.threshold_backward(g, at, 0)
        case "clamp":
            return aten.hardtanh_backward(g, at, *parameters)
        case "leaky_relu":
            return aten.leaky_relu_backward(g, at, *parameters, False)
        case "silu":
            return aten.silu_backward(g, at)
        case "hardswish":
            return aten.hardswish_backward(g, at)
        case "gelu":
            return aten.gelu_backward(g, at)
        case "gelu_tanh":
            return aten.gelu_backward(g, at, approximate="tanh")
    raise ValueError(f"unknown activation kind {activation!r}")


def activation_backward_by_signs(
    g: Tensor, signs: Tensor, strides: Sequence[int], activation: str, parameters: Sequence[float]
) -> Tensor:
    """Multiply g by act'(z) as the signs tell it of an output with these strides; see `leannorm.ops.contract`."""
    bits = signs[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=g.device)).bitwise_and(1)
    is_one = bits.flatten().bool().as_strided(g.shape, strides)
    return torch.where(is_one, g, g * parameters[0] if activation == "leaky_relu" else 0)


def indices(x: Tensor, draw: Tensor | None, boxes: Sequence[int], *, read_draw: bool) -> Iterator[Index]:
    """Give for each region the index of its elements in x.

    Args:
        x: the tensor that is indexed.
        draw: the random integers, or None.
        boxes: the regions.
        read_draw: read ``draw`` on the host and index with slices (views); else index with tensors and never wait for
            the device.
    """
    dimensions = reduced_dimensions(x)
    drawn = draw.tolist() if read_draw and draw is not None else draw
    for r in range(len(boxes) // (4 * len(dimensions))):
        index: list[slice | Tensor] = [slice(None)] * x.ndim
        for k, d in enumerate(dimensions):
            at = r * len(dimensions) + k
            start, span, count, step = boxes[4 * at : 4 * at + 4]
            if read_draw or drawn is None:
                if drawn is not None:
                    start += drawn[at] % span
                index[d] = slice(start, start + (count - 1) * step + 1, step)
            else:
                positions = start + drawn[at] % span + step * torch.arange(count, device=x.device)
                index[d] = positions.view(-1, *(1,) * (x.ndim - 1 - d))
        if any(isinstance(i, Tensor) for i in index):
            index[1] = torch.arange(x.shape[1], device=x.device).view(-1, *(1,) * (x.ndim - 2))
        yield tuple(index)


def reads_draw(x: Tensor) -> bool:
    """Whether the host may read what places the regions of x: it waits for no device, and no compiler looks on."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def moments(x: Tensor, draw: Tensor | None, boxes: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the mixture of the regions; zeros for an empty tensor."""
    dtype, dimensions = accumulation_dtype(x.dtype), reduced_dimensions(x)
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1], dtype=dtype)
        return zeros, zeros.clone()
    if not boxes:
        var, mean = torch.var_mean(x.to(dtype), dimensions, correction=0)
        return mean, var
    samples = [x[i].to(dtype) for i in indices(x, draw, boxes, read_draw=reads_draw(x))]
    pairs = [torch.var_mean(sample, dimensions, correction=0) for sample in samples]
    if len(pairs) == 1:
        return pairs[0][1], pairs[0][0]
    mean = sum(w * m for w, (_, m) in zip(weights, pairs, strict=True))
    var = sum(w * (v + (m - mean) ** 2) for w, (v, m) in zip(weights, pairs, strict=True))
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    parameters: Sequence[float],
) -> Tensor:
    """Compute y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)."""
    dtype = mean.dtype
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    z = (x.to(dtype) - per_channel(mean, x)) * per_channel(scale, x)
    return transform(z, None, bias, residual, activation, parameters).to(x.dtype)


def transform(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    parameters: Sequence[float],
) -> Tensor:
    """Compute act(weight z + bias + residual) in the dtype of z."""
    if weight is not None:
        z = z * per_channel(weight.to(z.dtype), z)
    if bias is not None:
        z = z + per_channel(bias.to(z.dtype), z)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return activate(z, activation, parameters)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    draw: Tensor | None,
    boxes: Sequence[int],
    weights: Sequence[float],
    eps: float,
    activation: str,
    parameters: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x with the moments of its regions."""
    mean, var = moments(x, draw, boxes, weights)
    return normalize(x, mean, var, weight, bias, residual, eps, activation, parameters), mean, var
