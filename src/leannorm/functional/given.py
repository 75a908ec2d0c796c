"""Normalization with statistics that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leannorm import backends
from leannorm.activation import Activation
from leannorm.functional.checks import check, kind_of
from leannorm.ops import autograd, definition, eager
from leannorm.ops.definition import activate


def normalize_by(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
) -> Tensor:
    """Normalize with given statistics through which gradients flow; computed in their dtype. Arguments as `batch_norm`.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for shapes or dtypes that do not fit.
    """
    check(input.shape, input, weight, bias, residual)
    kind, parameters = kind_of(activation)
    return definition.normalize(input, mean, var, weight, bias, residual, eps, kind, parameters)


def normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
) -> Tensor:
    """Normalize with given statistics (or, where they are None, the batch's own), as a layer does in eval mode.

    In eager mode one native operator computes all of it where a residual or an activation follows and it takes the
    call. PyTorch's own operators compute it elsewhere: a layer alone gives PyTorch's result bit for bit, and all
    export, compile and trace to plain operators. Arguments as in `batch_norm`; the statistics are constants.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    check(input.shape, input, weight, bias, residual)
    parameters = [running_mean, running_var, weight, bias]
    dtypes = {p.dtype for p in parameters if p is not None}
    if len(dtypes) > 1 or not dtypes <= {input.dtype, torch.float32}:
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        parameters = [None if p is None else p.to(wide) for p in parameters]
    mean, var, weight, bias = parameters
    kind = kind_of(activation)
    followed = residual is not None or kind[0] != ""  # else PyTorch's is one operator, too, and the same in bits
    if followed and mean is not None and var is not None:
        kernel = _native(input, (mean, var), (weight, bias, residual))
        if kernel is not None:
            mean, var = mean.to(torch.float32), var.to(torch.float32)
            return autograd.normalize(kernel, input, mean, var, weight, bias, residual, eps, *kind)
    y = F.batch_norm(input, mean, var, weight, bias, mean is None, 0.0, eps)
    if residual is not None:
        y = y + residual
    return activate(y, *kind)


def scale_shift(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str = "",
    parameters: Sequence[float] = (),
) -> Tensor:
    """Compute act(scale x + shift + residual) with constants a channel: what `leannorm.fold` leaves of a normalization.

    One native operator in eager mode, PyTorch's own operators elsewhere, as in `normalize`. ``scale`` and ``shift`` are
    (C, 1, ...), to be multiplied by the input; the activation is given by its kind and parameters.

    >>> x = torch.tensor([[1.0, -2.0]])
    >>> scale_shift(x, torch.tensor([2.0, 3.0]), torch.tensor([0.5, 1.0]), None, "relu")
    tensor([[2.5000, 0.0000]])
    """
    kernel = _native(input, (), (scale, shift, residual))
    if (
        kernel is not None
        and scale.shape == shift.shape == (input.shape[1], *(1,) * (input.ndim - 2))
        and scale.dtype == shift.dtype == input.dtype
        and (residual is None or (residual.shape, residual.dtype) == (input.shape, input.dtype))
    ):
        zeros = scale.new_zeros(input.shape[1], dtype=torch.float32)
        constants = zeros, torch.ones_like(zeros), scale.flatten(), shift.flatten()
        return autograd.normalize(kernel, input, *constants, residual, 0.0, activation, parameters)
    y = torch.addcmul(shift, scale, input)
    return activate(y if residual is None else y + residual, activation, parameters)


def transform(
    normalized: Tensor,
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
) -> Tensor:
    """Scale, shift, add a residual and activate what another method has normalized; like ``input``.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for shapes or dtypes that do not fit.
    """
    check(input.shape, input, weight, bias, residual)
    kind, parameters = kind_of(activation)
    return definition.transform(normalized, weight, bias, residual, kind, parameters).to(input.dtype)


def _native(x: Tensor, statistics: Sequence[Tensor], others: Sequence[Tensor | None]) -> Callable[..., Tensor] | None:
    """Give the native operator of a call with given statistics, where nothing watches and it takes all tensors."""
    kernel = eager.kernel("normalize", x)
    takes = (
        kernel is not None  # first: a compiler cannot follow the rest
        and backends.takes(x)
        and all(t.shape == (x.shape[1],) and t.device == x.device for t in statistics)
        and all(t is None or t.device == x.device for t in others)
    )
    return kernel if takes else None
