"""freeze and unfreeze: running statistics that survive `.train()`."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm.conversion.swap import abandon, adopt
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.records import Change, Refusal, TransformReport

M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> tuple[M, TransformReport]:
    """Make every BN layer use, and no longer change, its running statistics, whatever `.train()` says; in place.

    gamma and beta go on learning; `requires_grad_(False)` stops them.

    Returns:
        The model, and a report of every BN layer: frozen, or refused with the reason.
    """
    changes, refusals = [], []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None:
            refusals.append(Refusal(name, "it has no running statistics to be frozen to"))
            continue
        plain = not isinstance(module, SampledBatchNorm)
        layer = adopt(module)
        if isinstance(layer, str):
            refusals.append(Refusal(name, layer))
            continue
        if not layer.frozen:
            layer.frozen = True
            layer.__dict__["plain_before_freeze"] = plain
            layer.eval()
            changes.append(Change(name, "frozen"))
    return model, TransformReport(tuple(changes), tuple(refusals))


def unfreeze(model: M) -> tuple[M, TransformReport]:
    """Undo `freeze`, in place; the layers take the model's mode."""
    changes = []
    for name, module in model.named_modules():
        if isinstance(module, SampledBatchNorm) and module.frozen:
            module.frozen = False
            if module.__dict__.pop("plain_before_freeze", False):
                abandon(module)
            module.train(model.training)
            changes.append(Change(name, "unfrozen"))
    return model, TransformReport(tuple(changes))
