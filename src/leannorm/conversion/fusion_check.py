"""Compare a model's training outputs before and after a change that must not change them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.method import MethodNorm
from leannorm.statistics import FullBatch

SEED = 0
TOLERANCE = 0.01  # of the outputs' 2-norm; rounding alone reaches 5e-4 in a ResNet-152 at two samples of 75 pixels


def training_outputs(
    model: nn.Module, inputs: tuple[Any, ...], *, exact: bool = True, gradients: bool = False
) -> list[Any]:
    """Call a model in training mode with a fixed seed; its buffers, modes and draws stay.

    Args:
        model: the model.
        inputs: its arguments.
        exact: use exact statistics, whatever the layers' sources are.
        gradients: keep what a backward pass needs.

    Returns:
        The leaves of the output.
    """
    devices = {t.device for t in model.parameters() if t.device.type != "cpu"}
    with torch.random.fork_rng(list(devices), device_type=next(iter(devices)).type if devices else "cpu"):
        torch.manual_seed(SEED)
        with _kept(model, exact), torch.set_grad_enabled(gradients):
            given = pytree.tree_map_only(Tensor, torch.clone, inputs)  # a model may work in place
            return pytree.tree_leaves(model(*given))


def difference(found: list[Any], expected: list[Any]) -> str | None:
    """Say how outputs differ by more than rounding, or None."""
    if len(found) != len(expected):
        return f"{len(found)} outputs instead of {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        if not isinstance(other, Tensor):
            if one != other:
                return f"{one!r} instead of {other!r}"
            continue
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"{tuple(one.shape)} {one.dtype} instead of {tuple(other.shape)} {other.dtype}"
        if other.is_floating_point():
            error, norm = (one.double() - other.double()).norm(), other.double().norm()
            if not torch.equal(one.isfinite(), other.isfinite()) or error > TOLERANCE * norm:
                return f"a relative error of {error / norm:.2g}"
        elif not torch.equal(one, other):
            return "other values"
    return None


@contextmanager
def _kept(model: nn.Module, exact: bool) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    layers = [module for module in modes if isinstance(module, SampledBatchNorm)]
    sources = [layer.statistics for layer in layers]
    methods = [layer for layer in layers if isinstance(layer, MethodNorm)]
    try:
        model.train()
        for layer in layers if exact else ():
            layer.statistics = FullBatch()
        for layer in methods:
            layer.exact = True  # what they leave to the next batch must not change it here
        yield
    finally:
        for layer in methods:
            vars(layer).pop("exact", None)
        for layer, source in zip(layers, sources, strict=True):
            layer.statistics = source
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
