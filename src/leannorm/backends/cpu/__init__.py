"""Native CPU kernels of the fused operators; whatever they do not take goes to the ATen back end, call by call.

The extension ``_kernels`` is built at install; without a compiler there is none, and ATen serves everything.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.dlpack import from_dlpack

from leannorm.backends import aten
from leannorm.backends.memory import PLAIN, are_plain_statistics, is_channels_last
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
_LEAST_KEPT = 1 << 20  # bytes; the C library itself keeps what is smaller
_keeps = available and "LEANNORM_NO_CPU_MEMORY_CACHING" not in os.environ
_is_cpu = attrgetter("is_cpu")
_KINDS = ("", "relu", "clamp", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh")  # as the kernels count them


def why_not(x: Tensor) -> str | None:
    """Give the reason why the native kernels do not take a call on this input, or None where they do."""
    if _kernels is None:
        return f"{_missing}; install again where a C++ compiler is found"
    if x.device.type != "cpu":
        return f"the native kernels are for the CPU, the input is on {x.device}"
    if type(x) not in PLAIN:
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
    plain = available and x.dtype in _DTYPES and type(x) in PLAIN and x.device.type == "cpu"
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
    if x.dtype not in _DTYPES or type(x) not in PLAIN:
        return None
    return _work(x.shape, x.stride(), tuple(boxes), tuple(weights), draw is not None)


def _empty_like(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Give `torch.empty_like`, for large tensors in memory that is kept; see `leannorm.empty_cache`."""
    if x.nbytes < _LEAST_KEPT or not _keeps or x.dtype not in _DTYPES:
        return torch.empty_like(x)
    try:
        return from_dlpack(_kernels.kept_tensor(_DTYPES[x.dtype], x.shape, strides))
    except MemoryError:
        return torch.empty_like(x)  # whose error says how much there was to be


def _strides_like(shape: Sequence[int], strides: Sequence[int]) -> Sequence[int]:
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def empty_cache() -> None:
    """Return to the system the memory that the native CPU kernels keep for their next results.

    Results of 1 MiB and more lie in memory that is kept when they die, as PyTorch keeps it on a GPU; a result takes a
    kept block of at most 1.25 times its size. What is kept and not in use is at most 1.25 times what was ever in use
    at once, less what is in use. ``LEANNORM_NO_CPU_MEMORY_CACHING=1`` in the environment leaves all memory to PyTorch
    (it is read at import), for instance where activations are resized in place, which is refused on kept memory.

    >>> empty_cache()
    """
    if _kernels is not None:
        _kernels.release()


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _per_channel(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def _in_order(tensor: Tensor, work: _Work) -> Tensor:
    if tensor.stride() == work.strides:
        return tensor
    return torch.empty_strided(tensor.shape, work.strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@lru_cache(maxsize=256)
def _activation(kind: str, parameters: tuple[float, ...]) -> tuple[int, float, float]:
    first, second = (*parameters, 0.0, 0.0)[:2]
    return _KINDS.index(kind), first, second


def _batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters, with_signs=False):
    work = _work_on(x, draw, boxes, weights)
    if work is None:
        return aten.batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters)
    y = _empty_like(x, work.strides)
    mean, var = x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)
    signs = x.new_empty(work.sign_bytes, dtype=torch.uint8) if with_signs and work.sign_bytes else None
    operator = work.plan.batch_norm
    _forward(operator, work, x, y, mean, var, weight, bias, residual, signs, draw, eps, activation, parameters)
    return (y, mean, var) if signs is None else (y, mean, var, signs)


def _normalize(x, mean, var, weight, bias, residual, eps, activation, parameters):
    work = _work_on(x, None, (), ())
    if work is None:
        return aten.kernels["normalize"](x, mean, var, weight, bias, residual, eps, activation, parameters)
    y, operator = _empty_like(x, work.strides), work.plan.normalize
    mean, var = _per_channel(mean), _per_channel(var)
    _forward(operator, work, x, y, mean, var, weight, bias, residual, None, None, eps, activation, parameters)
    return y


def _forward(operator, work, x, y, mean, var, weight, bias, residual, signs, draw, eps, activation, parameters):
    x, residual = _in_order(x, work), None if residual is None else _in_order(residual, work)
    weight, bias = _per_channel(weight), _per_channel(bias)
    addresses = _addresses(x, residual, y, signs, weight, bias, mean, var, draw)
    operator(_DTYPES[x.dtype], *addresses, eps, *_activation(activation, tuple(parameters)))


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
    work = _work_on(x, draw, boxes, weights)
    if work is None or _lacks_output(residual, y, activation):
        return aten.batch_norm_backward(
            dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, draw, boxes, weights,
            residual_gradient,
        )  # fmt: skip
    return _backward(
        work.plan.batch_norm_backward, work, dy, x, mean, var, weight, bias, residual, y, draw, eps, activation,
        parameters, residual_gradient,
    )  # fmt: skip


def _backward_fused(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient):
    work = _work_on(x, None, (), ())
    if work is None or _lacks_output(residual, y, activation):
        return aten.kernels["backward_fused"](
            dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient
        )
    mean, var = _per_channel(mean), _per_channel(var)
    return _backward(
        work.plan.backward_fused, work, dy, x, mean, var, weight, bias, residual, y, None, eps, activation, parameters,
        residual_gradient,
    )  # fmt: skip


def _lacks_output(residual: Tensor | None, y: Tensor | None, activation: str) -> bool:
    return takes_output(activation) and residual is not None and y is None  # no layer calls it so


def _backward(
    operator, work, dy, x, mean, var, weight, bias, residual, y, draw, eps, activation, parameters, residual_gradient
):
    signs = y if y is not None and y.dtype is torch.uint8 else None
    y = None if y is None or signs is not None else _in_order(y, work)
    x, dy, residual = _in_order(x, work), _in_order(dy, work), None if residual is None else _in_order(residual, work)
    weight, bias = _per_channel(weight), _per_channel(bias)
    dx = _empty_like(x, work.strides)
    dresidual = _empty_like(x, work.strides) if residual_gradient else None
    sum_g_xhat, sum_g = torch.empty_like(mean), torch.empty_like(mean)
    addresses = _addresses(dy, x, residual, y, signs, dx, dresidual, weight, bias, mean, var, sum_g_xhat, sum_g, draw)
    operator(_DTYPES[x.dtype], *addresses, eps, *_activation(activation, tuple(parameters)))
    return dx, sum_g_xhat, sum_g, x.new_empty(0) if dresidual is None else dresidual


def _track(running_mean, running_var, batches, mean, var, unbiased, factor, between_steps, guarded) -> bool:
    """Move running statistics and count a batch, where ``batches`` is given; False, and nothing done, where the kernel
    does not take the tensors."""
    if not are_plain_statistics((mean, var, running_mean, running_var), batches, _is_cpu):
        return False
    addresses = _addresses(running_mean, running_var, batches, mean, var)
    _kernels.track(*addresses, mean.numel(), unbiased, factor, between_steps, guarded)
    increment_version((running_mean, running_var) if batches is None else (running_mean, running_var, batches))
    return True


if available:
    eager.register("batch_norm", _batch_norm, "cpu")
    eager.provide("track", _track, "cpu")
    eager.provide("batch_norm_with_signs", partial(_batch_norm, with_signs=True), "cpu")
    eager.register("batch_norm_backward", _batch_norm_backward, "cpu")
    eager.register("normalize", _normalize, "cpu")
    eager.register("backward_fused", _backward_fused, "cpu")
