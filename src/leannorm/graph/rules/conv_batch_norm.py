"""Convolution -> batch normalization becomes one convolution.

With ``scale`` and ``shift`` the affine map per channel that batch normalization is in eval mode,

    scale_c (W_c * x + b_c) + shift_c  =  (scale_c W_c) * x + (scale_c b_c + shift_c)

for every output channel ``c``. Only output channels are scaled, so stride, dilation, groups and any padding
of the input leave it exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from leannorm.graph.affine import Affine, convolution
from leannorm.graph.capture import module_name, value_of

if TYPE_CHECKING:
    from torch import Tensor

    from leannorm.graph.batch_norm import BatchNorm
    from leannorm.graph.capture import Capture


def fold_convolution(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution.

    Args:
        weight: ``(C, C_in / groups, *kernel)``.
        bias: ``(C,)``, or None for no bias.
        scale: ``(C,)`` in float64.
        shift: ``(C,)`` in float64.

    Returns:
        Weight and bias in the dtype of ``weight``, computed in float64.
    """
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    offset = shift if bias is None else shift + scale * bias.double()
    return folded.to(weight.dtype), offset.to(weight.dtype)


def match(capture: Capture, norm: BatchNorm) -> Affine | None:
    """A convolution that gives the input of the batch normalization."""
    return convolution(norm.input)


def check(capture: Capture, norm: BatchNorm, found: Affine) -> str | None:
    """Refuse where something else reads the convolution or its weights, or channels are not dimension 1."""
    if len(found.node.users) > 1:
        others = ", ".join(user.name for user in found.node.users if user is not norm.node)
        return f"the {found.name} before it has other users: {others}"
    if reason := found.refusal(capture):
        return reason
    weight, bias = found.values(capture)
    result = value_of(found.node)
    if result is None or result.ndim != weight.ndim:
        return f"the {found.name} before it has no batch dimension: dimension 1 is not its output channels"
    if not all(torch.isfinite(t).all() for t in fold_convolution(weight, bias, *norm.scale_and_shift(capture))):
        return f"the folded weights do not fit into {weight.dtype}"
    return None


def rewrite(capture: Capture, norm: BatchNorm, found: Affine) -> str:
    """Move the scale and the shift into the convolution's weight and bias."""
    found.set_values(capture, *fold_convolution(*found.values(capture), *norm.scale_and_shift(capture)))
    capture.replace(norm.node, found.node)
    return f"folded into the {found.name} {module_name(found.node)}"
