"""A convolution folded with the batch norm layer after it while training: whether it can be, and the call.

With sampled statistics scale and shift are known before the convolution runs, so that it can run with scaled filters;
see `leannorm.ops.conv_batch_norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leannorm import functional
from leannorm.activation import Activation
from leannorm.nn import calls
from leannorm.ops.conv_batch_norm import memory_format, output_shape
from leannorm.statistics import FullBatch, Regions, Statistics

if TYPE_CHECKING:
    from leannorm.nn.batchnorm import SampledBatchNorm

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Foldable = Convolution | nn.Linear
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # by autocast
NATIVELY: Final = "natively"
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Fold(NamedTuple):
    """A convolution or linear layer that a batch norm layer's call computes too, with the shape and dtype it gives."""

    module: Foldable
    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: Regions

    def compute(
        self,
        layer: SampledBatchNorm,
        input: Tensor,
        residual: Tensor | None,
        activation: str | Activation | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call `leannorm.functional.conv_batch_norm` with the parameters of the module and of the layer after it."""
        calls.record(self, layer, input, residual, activation)
        module, x = self.module, input.to(self.dtype)
        stride = padding = dilation = ()
        groups = 1
        if not isinstance(module, nn.Linear):
            stride, dilation, groups = module.stride, module.dilation, module.groups
            around = _around(module)
            padding = tuple(before for before, _ in around)
            if module.padding_mode != "zeros" or any(before != after for before, after in around):
                mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
                x = F.pad(x, [size for pair in reversed(around) for size in pair], mode)
                padding = (0,) * len(around)
        return functional.conv_batch_norm(
            x,
            module.weight,
            module.bias,
            layer.weight,
            layer.bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            statistics=self.regions,
            eps=layer.eps,
            residual=residual,
            activation=activation,
        )


def fold(module: nn.Module, layer: SampledBatchNorm, input: Tensor) -> Fold | None:
    """Give what a batch norm layer's call on a module's input computes, or None where the two stay apart."""
    if not (layer.folds_convolution and layer.training) or refusal(module) is not None:
        return None
    assert isinstance(module, Foldable)
    dtype = _dtype(input)
    if layer.folds_convolution == NATIVELY and not _pays(module, input, dtype):
        return None
    if input.ndim != module.weight.ndim or not (module.weight.dtype == dtype or _autocast(input)):
        return None
    shape = _shape(module, input)
    if any(size < 1 for size in shape):
        return None
    by_rows = memory_format(input, module.weight) == torch.contiguous_format
    regions = layer.statistics.regions(shape, layer.place, by_rows)
    return Fold(module, shape, dtype, regions) if regions.boxes and regions.inverse_count < 1 else None


def _pays(module: Foldable, input: Tensor, dtype: torch.dtype) -> bool:
    """Whether native kernels are faster with a convolution and the batch norm after it as one, without measuring."""
    return may_pay(module) and functional.conv_batch_norm_pays(
        input,
        module.weight,
        dtype,
        stride=module.stride,
        padding=[size for around in _around(module) for size in around],
        groups=module.groups,
    )


def is_observed(module: nn.Module) -> bool:
    """Whether something from outside sees, or replaces, what the module's call computes."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def refusal(module: object) -> str | None:
    """Give the reason why what a module computes cannot be folded with the batch norm after it, or None."""
    if isinstance(module, _TRANSPOSED):
        return "a transposed convolution spreads each input over many outputs, and few outputs alone cost almost all"
    if not isinstance(module, Foldable):
        return "its input is not the output of a convolution or a linear layer"
    if is_observed(module):
        return f"the {type(module).__name__} before it has hooks"
    base = next(base for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) if isinstance(module, base))
    if any(getattr(type(module), name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward")):
        return f"the {type(module).__name__} before it has a forward of its own"
    return None


def may_pay(module: object) -> TypeGuard[nn.Conv2d]:
    """Whether a module is such that native kernels may compute it and the batch norm after it as one: a depthwise or
    pointwise 2d convolution, padded with zeros if at all.
    """
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return False
    depthwise = 1 < module.groups == module.in_channels == module.out_channels
    return depthwise or (module.groups == 1 and module.kernel_size == (1, 1))


def refusal_of_statistics(statistics: Statistics) -> str | None:
    """Give the reason why a source of statistics leaves a convolution apart, or None."""
    if isinstance(statistics, FullBatch):
        return "exact statistics need the convolution's whole output first; convert it to a sampled source"
    return None


def _shape(module: Foldable, input: Tensor) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return output_shape(input.shape, module.weight.shape, (), (), ())
    padded = [size + sum(around) for size, around in zip(input.shape[2:], _around(module), strict=True)]
    none = (0,) * len(padded)
    return output_shape((*input.shape[:2], *padded), module.weight.shape, module.stride, none, module.dilation)


def _around(module: Convolution) -> list[tuple[int, int]]:
    """Give the padding before and after each spatial dimension."""
    if isinstance(module.padding, str):
        flat = module._reversed_padding_repeated_twice
        return list(zip(flat[::2], flat[1::2], strict=True))[::-1]
    return [(size, size) for size in module.padding]


def _autocast(input: Tensor) -> bool:
    return torch.is_autocast_enabled(input.device.type) and input.dtype in _CAST


def _dtype(input: Tensor) -> torch.dtype:
    """Give the dtype in which a convolution of the input computes."""
    return torch.get_autocast_dtype(input.device.type) if _autocast(input) else input.dtype
