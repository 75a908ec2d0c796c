"""The functional form of the layers: validates, then calls `torch.ops.leannorm.*`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leannorm import backends
from leannorm.activation import Activation, as_activation
from leannorm.ops import autograd, definition, eager
from leannorm.ops import conv_batch_norm as folded
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
    decomposed: bool = False,
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
        decomposed: under `torch.compile` compute by PyTorch's operators, which the compiler fuses, in place of one
            operator, which it calls; `leannorm.tune` finds out which is faster.

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
    _check(input.shape, input, weight, bias, residual)
    regions = statistics.regions_of(input) if isinstance(statistics, Statistics) else statistics
    _check_regions(regions, input.shape, eps)
    call = (
        input, weight, bias, residual, _draw(regions, input), regions.boxes, regions.weights, eps, *_kind(activation)
    )  # fmt: skip
    if decomposed and torch.compiler.is_compiling():
        y, mean, var = definition.batch_norm(*call)
        return y, mean.detach(), var.detach()
    return autograd.batch_norm(*call)


def conv_batch_norm(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    statistics: Statistics | Regions,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Compute a convolution and the batch norm after it, with statistics of some of its outputs, as one operator.

    .. math:: y = act(conv(x, \gamma W / \sigma_S) + \beta - \gamma \mu_S / \sigma_S + residual)

    The convolution's own output is neither written nor kept for backward: its sampled part is computed first. Values
    and gradients are those of `torch.nn.functional.conv2d` and `batch_norm` one after the other, up to rounding.

    Args:
        input: (N, C_in, *spatial), or (N, C_in) for a linear layer.
        conv_weight: (C, C_in / groups, *kernel), or (C, C_in), of the input's dtype or a wider one.
        conv_bias: (C,) or None; batch norm cancels it, it is in the mean alone, and its gradient is zero.
        weight: gamma, (C,), or None for ones.
        bias: beta, (C,), or None for zeros.
        stride: one number a spatial dimension, as in padding (with zeros) and dilation; () for a linear layer.
        padding: as above.
        dilation: as above.
        groups: of the convolution.
        statistics: a sampled source, or regions of the output that one has given.
        eps: added to the variance.
        residual: of the output's shape and the input's dtype, or None.
        activation: a name, a `leannorm.Activation`, or None.

    Returns:
        y; the mean and the biased variance of the convolution's sampled outputs, as in `batch_norm`.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for shapes or dtypes that do not fit, one element a channel, or statistics of all elements, which
            need the convolution's whole output first.

    >>> x, w = torch.ones(2, 1, 4, 4), torch.ones(3, 1, 3, 3)
    >>> from leannorm import GridSampling
    >>> source = GridSampling(1 / 2, minimum=4)
    >>> y, mean, _ = conv_batch_norm(x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1), statistics=source)
    >>> y.shape, mean
    (torch.Size([2, 3, 2, 2]), tensor([9., 9., 9.]))
    """
    shape = folded.output_shape(input.shape, conv_weight.shape, stride, padding, dilation)
    _check(shape, input, weight, bias, residual)
    by_rows = folded.memory_format(input, conv_weight) == torch.contiguous_format
    regions = statistics.regions(shape, by_rows=by_rows) if isinstance(statistics, Statistics) else statistics
    if not regions.boxes:
        raise ValueError(
            f"conv_batch_norm takes statistics of some outputs, got {statistics!r}, which for {shape} takes all (or "
            "none): these need the convolution's whole output first; call the convolution, then batch_norm"
        )
    _check_regions(regions, shape, eps)
    kind, parameters = _kind(activation)
    y, mean, var = folded.conv_batch_norm(
        input, conv_weight, conv_bias, weight, bias, residual,
        list(stride), list(padding), list(dilation), groups,
        _draw(regions, input), list(regions.boxes), list(regions.weights), eps,
        kind, list(parameters),
    )  # fmt: skip
    return y, mean if conv_bias is None else mean + conv_bias.detach(), var


def moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and biased variance of all elements of each channel, (C,), without a gradient.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for an input without channels.
    """
    _check(input.shape, input, None, None, None)
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
    _check(input.shape, input, weight, bias, residual)
    kind, parameters = _kind(activation)
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
    _check(input.shape, input, weight, bias, residual)
    parameters = [running_mean, running_var, weight, bias]
    dtypes = {p.dtype for p in parameters if p is not None}
    if len(dtypes) > 1 or not dtypes <= {input.dtype, torch.float32}:
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        parameters = [None if p is None else p.to(wide) for p in parameters]
    mean, var, weight, bias = parameters
    kind = _kind(activation)
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
    _check(input.shape, input, weight, bias, residual)
    kind, parameters = _kind(activation)
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


def _kind(activation: str | Activation | None) -> tuple[str, tuple[float, ...]]:
    act = as_activation(activation)
    return (act.kind, act.parameters) if act else ("", ())


def _check(
    shape: Sequence[int], input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    dtype, on_cpu = input.dtype, input.is_cpu
    if not dtype.is_floating_point:
        raise TypeError(f"batch normalization needs a floating input, got {dtype}; call .float() on it first")
    if len(shape) < 2 and tuple(shape) != (0,):
        raise ValueError(f"batch normalization needs an (N, C, *spatial) input, got shape {tuple(shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (shape[1],):
            raise ValueError(
                f"{name} must have the shape ({shape[1]},), one value a channel of the input "
                f"{tuple(shape)}, got {tuple(parameter.shape)}"
            )
    if residual is not None and (tuple(residual.shape), residual.dtype) != (tuple(shape), dtype):
        raise ValueError(
            f"residual must have the input's shape and dtype, {tuple(shape)} {dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None or (on_cpu and tensor.is_cpu):  # asked first, since it is quick
            continue
        if tensor.device != input.device:  # the kernels read memory by address
            raise ValueError(
                f"{name} must be on the input's device, {input.device}, got {tensor.device}; move the input or the "
                "module"
            )


def _check_regions(regions: Regions, shape: Sequence[int], eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"batch_norm eps must be positive, got {eps}")
    if regions.inverse_count >= 1 and 0 not in shape:
        raise one_element(shape)


def _draw(regions: Regions, input: Tensor) -> Tensor | None:
    return torch.randint(0, 2**62, (regions.draws,), device=input.device) if regions.draws else None


def one_element(shape: Sequence[int]) -> ValueError:
    """Make the error for statistics of a single element a channel."""
    return ValueError(
        f"Expected more than 1 value per channel when training, got input size {tuple(shape)}: the variance "
        "of one element is 0. Use GroupNorm, batch renormalization, or virtual samples "
        "(leannorm.convert(model, leannorm.VirtualDataset(1))), or a larger batch"
    )
