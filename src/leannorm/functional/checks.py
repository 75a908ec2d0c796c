"""What the functional forms check, and what they hand to the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leannorm.activation import Activation, as_activation
from leannorm.statistics import Regions


def kind_of(activation: str | Activation | None) -> tuple[str, tuple[float, ...]]:
    """Give an activation as the operators take it: its kind and its parameters."""
    act = as_activation(activation)
    return (act.kind, act.parameters) if act else ("", ())


def check(
    shape: Sequence[int], input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    """Raise what does not fit: an input's dtype, the shapes, dtypes and devices of what is computed with it.

    Args:
        shape: of what is normalized, which the input may be before a convolution.
        input: what the call takes.
        weight: gamma or None.
        bias: beta or None.
        residual: what is added or None.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for all else.
    """
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


def check_regions(regions: Regions, shape: Sequence[int], eps: float) -> None:
    """Raise `ValueError` for one element a channel, and for an eps that is not positive."""
    if not eps > 0:
        raise ValueError(f"batch_norm eps must be positive, got {eps}")
    if regions.inverse_count >= 1 and 0 not in shape:
        raise one_element(shape)


def draw_places(regions: Regions, input: Tensor) -> Tensor | None:
    """Draw the random integers that place the regions; None where nothing moves them."""
    return torch.randint(0, 2**62, (regions.draws,), device=input.device) if regions.draws else None


def one_element(shape: Sequence[int]) -> ValueError:
    """Make the error for statistics of a single element a channel."""
    return ValueError(
        f"Expected more than 1 value per channel when training, got input size {tuple(shape)}: the variance "
        "of one element is 0. Use GroupNorm, batch renormalization, or virtual samples "
        "(leannorm.convert(model, leannorm.VirtualDataset(1))), or a larger batch"
    )
