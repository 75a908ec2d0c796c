"""Schemas and fake kernels of leannorm's operators; `torch.ops.leannorm.*` is what layers call and back ends implement.

Legend
    x           (N, C, *spatial), any floating dtype and memory layout; y, dx, dresidual have its dtype and layout
    weight      (C,) or None (ones);  bias (C,) or None (zeros)
    residual    like x, or None; added before the activation
    mean, var   (C,) in the accumulation dtype: float64 for float64 x, else float32; var is biased
    draw        int64 (draws,) random integers that place the regions, or None: see `leannorm.statistics`
    boxes       for each region, for N and each spatial dimension: start, span, count, step; [] is the whole tensor
    weights     for each region its share of the statistics
    activation  a kind of `leannorm.activation` or "" (identity), with its parameters
    xhat        (x - mean) / sqrt(var + eps);  z = weight xhat + bias + residual;  y = act(z);  g = dy act'(z)
    sum_g       (C,) sum of g;  sum_g_xhat (C,) sum of g xhat: the gradients of bias and weight

All operators are functional: new statistics are returned, and the layer keeps them.
"""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("leannorm", "DEF")

_PLACES = "Tensor? draw, SymInt[] boxes, float[] weights"
_ACTIVATION = "str activation, float[] parameters"
_POINT = f"Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, float eps, {_ACTIVATION}"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype in which statistics of tensors of this dtype are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def takes_output(activation: str) -> bool:
    """Whether act'(z) can be told from y = act(z), so that backward needs y in place of the residual."""
    return activation in ("relu", "clamp", "leaky_relu")


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))


def _residual_gradient(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(x) if wanted else x.new_empty(0)


# One fused operator a direction. backward takes y where `takes_output`, else the residual; dresidual is empty unless
# it is wanted. A kernel may give signs beside its results, and its own backward takes them in place of y: uint8, bit
# k % 8 of byte k // 8 says of the element at memory offset k whether act' is 1.

library.define(
    f"batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, {_PLACES}, float eps, {_ACTIVATION})"
    " -> (Tensor y, Tensor mean, Tensor var)"
)


@torch.library.register_fake("leannorm::batch_norm", lib=library)
def _(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters):
    return torch.empty_like(x), _per_channel(x), _per_channel(x)


library.define(
    f"batch_norm_backward(Tensor dy, Tensor x, {_POINT}, {_PLACES}, bool residual_gradient)"
    " -> (Tensor dx, Tensor sum_g_xhat, Tensor sum_g, Tensor dresidual)"
)


@torch.library.register_fake("leannorm::batch_norm_backward", lib=library)
def _(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, draw, boxes, weights, wanted):
    return torch.empty_like(x), _per_channel(x), _per_channel(x), _residual_gradient(x, wanted)


# The same in steps, for statistics that several processes share: between two steps their sums are reduced.

library.define(f"moments(Tensor x, {_PLACES}) -> (Tensor mean, Tensor var)")


@torch.library.register_fake("leannorm::moments", lib=library)
def _(x, draw, boxes, weights):
    return _per_channel(x), _per_channel(x)


library.define(
    "normalize(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, float eps,"
    f" {_ACTIVATION}) -> Tensor"
)


@torch.library.register_fake("leannorm::normalize", lib=library)
def _(x, mean, var, weight, bias, residual, eps, activation, parameters):
    return torch.empty_like(x)


library.define(f"backward_reduce(Tensor dy, Tensor x, {_POINT}) -> (Tensor sum_g_xhat, Tensor sum_g)")


@torch.library.register_fake("leannorm::backward_reduce", lib=library)
def _(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters):
    return _per_channel(x), _per_channel(x)


# Exact statistics, count elements a channel in all processes, on the device of x so that nothing waits:
# dx = weight / sigma (g - (sum_g + xhat sum_g_xhat) / count).

library.define(
    f"backward_apply(Tensor dy, Tensor x, {_POINT}, Tensor sum_g_xhat, Tensor sum_g, Tensor count,"
    " bool residual_gradient) -> (Tensor dx, Tensor dresidual)"
)


@torch.library.register_fake("leannorm::backward_apply", lib=library)
def _(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, sum_g_xhat, sum_g, count, wanted):
    return torch.empty_like(x), _residual_gradient(x, wanted)


# Sampled statistics: one pass writes dx = weight g / sigma and both sums; then `correct` changes the sampled elements.

library.define(
    f"backward_fused(Tensor dy, Tensor x, {_POINT}, bool residual_gradient)"
    " -> (Tensor dx, Tensor sum_g_xhat, Tensor sum_g, Tensor dresidual)"
)


@torch.library.register_fake("leannorm::backward_fused", lib=library)
def _(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, wanted):
    return torch.empty_like(x), _per_channel(x), _per_channel(x), _residual_gradient(x, wanted)


library.define(
    "correct(Tensor dx, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor sum_g_xhat, Tensor sum_g, float eps,"
    f" {_PLACES}) -> Tensor"
)


@torch.library.register_fake("leannorm::correct", lib=library)
def _(dx, x, mean, var, weight, sum_g_xhat, sum_g, eps, draw, boxes, weights):
    return torch.empty_like(x)


# A copy that a compiled backward pass takes as it was: it never computes anew what an operator of ours gave, as it may
# do with torch's, from a buffer that the forward pass has changed since.

library.define("snapshot(Tensor x) -> Tensor")


@torch.library.register_fake("leannorm::snapshot", lib=library)
def _(x):
    return torch.empty_like(x)
