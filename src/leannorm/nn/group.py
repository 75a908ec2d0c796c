"""Normalization within each sample: BN layers become torch's own GroupNorm and InstanceNorm, and come back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from leannorm.methods import GroupNormalization, InstanceNormalization, LayerNormalization, Method
from leannorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SampledBatchNorm
from leannorm.nn.tracing import is_traced, record

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class InstanceNorm1d(nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` that does not take the (N, C) input of a BN layer for one (C, L) sample."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each sample."""
        return record(self, input) if is_traced(input) else super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim != 3:
            raise ValueError(
                f"instance normalization needs an (N, C, L) input, got {tuple(input.shape)}: one value is its own mean"
            )


_INSTANCE = {BatchNorm1d: InstanceNorm1d, BatchNorm2d: nn.InstanceNorm2d, BatchNorm3d: nn.InstanceNorm3d}
PER_SAMPLE = (GroupNormalization, InstanceNormalization, LayerNormalization)


def why_not(layer: nn.Module, method: Method) -> str | None:
    """Say why a BN layer, torch's, timm's or leannorm's, cannot normalize within each sample, or None."""
    activation = getattr(layer, "activation", None) or getattr(layer, "act", None)  # timm's layer holds a module
    if activation is not None and not isinstance(activation, nn.Identity):
        return f"it applies {activation}, which torch's layer for {method} does not"
    if getattr(layer, "frozen", False):
        return f"it is frozen to its running statistics, which {method} has not; unfreeze it first"
    return None


def enter(layer: SampledBatchNorm, method: Method) -> None:
    """Make a BN layer torch's GroupNorm or InstanceNorm, in place; gamma and beta stay.

    Source: Wu and He, Group Normalization, arXiv 1803.08494; Ulyanov et al., arXiv 1607.08022; Ba et al., 1607.06450.
    """
    module: Any = layer
    state, plain_class = vars(layer), type(layer)
    kept = {name: state[name] for name in ("num_features", "eps", "momentum", "affine", "track_running_stats")}
    kept["tracks"] = layer.running_mean is not None
    for name in BUFFERS:
        delattr(layer, name)
    for name in ("statistics", "place", "virtual_mark", "guard_nonfinite", "frozen", "activation"):
        state.pop(name, None)
    if isinstance(method, InstanceNormalization):
        module.__class__ = _INSTANCE[plain_class]
        for name in BUFFERS:
            module.register_buffer(name, None)
        module.track_running_stats = False
    else:
        module.__class__ = nn.GroupNorm
        wanted = method.groups if isinstance(method, GroupNormalization) else 1
        module.num_groups, module.num_channels = math.gcd(wanted, kept["num_features"]), kept["num_features"]
    module.method, module.plain_class, module.batch_norm_state = method, plain_class, kept


def leave(module: nn.Module) -> SampledBatchNorm:
    """Make what `enter` made a BN layer again, with running statistics that begin anew."""
    state = vars(module)
    for name in BUFFERS:
        module._buffers.pop(name, None)
    plain_class, kept = state.pop("plain_class"), state.pop("batch_norm_state")
    for name in ("method", "num_groups", "num_channels"):
        state.pop(name, None)
    tracks = kept.pop("tracks")
    module.__class__ = plain_class
    assert isinstance(module, SampledBatchNorm)
    vars(module).update(kept)
    like = module.weight if module.weight is not None else torch.empty(0)
    for name in BUFFERS:
        module.register_buffer(name, None)
    if tracks:
        module.running_mean = torch.zeros(module.num_features, dtype=like.dtype, device=like.device)
        module.running_var = torch.ones(module.num_features, dtype=like.dtype, device=like.device)
        module.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=like.device)
    return module
