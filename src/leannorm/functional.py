"""The functional form of the layers: validates, then calls `torch.ops.leannorm.*`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import leannorm.backends  # noqa: F401 - registers the kernels of torch.ops.leannorm
from leannorm.activation import Activation, as_activation
from leannorm.ops import definition
from leannorm.ops.definition import activate
from leannorm.statistics import FullBatch, Regions, Statistics


def batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    statistics: Statistics | Regions = FullBatch(),
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normalize a batch with statistics of some of its elements, then scale, shift, add a residual and activate.

    .. math:: y = act(\gamma (x - \mu_S) / \sqrt{\sigma_S^2 + eps} + \beta + residual)

    The gradient is exact: the statistics' own gradient reaches the sampled elements.

    Args:
        input: (N, C, *spatial) floating tensor.
        weight: gamma, (C,), or None for ones.
        bias: beta, (C,), or None for zeros.
        statistics: the source of statistics, or regions that one has given for this shape.
        eps: added to the variance.
        residual: of the input's shape and dtype, or None.
        activation: a name, a `leannorm.Activation`, or None.

    Returns:
        y like the input; the mean and the biased variance of the sample, (C,), float64 for float64 input, else float32.
        Mean and variance carry no gradient.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for shapes, dtypes or devices that do not fit, or one element a channel.

    Source: Chen et al., Effective and Efficient Batch Normalization Using a Few Uncorrelated Data for Statistics
    Estimation, IEEE TNNLS 32(1), 2021.

    >>> x = torch.arange(16.0).view(4, 1, 2, 2)
    >>> y, mean, var = batch_norm(x, activation="relu")
    >>> mean, var
    (tensor([7.5000]), tensor([21.2500]))
    """
    if input.shape == (0,):  # torch takes an empty vector too
        y, mean, var = batch_norm(input[:, None], weight, bias, statistics=statistics, eps=eps, activation=activation)
        return y[:, 0], mean, var
    _check(input, weight, bias, residual)
    if not eps > 0:
        raise ValueError(f"batch_norm eps must be positive, got {eps}")
    regions = statistics.regions(input.shape) if isinstance(statistics, Statistics) else statistics
    if regions.inverse_count >= 1 and input.numel() > 0:
        raise one_element(input)
    draw = None
    if regions.draws:
        draw = torch.randint(0, 2**62, (regions.draws,), device=input.device)
    act = as_activation(activation)
    return torch.ops.leannorm.batch_norm(
        input,
        weight,
        bias,
        residual,
        draw,
        list(regions.boxes),
        list(regions.weights),
        eps,
        act.kind if act else "",
        list(act.parameters) if act else [],
    )


def moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and biased variance of all elements of each channel, (C,), without a gradient.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for an input without channels.
    """
    _check(input, None, None, None)
    return torch.ops.leannorm.moments(input.detach(), None, [], [])


def snapshot(state: Tensor) -> Tensor:
    """Copy a buffer, or what was computed from one, for a gradient: the buffer may change before the backward pass.

    A plain copy does not do in `torch.compile`, which may compute it anew in the backward pass.
    """
    return torch.ops.leannorm.snapshot(state.detach())


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
    _check(input, weight, bias, residual)
    act = as_activation(activation)
    kind, parameters = (act.kind, act.parameters) if act else ("", ())
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
    """Normalize with given statistics (or, where they are None, the batch's own), by PyTorch's own operators alone.

    What a layer computes in eval mode: it exports to plain operators. Arguments as in `batch_norm`.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(input, weight, bias, residual)
    parameters = [running_mean, running_var, weight, bias]
    dtypes = {p.dtype for p in parameters if p is not None}
    if len(dtypes) > 1 or not dtypes <= {input.dtype, torch.float32}:
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        parameters = [None if p is None else p.to(wide) for p in parameters]
    mean, var, weight, bias = parameters
    y = F.batch_norm(input, mean, var, weight, bias, mean is None, 0.0, eps)
    if residual is not None:
        y = y + residual
    act = as_activation(activation)
    return activate(y, act.kind, act.parameters) if act else y


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
    _check(input, weight, bias, residual)
    act = as_activation(activation)
    kind, parameters = (act.kind, act.parameters) if act else ("", ())
    return definition.transform(normalized, weight, bias, residual, kind, parameters).to(input.dtype)


def _check(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    if not input.is_floating_point():
        raise TypeError(f"batch normalization needs a floating input, got {input.dtype}; call .float() on it first")
    if input.ndim < 2 and input.shape != (0,):
        raise ValueError(f"batch normalization needs an (N, C, *spatial) input, got shape {tuple(input.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (input.shape[1],):
            raise ValueError(
                f"{name} must have the shape ({input.shape[1]},), one value a channel of the input "
                f"{tuple(input.shape)}, got {tuple(parameter.shape)}"
            )
    if residual is not None and (residual.shape, residual.dtype) != (input.shape, input.dtype):
        raise ValueError(
            f"residual must have the input's shape and dtype, {tuple(input.shape)} {input.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


def one_element(input: Tensor) -> ValueError:
    """Make the error for statistics of a single element a channel."""
    return ValueError(
        f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}: the variance "
        "of one element is 0. Use GroupNorm, batch renormalization, or virtual samples "
        "(leannorm.convert(model, leannorm.VirtualDataset(1))), or a larger batch"
    )
