"""convert and revert: torch's BN layers become leannorm's, of any source or method, and plain again, in place.

A layer changes its class, as `torch.nn.utils.parametrize` does, and keeps everything else: parameters, buffers, hooks,
identity, state-dict names.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from leannorm.activation import activation_of
from leannorm.conversion import methods
from leannorm.methods import Method
from leannorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, fused
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.entry import detach_entries
from leannorm.nn.masked import LengthEntry, LengthMark, MaskedBatchNorm
from leannorm.nn.moving_average import MovingAverageBatchNorm
from leannorm.nn.virtual import VirtualEntry, VirtualMark
from leannorm.records import Change, Refusal, TransformReport
from leannorm.sampling import DEFAULT_SOURCE
from leannorm.statistics import FullBatch, Statistics, VirtualDataset, WeightedSum

M = TypeVar("M", bound=nn.Module)

OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
_STATE = (
    "statistics",
    "activation",
    "guard_nonfinite",
    "frozen",
    "folds_convolution",
    "place",
    "virtual_mark",
    "original_class",
    "plain_before_freeze",
)


def convert(
    model: M,
    target: Statistics | Method = DEFAULT_SOURCE,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    guard_nonfinite: bool | None = None,
) -> tuple[M, TransformReport]:
    """Give the BN layers of a model, plain or converted before, this source of statistics or method of normalization.

    The model is changed in place and returned: layers keep their parameters, buffers, hooks and names. With virtual
    samples the model's own call appends them to its input and strips them from its output, in training mode only; with
    masked statistics it takes ``lengths=`` of its (N, C, L) input. With moving averages (MABN) all convolutions of the
    model compute with centered weights. timm's ``BatchNormAct2d`` keeps its activation.

    Args:
        model: any module.
        target: a source (`GridSampling`, ...) or a method (`GhostBatch`, `GroupNormalization`, ...);
            ``GridSampling(1 / 8)`` if left out (docs/default-source.md says why).
        filter_fn: takes (module, qualified name); only layers for which it is true are converted. None takes all.
        guard_nonfinite: keep NaN and infinity out of the running statistics; None leaves each layer's own setting.

    Returns:
        The model, and a report of every BN layer: changed, or refused with the reason. A layer that another method's
        state keeps from being BN is refused, but for GroupNorm's kin, whose running statistics begin anew.

    Raises:
        TypeError: if ``target`` is neither.
        ValueError: if some layers would take virtual samples for real ones, since others have them; nothing is changed.

    >>> model, report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> report.changes
    (Change(module='1', action='statistics full -> grid:1/8'),)
    """
    if not isinstance(target, Statistics | Method):
        raise TypeError(
            f"expected a source such as GridSampling(1/8) or a method such as GhostBatch(32), got {target!r}: "
            "leannorm.parse_statistics reads spellings such as 'grid:1/8', leannorm.parse_target those of both"
        )
    changes, refusals, chosen, left = [], [], [], []
    for name, module in model.named_modules():
        if not (isinstance(module, _BatchNorm) or methods.has_method(module)):
            continue
        reason = _why_not(module, target)
        if filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn left it out"
        if reason is None:
            chosen.append((name, module))
        else:
            left.append((name, module))
            refusals.append(Refusal(name, reason))
    virtual = target.virtual if isinstance(target, Statistics) else 0
    if chosen:
        _check_virtual(target, virtual, left)
    mark = VirtualMark() if virtual else None
    for name, module in chosen:
        before = getattr(module, "target", None) or getattr(module, "method", "full")
        layer = methods.leave(module) if methods.has_method(module) else adopt(module)
        assert isinstance(layer, SampledBatchNorm)
        layer.__dict__.pop("plain_before_freeze", None)
        layer.place = zlib.crc32(name.encode())
        layer.virtual_mark = mark
        if guard_nonfinite is not None:
            layer.guard_nonfinite = guard_nonfinite
        if isinstance(target, Method):
            methods.enter(layer, target)
        else:
            layer.statistics = target
        changes.append(Change(name, f"statistics {before} -> {target}"))
    if changes:
        detach_entries(model)
        _attach_lengths(model)
        if isinstance(target, Statistics) and mark is not None:
            VirtualEntry(_virtual_part(target), mark).attach(model)
        if any(isinstance(module, MovingAverageBatchNorm) for module in model.modules()):
            centered, kept = methods.center(model)
            changes, refusals = changes + centered, refusals + kept
        else:
            changes += methods.settle(model)
    return model, TransformReport(tuple(changes), tuple(refusals))


def _attach_lengths(model: nn.Module) -> None:
    """Let a model's call show lengths to its masked layers, if it has any."""
    masked = [module for module in model.modules() if isinstance(module, MaskedBatchNorm)]
    mark = LengthMark()
    for layer in masked:
        layer.length_mark = mark
    if masked:
        LengthEntry(mark).attach(model)


def _why_not(module: nn.Module, target: Statistics | Method) -> str | None:
    """Say why a layer cannot be converted, or None."""
    if methods.has_method(module):
        reason = methods.why_not_left(module) if isinstance(module, SampledBatchNorm) else None
    else:
        assert isinstance(module, _BatchNorm)
        reason = refusal(module)
    if reason is not None or isinstance(target, Statistics):
        return reason
    return methods.why_not(module, target)


def revert(model: M) -> tuple[M, TransformReport]:
    """Make the converted BN layers of a model plain again, in place: `torch.nn.BatchNorm*d`, or what they were.

    Fused modules compute by their own forward again, convolutions with centered weights have these as their weights.

    Returns:
        The model, and a report. Refused are a layer that was built with an activation, which torch's own would drop,
        and one whose method has a state that no BN layer can hold.
    """
    changes, refusals = unfuse(model), []
    for name, module in model.named_modules():
        if not (isinstance(module, SampledBatchNorm) or methods.has_method(module)):
            continue
        reason = methods.why_not_left(module) if methods.has_method(module) else None
        if reason is not None:
            refusals.append(Refusal(name, reason))
            continue
        was_method = methods.has_method(module)
        layer = methods.leave(module) if was_method else module
        assert isinstance(layer, SampledBatchNorm)
        if layer.activation is not None and "original_class" not in layer.__dict__:
            refusals.append(Refusal(name, f"it applies {layer.activation}, which no plain torch BN layer does"))
            if layer.statistics.virtual:  # the model's call appends none any more
                changes.append(Change(name, f"statistics {layer.statistics} -> full"))
                layer.statistics, layer.virtual_mark = FullBatch(), None
            continue
        note = " (no longer frozen)" if layer.frozen else ""
        abandon(layer)
        changes.append(Change(name, f"{type(layer).__name__}{note}"))
    changes += methods.settle(model)
    detach_entries(model)
    return model, TransformReport(tuple(changes), tuple(refusals))


def unfuse(model: nn.Module) -> list[Change]:
    """Give fused modules the class that they had before `fuse`; the BN layers stay leannorm's."""
    changes = []
    for name, module in model.named_modules():
        if isinstance(module, fused.Fused):
            fused.unfuse(module)
            changes.append(Change(name, f"{type(module).__name__}, no longer fused"))
        elif isinstance(module, SampledBatchNorm):
            module.__dict__.pop("folds_convolution", None)
    return changes


def _check_virtual(target: Statistics | Method, virtual: int, left: list[tuple[str, nn.Module]]) -> None:
    for name, module in left:
        has_virtual = isinstance(module, SampledBatchNorm) and module.statistics.virtual > 0
        if has_virtual != (virtual > 0):
            raise ValueError(
                f"virtual samples pass through all layers of a call, so that all must know of them: converting to "
                f"{target} would leave {name!r} ({type(module).__name__}) "
                f"{'with' if has_virtual else 'without'} them; convert the whole model, or another part of it"
            )


def adopt(module: _BatchNorm) -> SampledBatchNorm | str:
    """Make a BN layer leannorm's own, in place; or give the reason why not."""
    reason = refusal(module)
    if reason is not None:
        return reason
    if isinstance(module, SampledBatchNorm):
        return module
    if type(module) not in OURS:
        return _adopt_timm(module)
    module.__class__ = OURS[type(module)]
    assert isinstance(module, SampledBatchNorm)
    return module


def refusal(module: _BatchNorm) -> str | None:
    """Give the reason why a BN layer cannot become leannorm's, or None."""
    if isinstance(module, SampledBatchNorm) or type(module) in OURS:
        return None
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm shares statistics among processes, which sampled layers do not do yet"
    if isinstance(module, _LazyNormBase):
        return "a lazy layer has no channels yet; run one batch through the model first"
    if type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm."):
        return _refusal_of_timm(module)
    return f"{type(module).__name__} is a subclass whose forward may do more than batch normalization"


def abandon(layer: SampledBatchNorm) -> None:
    """Give a layer the class that it had before `adopt`."""
    original = layer.__dict__.get("original_class") or next(cls for cls in OURS if isinstance(layer, cls))
    for name in _STATE:
        layer.__dict__.pop(name, None)
    layer.__class__ = original


def _refusal_of_timm(module: _BatchNorm) -> str | None:
    drop, act = module.get_submodule("drop"), module.get_submodule("act")
    if not isinstance(drop, nn.Identity):
        return f"BatchNormAct2d with {type(drop).__name__} between normalization and activation"
    if not isinstance(act, nn.Identity) and activation_of(act) is None:
        return f"BatchNormAct2d with {type(act).__name__}, which leannorm's layers do not apply"
    return None


def _adopt_timm(module: _BatchNorm) -> SampledBatchNorm:
    original = type(module)
    module.__class__ = BatchNorm2d
    assert isinstance(module, SampledBatchNorm)
    module.activation = activation_of(module.get_submodule("act"))
    module.__dict__["original_class"] = original
    return module


def _virtual_part(statistics: Statistics) -> VirtualDataset:
    sources = statistics.sources if isinstance(statistics, WeightedSum) else (statistics,)
    (virtual,) = (source for source in sources if isinstance(source, VirtualDataset))
    return virtual
