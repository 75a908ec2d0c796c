"""A pointwise convolution between two batch norms as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from leannorm import backends
from leannorm.activation import Activation
from leannorm.functional.checks import check, check_regions, draw_places, kind_of
from leannorm.functional.sampled import concatenated_batch_norm, conv_batch_norm
from leannorm.ops import eager, preactivated
from leannorm.ops.concatenated import concatenated_shape
from leannorm.statistics import Regions


class BatchNorm(NamedTuple):
    """A batch norm of one call: gamma and beta, (C,) or None, the sampled regions of its input, and what follows."""

    weight: Tensor | None
    bias: Tensor | None
    regions: Regions
    eps: float = 1e-5
    activation: str | Activation | None = None


def preactivated_conv_batch_norm(
    inputs: Sequence[Tensor], first: BatchNorm, conv_weight: Tensor, second: BatchNorm
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    r"""Compute a pointwise convolution between two batch norms, each with its activation.

    .. math:: y = act_2(bn_2(W act_1(bn_1(cat(inputs)))))

    As `concatenated_batch_norm`, then `conv_batch_norm` of stride 1 without padding; where `takes_preactivated` holds,
    one operator that neither writes nor keeps what lies in between, and backward computes that anew from the inputs.

    Args:
        inputs: (N, C_i, H, W) each, K channels together; not to be changed in place before backward.
        first: the batch norm of their concatenation.
        conv_weight: W, (C, K, 1, 1), without a bias, which the second batch norm would cancel.
        second: the batch norm of what the convolution gives.

    Returns:
        y, (N, C, H, W); mean and biased variance of the first sample, (K,), and of the second, (C,).

    Raises:
        TypeError: for inputs that are not floating.
        ValueError: for shapes, dtypes or devices that do not fit, or one element a channel.
    """
    shape = concatenated_shape(inputs)
    outputs = (shape[0], len(conv_weight), *shape[2:])
    check(shape, inputs[0], first.weight, first.bias, None)
    check(outputs, inputs[0], second.weight, second.bias, None)
    if takes_preactivated(inputs, conv_weight) and first.regions.boxes and second.regions.boxes:
        if conv_weight.shape[1] != shape[1]:
            raise ValueError(
                f"conv_weight must be (C, {shape[1]}, 1, 1), for inputs of {shape[1]} channels, got "
                f"{tuple(conv_weight.shape)}"
            )
        for regions, eps, of in ((first.regions, first.eps, shape), (second.regions, second.eps, outputs)):
            check_regions(regions, of, eps)
        kernel = eager.kernel("preactivated", inputs[0])
        assert kernel is not None
        parameters = first.weight, first.bias, conv_weight, second.weight, second.bias
        settings = [_settings(each, inputs[0]) for each in (first, second)]
        return preactivated.preactivated(kernel, inputs, parameters, *settings)
    z, *first_moments = concatenated_batch_norm(
        inputs, first.weight, first.bias, statistics=first.regions, eps=first.eps, activation=first.activation
    )
    y, *moments = conv_batch_norm(
        z, conv_weight, None, second.weight, second.bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
        statistics=second.regions, eps=second.eps, activation=second.activation,
    )  # fmt: skip
    return y, (first_moments[0], first_moments[1]), (moments[0], moments[1])


def takes_preactivated(inputs: Sequence[Tensor], conv_weight: Tensor) -> bool:
    """Whether one operator computes these: where `takes_concatenation` holds, of float32, with W of float32."""
    if not inputs or eager.kernel("preactivated", inputs[0]) is None:
        return False
    return backends.takes_preactivated(inputs, conv_weight)


def _settings(norm: BatchNorm, input: Tensor) -> preactivated.Normalization:
    places = draw_places(norm.regions, input), norm.regions.boxes, norm.regions.weights
    return preactivated.Normalization(*places, norm.eps, *kind_of(norm.activation))
