"""Batch norm with statistics of some of a batch's elements, alone and together with what comes before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leannorm import backends
from leannorm.activation import Activation
from leannorm.functional.checks import check, check_regions, draw_places, kind_of
from leannorm.ops import autograd, concatenated, definition, eager
from leannorm.ops import conv_batch_norm as folded
from leannorm.ops.concatenated import concatenated_shape
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
    check(input.shape, input, weight, bias, residual)
    regions = statistics.regions_of(input) if isinstance(statistics, Statistics) else statistics
    check_regions(regions, input.shape, eps)
    places = draw_places(regions, input), regions.boxes, regions.weights
    call = input, weight, bias, residual, *places, eps, *kind_of(activation)
    if decomposed and torch.compiler.is_compiling():
        y, mean, var = definition.batch_norm(*call)
        return y, mean.detach(), var.detach()
    return autograd.batch_norm(*call)


def concatenated_batch_norm(
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    statistics: Statistics | Regions,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `batch_norm` of ``torch.cat(inputs, 1)``.

    Where `takes_concatenation` holds, with sampled statistics and without a residual, the concatenation is neither
    written nor kept for backward; the inputs are, and must not be changed in place until then.

    Args:
        inputs: (N, C_i, *spatial) each, C channels together.
        weight: gamma, (C,), or None for ones.
        bias: beta, (C,), or None for zeros.
        statistics: as in `batch_norm`, of the concatenation.
        eps: added to the variance.
        residual: like the concatenation, or None.
        activation: a name, a `leannorm.Activation`, or None.

    Returns:
        As `batch_norm`.

    Raises:
        TypeError: for inputs that are not floating.
        ValueError: for shapes, dtypes or devices that do not fit, or one element a channel.

    >>> one, other = torch.zeros(4, 2, 2, 2), torch.ones(4, 1, 2, 2)
    >>> from leannorm import GridSampling
    >>> y, mean, _ = concatenated_batch_norm([one, other], statistics=GridSampling(1 / 2, minimum=4))
    >>> y.shape, mean
    (torch.Size([4, 3, 2, 2]), tensor([0., 0., 1.]))
    """
    if residual is None and takes_concatenation(inputs):
        shape = concatenated_shape(inputs)
        regions = statistics.regions(shape, by_rows=False) if isinstance(statistics, Statistics) else statistics
        if regions.boxes:
            check(shape, inputs[0], weight, bias, None)
            check_regions(regions, shape, eps)
            kernel = eager.kernel("concatenated_batch_norm", inputs[0])
            assert kernel is not None
            places = draw_places(regions, inputs[0]), regions.boxes, regions.weights
            return concatenated.batch_norm(kernel, inputs, weight, bias, *places, eps, *kind_of(activation))
    x = torch.cat(list(inputs), 1)
    return batch_norm(x, weight, bias, statistics=statistics, eps=eps, residual=residual, activation=activation)


def conv_batch_norm_pays(
    input: Tensor,
    conv_weight: Tensor,
    dtype: torch.dtype,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
) -> bool:
    """Whether native kernels compute `conv_batch_norm` in this dtype, and faster than one after the other for certain:
    of depthwise convolutions, and in float32 of pointwise ones whose filters are small beside the maps; 2d, on the CPU,
    in channels-last memory. Not under `torch.compile`, which has convolutions of its own, nor `torch.func`, which has
    rules for PyTorch's.
    """
    watched = torch.compiler.is_compiling() or eager.is_transforming()
    return not watched and backends.convolution_pays(input, conv_weight, dtype, stride, padding, groups)


def takes_concatenation(inputs: Sequence[Tensor]) -> bool:
    """Whether a kernel reads the concatenation of these along their channels from where they lie: in eager mode, on the
    CPU, in channels-last memory, of one dtype and different in channels alone.
    """
    if not inputs or eager.kernel("concatenated_batch_norm", inputs[0]) is None:
        return False
    return backends.takes_concatenation(inputs)


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
    check(shape, input, weight, bias, residual)
    by_rows = folded.memory_format(input, conv_weight) == torch.contiguous_format
    regions = statistics.regions(shape, by_rows=by_rows) if isinstance(statistics, Statistics) else statistics
    if not regions.boxes:
        raise ValueError(
            f"conv_batch_norm takes statistics of some outputs, got {statistics!r}, which for {shape} takes all (or "
            "none): these need the convolution's whole output first; call the convolution, then batch_norm"
        )
    check_regions(regions, shape, eps)
    kind, parameters = kind_of(activation)
    y, mean, var = folded.conv_batch_norm(
        input, conv_weight, conv_bias, weight, bias, residual,
        list(stride), list(padding), list(dilation), groups,
        draw_places(regions, input), list(regions.boxes), list(regions.weights), eps,
        kind, list(parameters),
    )  # fmt: skip
    return y, mean if conv_bias is None else mean + conv_bias.detach(), var


def moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and biased variance of all elements of each channel, (C,), without a gradient.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for an input without channels.
    """
    check(input.shape, input, None, None, None)
    return torch.ops.leannorm.moments(input.detach(), None, [], [])


def snapshot(state: Tensor) -> Tensor:
    """Copy a buffer, or what was computed from one, for a gradient: the buffer may change before the backward pass.

    A plain copy does not do in `torch.compile`, which may compute it anew in the backward pass.
    """
    return torch.ops.leannorm.snapshot(state.detach())
