"""Linear layer -> batch normalization becomes one linear layer, for inputs of shape ``(N, features)``.

With ``scale`` and ``shift`` the affine map per feature that batch normalization is in eval mode,

    scale_c (W_c . x + b_c) + shift_c  =  (scale_c W_c) . x + (scale_c b_c + shift_c)

for every output feature ``c``. On ``(N, L, features)`` batch normalization takes dimension 1, which is not
the features: refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from leannorm.graph.affine import Affine, linear
from leannorm.graph.capture import module_name, value_of

if TYPE_CHECKING:
    from torch import Tensor

    from leannorm.graph.batch_norm import BatchNorm
    from leannorm.graph.capture import Capture


def fold_linear(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, output_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one linear layer.

    Args:
        weight: ``(C, C_in)``, or ``(C_in, C)`` with ``output_dim=1``.
        bias: ``(C,)``, or None for no bias.
        scale: ``(C,)`` in float64.
        shift: ``(C,)`` in float64.
        output_dim: the dimension of ``weight`` that counts output features.

    Returns:
        Weight and bias in the dtype of ``weight``, computed in float64.
    """
    folded = weight.double() * (scale[:, None] if output_dim == 0 else scale)
    offset = shift if bias is None else shift + scale * bias.double()
    return folded.to(weight.dtype), offset.to(weight.dtype)


def match(capture: Capture, norm: BatchNorm) -> Affine | None:
    """A linear layer that gives the input of the batch normalization."""
    return linear(norm.input)


def check(capture: Capture, norm: BatchNorm, found: Affine) -> str | None:
    """Refuse where something else reads the layer or its weights, or features are not dimension 1."""
    if len(found.node.users) > 1:
        others = ", ".join(user.name for user in found.node.users if user is not norm.node)
        return f"the {found.name} before it has other users: {others}"
    result = value_of(found.node)
    if result is None or result.ndim != 2:
        shape = None if result is None else tuple(result.shape)
        return f"the {found.name} before it gives shape {shape}: dimension 1 is not its output features"
    if reason := found.refusal(capture):
        return reason
    if not all(torch.isfinite(t).all() for t in _folded(capture, norm, found)):
        return f"the folded weights do not fit into {found.values(capture)[0].dtype}"
    return None


def rewrite(capture: Capture, norm: BatchNorm, found: Affine) -> str:
    """Move the scale and the shift into the layer's weight and bias."""
    found.set_values(capture, *_folded(capture, norm, found))
    capture.replace(norm.node, found.node)
    return f"folded into the {found.name} {module_name(found.node)}"


def _folded(capture: Capture, norm: BatchNorm, found: Affine) -> tuple[Tensor, Tensor]:
    scale, shift = norm.scale_and_shift(capture)
    return fold_linear(*found.values(capture), scale, shift, output_dim=found.output_dim)
