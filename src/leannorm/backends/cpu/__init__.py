"""Native CPU kernels of the fused operators; whatever they do not take goes to the ATen back end, call by call.

The extension ``_kernels`` is built at install; without a compiler there is none, and ATen serves everything.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leannorm.backends import aten
from leannorm.backends.memory import in_order_of, is_channels_last
from leannorm.ops import eager
from leannorm.ops.contract import takes_output

_kernels: Any = None
_missing = ""
try:
    _kernels = importlib.import_module("leannorm.backends.cpu._kernels")
except ImportError as error:
    _missing = f"the extension leannorm.backends.cpu._kernels was not built or does not load ({error})"

available = _kernels is not None

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN = (Tensor, torch.nn.Parameter)
_KINDS = ("", "relu", "clamp", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh")  # as the kernels count them


def why_not(x: Tensor) -> str | None:
    """Give the reason why the native kernels do not take a call on this input, or None where they do."""
    if _kernels is None:
        return f"{_missing}; install again where a C++ compiler is found"
    if x.device.type != "cpu":
        return f"the native kernels are for the CPU, the input is on {x.device}"
    if type(x) not in _PLAIN:
        return f"the native kernels read memory, which a {type(x).__name__} may not have"
    if x.dtype not in _DTYPES:
        return f"the native kernels take float32, bfloat16 and float16, the input is {x.dtype}"
    if x.numel() == 0:
        return "the input is empty"
    if is_channels_last(torch.empty_like(x, device="meta")) is None:
        return f"the input's memory order is neither contiguous nor channels-last, its strides are {x.stride()}"
    return None


def takes(x: Tensor) -> bool:
    """Say whether `why_not` has no reason, quicker."""
    plain = available and x.dtype in _DTYPES and type(x) in _PLAIN and x.device.type == "cpu"
    return plain and _takes_order(x.shape, x.stride())


@lru_cache(maxsize=4096)
def _takes_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return (
        0 not in shape
        and is_channels_last(torch.empty_like(torch.empty_strided(shape, strides, device="meta"))) is not None
    )


@lru_cache(maxsize=4096)
def _plan(
    shape: Sequence[int], strides: Sequence[int], boxes: Sequence[int], weights: Sequence[float], drawn: bool
) -> Any:
    """Make the kernels' plan for tensors of this shape and these strides, or None where they have none."""
    order = is_channels_last(torch.empty_strided(shape, strides, device="meta"))
    if order is None or 0 in shape:
        return None
    return _kernels.Plan(order, shape[1], [shape[0], *shape[2:]], list(boxes), list(weights), drawn)


def _plan_for(x: Tensor, like: Tensor, draw: Tensor | None, boxes: Sequence[int], weights: Sequence[float]) -> Any:
    if x.dtype not in _DTYPES or type(x) not in _PLAIN:
        return None
    return _plan(like.shape, like.stride(), tuple(boxes), tuple(weights), draw is not None)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _per_channel(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def _maybe_like(x: Tensor, other: Tensor | None) -> Tensor | None:
    return None if other is None else in_order_of(x, other)


def _activation(kind: str, parameters: Sequence[float]) -> tuple[int, float, float]:
    first, second = (*parameters, 0.0, 0.0)[:2]
    return _KINDS.index(kind), first, second


def _batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters):
    y = torch.empty_like(x)
    plan = _plan_for(x, y, draw, boxes, weights)
    if plan is None:
        return aten.batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters)
    x, residual, weight, bias = in_order_of(y, x), _maybe_like(y, residual), _per_channel(weight), _per_channel(bias)
    mean, var = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    plan.batch_norm(
        _DTYPES[x.dtype], _address(x), _address(residual), _address(y), _address(weight), _address(bias),
        _address(mean), _address(var), _address(draw), eps, *_activation(activation, parameters),
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
    dx = torch.empty_like(x)
    plan = None if without_output else _plan_for(x, dx, draw, boxes, weights)
    if plan is None:
        return aten.batch_norm_backward(
            dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, draw, boxes, weights,
            residual_gradient,
        )  # fmt: skip
    x, dy, residual, y = in_order_of(dx, x), in_order_of(dx, dy), _maybe_like(dx, residual), _maybe_like(dx, y)
    weight, bias = _per_channel(weight), _per_channel(bias)
    dresidual = torch.empty_like(dx) if residual_gradient else None
    sum_g_xhat, sum_g = torch.empty_like(mean), torch.empty_like(mean)
    plan.batch_norm_backward(
        _DTYPES[x.dtype], _address(dy), _address(x), _address(residual), _address(y), _address(dx), _address(dresidual),
        _address(weight), _address(bias), _address(mean), _address(var), _address(sum_g_xhat), _address(sum_g),
        _address(draw), eps, *_activation(activation, parameters),
    )  # fmt: skip
    return dx, sum_g_xhat, sum_g, x.new_empty(0) if dresidual is None else dresidual


def _normalize(x, mean, var, weight, bias, residual, eps, activation, parameters):
    y = torch.empty_like(x)
    plan = _plan_for(x, y, None, (), ())
    if plan is None:
        return aten.kernels["normalize"](x, mean, var, weight, bias, residual, eps, activation, parameters)
    x, residual, weight, bias = in_order_of(y, x), _maybe_like(y, residual), _per_channel(weight), _per_channel(bias)
    mean, var = _per_channel(mean), _per_channel(var)
    plan.normalize(
        _DTYPES[x.dtype], _address(x), _address(residual), _address(y), _address(weight), _address(bias),
        _address(mean), _address(var), 0, eps, *_activation(activation, parameters),
    )  # fmt: skip
    return y


def _backward_fused(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient):
    without_output = takes_output(activation) and residual is not None and y is None
    dx = torch.empty_like(x)
    plan = None if without_output else _plan_for(x, dx, None, (), ())
    if plan is None:
        return aten.kernels["backward_fused"](
            dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient
        )
    x, dy, residual, y = in_order_of(dx, x), in_order_of(dx, dy), _maybe_like(dx, residual), _maybe_like(dx, y)
    weight, bias, mean, var = _per_channel(weight), _per_channel(bias), _per_channel(mean), _per_channel(var)
    dresidual = torch.empty_like(dx) if residual_gradient else None
    sum_g_xhat, sum_g = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    plan.backward_fused(
        _DTYPES[x.dtype], _address(dy), _address(x), _address(residual), _address(y), _address(dx), _address(dresidual),
        _address(weight), _address(bias), _address(mean), _address(var), _address(sum_g_xhat), _address(sum_g),
        0, eps, *_activation(activation, parameters),
    )  # fmt: skip
    return dx, sum_g_xhat, sum_g, x.new_empty(0) if dresidual is None else dresidual


if available:
    eager.register("batch_norm", _batch_norm, "cpu")
    eager.register("batch_norm_backward", _batch_norm_backward, "cpu")
    eager.register("normalize", _normalize, "cpu")
    eager.register("backward_fused", _backward_fused, "cpu")
