"""act(conv(x, W) + b + residual) in one call of what torch has inside, or of its plain convolution.

The operators with which torch's own compiler computes it are private: they may change or go. So each is tried once on
small tensors of the device, dtype and kind in question, and taken only where it gives what plain operators give.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leannorm.ops.conv_batch_norm import convolution, memory_format


@dataclass(frozen=True)
class Convolution:
    """A convolution's settings, one number a spatial dimension; none for a linear layer. Padding is with zeros."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    settings: Convolution,
    activation: str,
    parameters: Sequence[float],
) -> Tensor:
    """Compute y = act(conv(x, weight) + bias + residual), act being a kind that `takes_output` knows, or "".

    Args:
        x: the input.
        weight: of x's dtype.
        bias: (C,) in the accumulation dtype, in which it is added where the operator allows.
        residual: of y's shape and x's dtype, or None.
        settings: the convolution's.
        activation: the kind.
        parameters: the activation's.
    """
    operator = _OPERATORS.get(x.device.type)
    dimensions = len(settings.stride)
    if operator and _serves(operator, x.device.type, x.dtype, dimensions, residual is not None, activation):
        form = memory_format(x, weight)
        x = x.contiguous(memory_format=form)
        residual = None if residual is None else residual.contiguous(memory_format=form)
        return operator(x, weight, bias, residual, settings, activation, parameters)
    if residual is None and not activation:
        return _convolution(x, weight, bias.to(x.dtype), settings)
    y = activated(x, weight, bias, None, settings, "", ())
    return _activate_(y if residual is None else y.add_(residual), activation, parameters)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Convolution) -> Tensor:
    return convolution(x, weight, bias, settings.stride, settings.padding, settings.dilation, settings.groups)


def _activate_(y: Tensor, activation: str, parameters: Sequence[float]) -> Tensor:
    match activation:
        case "relu":
            return y.relu_()
        case "clamp":
            return F.hardtanh_(y, *parameters)
        case "leaky_relu":
            return F.leaky_relu_(y, *parameters)
    assert not activation
    return y


_ONEDNN = {"": "none", "relu": "relu", "clamp": "hardtanh", "leaky_relu": "leaky_relu"}


def _onednn(x, weight, bias, residual, settings, activation, parameters) -> Tensor:
    operator, kind = torch.ops.mkldnn._convolution_pointwise, _ONEDNN[activation]
    places = settings.padding, settings.stride, settings.dilation, settings.groups
    if residual is None:
        return operator(x, weight, bias, *places, kind, list(parameters), "")
    bias, unary = bias.to(x.dtype), kind if activation else None
    return operator.binary(x, residual, weight, bias, *places, "add", 1.0, unary, list(parameters), "")


def _cudnn(x, weight, bias, residual, settings, activation, parameters) -> Tensor:
    if activation != "relu":
        raise NotImplementedError("cuDNN's fused convolution ends in a ReLU")
    places = settings.stride, settings.padding, settings.dilation, settings.groups
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias.to(x.dtype), *places)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias.to(x.dtype), *places)


_Operator = Callable[..., Tensor]
_OPERATORS: dict[str, _Operator] = {"cpu": _onednn, "cuda": _cudnn}


@functools.cache
def _serves(
    operator: _Operator, device: str, dtype: torch.dtype, dimensions: int, residual: bool, activation: str
) -> bool:
    """Try an operator: whether it gives what plain operators do."""
    if not dimensions:
        return False
    settings = Convolution((1,) * dimensions, (1,) * dimensions, (1,) * dimensions)
    shapes = [(2, 8, *(5,) * dimensions), (8, 8, *(3,) * dimensions), (8,), (2, 8, *(5,) * dimensions)]
    parameters = {"clamp": (-0.5, 0.75), "leaky_relu": (0.2,)}.get(activation, ())
    x, weight, bias, other = (torch.linspace(-1, 1, math.prod(shape)).view(shape) for shape in shapes)
    x, weight, other = (t.to(device, dtype) for t in (x, weight, other))
    bias = bias.to(device, torch.float32)
    try:
        found = operator(x, weight, bias, other if residual else None, settings, activation, parameters)
        y = _convolution(x, weight, bias.to(dtype), settings)
        expected = _activate_(y.add_(other) if residual else y, activation, parameters)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    return found.shape == expected.shape and (found - expected).abs().max().item() <= tolerance
