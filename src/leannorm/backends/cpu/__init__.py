"""Native CPU kernels of the two fused operators; whatever they do not take goes to the ATen back end, call by call.

The extension ``_kernels`` is built at install; without a compiler there is none, and ATen serves everything.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from leannorm.backends import aten
from leannorm.ops.contract import library, takes_output

_kernels: Any = None
_missing = ""
try:
    _kernels = importlib.import_module("leannorm.backends.cpu._kernels")
except ImportError as error:
    _missing = f"the extension leannorm.backends.cpu._kernels was not built or does not load ({error})"

available = _kernels is not None

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_BOUND = float("nan")
_KINDS = {  # kind, number, parameters that the kernels see
    "": (0, (_NO_BOUND, _NO_BOUND)),
    "relu": (0, (0.0, _NO_BOUND)),
    "clamp": (0, None),
    "leaky_relu": (1, None),
    "silu": (2, ()),
    "hardswish": (3, ()),
    "gelu": (4, ()),
    "gelu_tanh": (5, ()),
}


def why_not(x: Tensor) -> str | None:
    """Give the reason why the native kernels do not take a call on this input, or None where they do."""
    if _kernels is None:
        return f"{_missing}; install again where a C++ compiler is found"
    if x.device.type != "cpu":
        return f"the native kernels are for the CPU, the input is on {x.device}"
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return f"the native kernels read memory, which a {type(x).__name__} may not have"
    if x.dtype not in _DTYPES:
        return f"the native kernels take float32, bfloat16 and float16, the input is {x.dtype}"
    if x.numel() == 0:
        return "the input is empty"
    if _channels_last(x) is None and _channels_last(torch.empty_like(x, device="meta")) is None:
        return f"the input's memory order is neither contiguous nor channels-last, its strides are {x.stride()}"
    return None


def _channels_last(x: Tensor) -> bool | None:
    """Whether the channels come last in memory, or None for an order that the kernels do not know."""
    if x.is_contiguous():
        return x.numel() == x.shape[0] * x.shape[1]
    return True if x.movedim(1, -1).is_contiguous() else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _per_channel(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def _like(x: Tensor, other: Tensor) -> Tensor:
    """Give other in x's memory order."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)


def _maybe_like(x: Tensor, other: Tensor | None) -> Tensor | None:
    return None if other is None else _like(x, other)


def _activation(kind: str, parameters: list[float]) -> tuple[int, float, float]:
    number, fixed = _KINDS[kind]
    first, second = (*(parameters if fixed is None else fixed), 0.0, 0.0)[:2]
    return number, first, second


def _batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters):
    if why_not(x) is not None:
        return aten.batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters)
    y = torch.empty_like(x)
    x, residual, weight, bias = _like(y, x), _maybe_like(y, residual), _per_channel(weight), _per_channel(bias)
    mean, var = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    _kernels.batch_norm(
        _DTYPES[x.dtype], _channels_last(y), x.shape[1], [x.shape[0], *x.shape[2:]],
        _address(x), _address(residual), _address(y), _address(weight), _address(bias), _address(mean), _address(var),
        _address(draw), boxes, weights, eps, *_activation(activation, parameters),
    )  # fmt: skip
    return y, mean, var


def _batch_norm_backward(
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
    without_output = takes_output(activation) and residual is not None and y is None  # no layer calls it so
    if without_output or why_not(x) is not None:
        return aten.batch_norm_backward(
            dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, draw, boxes, weights,
            residual_gradient,
        )  # fmt: skip
    dx = torch.empty_like(x)
    x, dy, residual, y = _like(dx, x), _like(dx, dy), _maybe_like(dx, residual), _maybe_like(dx, y)
    weight, bias = _per_channel(weight), _per_channel(bias)
    dresidual = torch.empty_like(dx) if residual_gradient else None
    sum_g_xhat, sum_g = torch.empty_like(mean), torch.empty_like(mean)
    _kernels.batch_norm_backward(
        _DTYPES[x.dtype], _channels_last(dx), x.shape[1], [x.shape[0], *x.shape[2:]],
        _address(dy), _address(x), _address(residual), _address(y), _address(dx), _address(dresidual),
        _address(weight), _address(bias), _address(mean), _address(var), _address(sum_g_xhat), _address(sum_g),
        _address(draw), boxes, weights, eps, *_activation(activation, parameters),
    )  # fmt: skip
    return dx, sum_g_xhat, sum_g, x.new_empty(0) if dresidual is None else dresidual


if available:
    library.impl("batch_norm", _batch_norm, "CPU")
    library.impl("batch_norm_backward", _batch_norm_backward, "CPU")
