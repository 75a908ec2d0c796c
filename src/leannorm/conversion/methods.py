"""How a layer of leannorm's becomes one of a method, and BN again; and the convolutions that change with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leannorm.methods import Method
from leannorm.nn import METHOD_LAYERS, group
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.method import MethodNorm
from leannorm.nn.moving_average import CENTERED, centered
from leannorm.records import Change, Refusal

_ORIGINAL = {ours: theirs for theirs, ours in CENTERED.items()}
_STATE = ("method", "exact", "plain_class", "length_mark")


def has_method(module: nn.Module) -> bool:
    """Whether a module is what a method made of a BN layer."""
    return isinstance(module, MethodNorm) or "batch_norm_state" in vars(module)


def why_not(layer: nn.Module, method: Method) -> str | None:
    """Say why a BN layer, or what a method made of one, cannot normalize by a method, or None."""
    if isinstance(method, group.PER_SAMPLE):
        return group.why_not(layer, method)
    return METHOD_LAYERS[type(method)].why_not(layer, method)


def enter(layer: SampledBatchNorm, method: Method) -> None:
    """Let a BN layer of leannorm's normalize by a method, in place."""
    if isinstance(method, group.PER_SAMPLE):
        group.enter(layer, method)
        return
    vars(layer)["plain_class"] = type(layer)
    vars(layer).pop("statistics", None)
    layer.__class__ = METHOD_LAYERS[type(method)]
    assert isinstance(layer, MethodNorm)
    layer.enter(method)


def why_not_left(module: nn.Module) -> str | None:
    """Say why a layer of a method cannot compute in eval mode as it does while being BN, or None."""
    if isinstance(module, MethodNorm):
        return module.why_not_left()
    if has_method(module):
        return (
            f"{module.method} keeps no running statistics, without which batch normalization has no eval mode: "
            "leannorm.convert(model, leannorm.FullBatch()) lets them begin anew, to be trained or recalibrated"
        )
    return None


def leave(module: nn.Module) -> SampledBatchNorm:
    """Make a layer of a method BN again, in place."""
    if not isinstance(module, MethodNorm):
        return group.leave(module)
    layer: Any = module
    plain_class = module.plain_class
    assert plain_class is not None
    module.leave()
    for name in _STATE:
        vars(layer).pop(name, None)
    layer.__class__ = plain_class
    assert isinstance(layer, SampledBatchNorm)
    return layer


def center(model: nn.Module) -> tuple[list[Change], list[Refusal]]:
    """Let all convolutions of a model compute with centered weights."""
    changes, refusals = [], []
    for name, module in model.named_modules():
        if type(module) in CENTERED:
            module.__class__ = CENTERED[type(module)]
            changes.append(Change(name, "computes with centered weights"))
        elif isinstance(module, tuple(CENTERED)) and type(module) not in _ORIGINAL:
            refusals.append(Refusal(name, f"{type(module).__name__} is a subclass: its weights are not centered"))
    return changes, refusals


@torch.no_grad()
def settle(model: nn.Module) -> list[Change]:
    """Let convolutions with centered weights be torch's again, with the weights that they computed with."""
    changes = []
    for name, module in model.named_modules():
        if type(module) in _ORIGINAL:
            module.__class__ = _ORIGINAL[type(module)]
            assert isinstance(module.weight, nn.Parameter)
            module.weight.copy_(centered(module.weight))
            changes.append(Change(name, f"{type(module).__name__} with the centered weights"))
    return changes
