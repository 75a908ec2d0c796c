"""Native CPU kernels of the fused operators; whatever they do not take goes to the ATen back end, call by call.

The extension ``_kernels`` is built at install; without a compiler there is none, and ATen serves everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from leannorm.backends import aten
from leannorm.backends.cpu import extension
from leannorm.backends.cpu.extension import DTYPES, activation_code, addresses, empty_like, per_channel
from leannorm.backends.memory import PLAIN, are_plain_statistics, is_channels_last
from leannorm.ops import eager
from leannorm.ops.contract import takes_output

_kernels, _missing = extension.kernels, extension.missing
available = _kernels is not None

_is_cpu = attrgetter("is_cpu")


def why_not(x: Tensor) -> str | None:
    """Give the reason why the native kernels do not take a call on this input, or None where they do."""
    if _kernels is None:
        return f"{_missing}; install again where a C++ compiler is found"
    if x.device.type != "cpu":
        return f"the native kernels are for the CPU, the input is on {x.device}"
    if type(x) not in PLAIN:
        return f"the native kernels read memory, which a {type(x).__name__} may not have"
    if x.dtype not in DTYPES:
        return f"the native kernels take float32, bfloat16 and float16, the input is {x.dtype}"
    if x.numel() == 0:
        return "the input is empty"
    if is_channels_last(torch.empty_like(x, device="meta")) is None:
        return f"the input's memory order is neither contiguous nor channels-last, its strides are {x.stride()}"
    return None


def takes(x: Tensor) -> bool:
    """Say whether `why_not` has no reason, quicker."""
    plain = available and x.dtype in DTYPES and type(x) in PLAIN and x.device.type == "cpu"
    return plain and _takes_order(x.shape, x.stride())


@lru_cache(maxsize=4096)
def _takes_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    order = is_channels_last(torch.empty_strided(shape, _strides_like(shape, strides), device="meta"))
    return 0 not in shape and order is not None


class _Work(NamedTuple):
    """What calls on tensors of one shape and memory order share: the kernels' plan, and how results lie in memory."""

    plan: Any
    strides: tuple[int, ...]
    sign_bytes: int


@lru_cache(maxsize=4096)
def _work(
    shape: Sequence[int], strides: Sequence[int], boxes: Sequence[int], weights: Sequence[float], drawn: bool
) -> _Work | None:
    strides = _strides_like(shape, strides)
    order = is_channels_last(torch.empty_strided(shape, strides, device="meta"))
    if order is None or 0 in shape:
        return None
    plan = _kernels.Plan(order, shape[1], [shape[0], *shape[2:]], list(boxes), list(weights), drawn)
    return _Work(plan, tuple(strides), plan.sign_bytes())


def _work_on(x: Tensor, draw: Tensor | None, boxes: Sequence[int], weights: Sequence[float]) -> _Work | None:
    """Give what the kernels know of this input, or None where they do not take it."""
    if x.dtype not in DTYPES or type(x) not in PLAIN:
        return None
    return _work(x.shape, x.stride(), tuple(boxes), tuple(weights), draw is not None)


def _strides_like(shape: Sequence[int], strides: Sequence[int]) -> Sequence[int]:
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def _in_order(tensor: Tensor, work: _Work) -> Tensor:
    if tensor.stride() == work.strides:
        return tensor
    return torch.empty_strided(tensor.shape, work.strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters, with_signs=False):
    work = _work_on(x, draw, boxes, weights)
    if work is None:
        return aten.batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters)
    y = empty_like(x, work.strides)
    mean, var = x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)
    signs = x.new_empty(work.sign_bytes, dtype=torch.uint8) if with_signs and work.sign_bytes else None
    operator = work.plan.batch_norm
    _forward(operator, work, x, y, mean, var, weight, bias, residual, signs, draw, eps, activation, parameters)
    return (y, mean, var) if signs is None else (y, mean, var, signs)


def _normalize(x, mean, var, weight, bias, residual, eps, activation, parameters):
    work = _work_on(x, None, (), ())
    if work is None:
        return aten.kernels["normalize"](x, mean, var, weight, bias, residual, eps, activation, parameters)
    y, operator = empty_like(x, work.strides), work.plan.normalize
    mean, var = per_channel(mean), per_channel(var)
    _forward(operator, work, x, y, mean, var, weight, bias, residual, None, None, eps, activation, parameters)
    return y


def _forward(operator, work, x, y, mean, var, weight, bias, residual, signs, draw, eps, activation, parameters):
    x, residual = _in_order(x, work), None if residual is None else _in_order(residual, work)
    weight, bias = per_channel(weight), per_channel(bias)
    places = addresses(x, residual, y, signs, weight, bias, mean, var, draw)
    operator(DTYPES[x.dtype], *places, eps, *activation_code(activation, tuple(parameters)))


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
    in_place=False,
):
    work = _work_on(x, draw, boxes, weights)
    if work is None or _lacks_output(residual, y, activation):
        return aten.batch_norm_backward(
            dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, draw, boxes, weights,
            residual_gradient,
        )  # fmt: skip
    corrects_dx = x.dtype is torch.float32 or not boxes  # else dx is made anew from dy at the sampled elements
    return _backward(
        work.plan.batch_norm_backward, work, dy, x, mean, var, weight, bias, residual, y, draw, eps, activation,
        parameters, residual_gradient, in_place and corrects_dx,
    )  # fmt: skip


def _backward_fused(
    dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient, in_place=False
):
    work = _work_on(x, None, (), ())
    if work is None or _lacks_output(residual, y, activation):
        return aten.kernels["backward_fused"](
            dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient
        )
    mean, var = per_channel(mean), per_channel(var)
    return _backward(
        work.plan.backward_fused, work, dy, x, mean, var, weight, bias, residual, y, None, eps, activation, parameters,
        residual_gradient, in_place,
    )  # fmt: skip


def _lacks_output(residual: Tensor | None, y: Tensor | None, activation: str) -> bool:
    return takes_output(activation) and residual is not None and y is None  # no layer calls it so


def _backward(
    operator, work, dy, x, mean, var, weight, bias, residual, y, draw, eps, activation, parameters, residual_gradient,
    in_place,
):  # fmt: skip
    signs = y if y is not None and y.dtype is torch.uint8 else None
    y = None if y is None or signs is not None else _in_order(y, work)
    x, dy, residual = _in_order(x, work), _in_order(dy, work), None if residual is None else _in_order(residual, work)
    weight, bias = per_channel(weight), per_channel(bias)
    dx = dy if in_place else empty_like(x, work.strides)
    dresidual = empty_like(x, work.strides) if residual_gradient else None
    sum_g_xhat, sum_g = torch.empty_like(mean), torch.empty_like(mean)
    places = addresses(dy, x, residual, y, signs, dx, dresidual, weight, bias, mean, var, sum_g_xhat, sum_g, draw)
    operator(DTYPES[x.dtype], *places, eps, *activation_code(activation, tuple(parameters)))
    return dx, sum_g_xhat, sum_g, x.new_empty(0) if dresidual is None else dresidual


def _track(running_mean, running_var, batches, mean, var, unbiased, factor, between_steps, guarded) -> bool:
    """Move running statistics and count a batch, where ``batches`` is given; False, and nothing done, where the kernel
    does not take the tensors."""
    if not are_plain_statistics((mean, var, running_mean, running_var), batches, _is_cpu):
        return False
    places = addresses(running_mean, running_var, batches, mean, var)
    _kernels.track(*places, mean.numel(), unbiased, factor, between_steps, guarded)
    increment_version((running_mean, running_var) if batches is None else (running_mean, running_var, batches))
    return True


if available:
    eager.register("batch_norm", _batch_norm, "cpu")
    eager.provide("track", _track, "cpu")
    eager.provide("batch_norm_with_signs", partial(_batch_norm, with_signs=True), "cpu")
    eager.register("batch_norm_backward", _batch_norm_backward, "cpu")
    eager.provide("batch_norm_backward_in_place", partial(_batch_norm_backward, in_place=True), "cpu")
    eager.register("normalize", _normalize, "cpu")
    eager.register("backward_fused", _backward_fused, "cpu")
    eager.provide("backward_fused_in_place", partial(_backward_fused, in_place=True), "cpu")
