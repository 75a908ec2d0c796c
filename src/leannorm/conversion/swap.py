"""convert and revert: torch's BN layers become leannorm's and plain again, in place.

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
from leannorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, fused
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.virtual import VirtualEntry, VirtualMark, detach_entries
from leannorm.records import Change, Refusal, TransformReport
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
    statistics: Statistics,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    guard_nonfinite: bool | None = None,
) -> tuple[M, TransformReport]:
    """Give the BN layers of a model, plain or converted before, this source of statistics.

    The model is changed in place and returned: layers keep their parameters, buffers, hooks and names. With virtual
    samples the model's own call appends them to its input and strips them from its output, in training mode only.
    timm's ``BatchNormAct2d`` keeps its activation.

    Args:
        model: any module.
        statistics: the source.
        filter_fn: takes (module, qualified name); only layers for which it is true are converted. None takes all.
        guard_nonfinite: keep NaN and infinity out of the running statistics; None leaves each layer's own setting.

    Returns:
        The model, and a report of every BN layer: changed, or refused with the reason.

    Raises:
        TypeError: if ``statistics`` is not a source.
        ValueError: if some layers would take virtual samples for real ones, since others have them; nothing is changed.

    >>> model, report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), parse_statistics("grid:1/8"))
    >>> report.changes
    (Change(module='1', action='statistics full -> grid:1/8'),)
    """
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics must be a leannorm source such as GridSampling(1/8), got {statistics!r}; "
            "leannorm.parse_statistics reads spellings such as 'grid:1/8'"
        )
    changes, refusals, chosen, left = [], [], [], []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        reason = refusal(module)
        if filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn left it out"
        if reason is None:
            chosen.append((name, module))
        else:
            left.append((name, module))
            refusals.append(Refusal(name, reason))
    if chosen:
        _check_virtual(statistics, left)
    mark = VirtualMark() if statistics.virtual else None
    for name, module in chosen:
        before = "full" if not isinstance(module, SampledBatchNorm) else str(module.statistics)
        layer = adopt(module)
        assert isinstance(layer, SampledBatchNorm)
        layer.__dict__.pop("plain_before_freeze", None)
        layer.statistics = statistics
        layer.place = zlib.crc32(name.encode())
        layer.virtual_mark = mark
        if guard_nonfinite is not None:
            layer.guard_nonfinite = guard_nonfinite
        changes.append(Change(name, f"statistics {before} -> {statistics}"))
    if changes:
        detach_entries(model)
    if changes and mark is not None:
        VirtualEntry(_virtual_part(statistics), mark).attach(model)
    return model, TransformReport(tuple(changes), tuple(refusals))


def revert(model: M) -> tuple[M, TransformReport]:
    """Make the converted BN layers of a model plain again, in place: `torch.nn.BatchNorm*d`, or what they were.

    Fused modules compute by their own forward again.

    Returns:
        The model, and a report. A layer that was built with an activation is refused: torch's own would drop it.
    """
    changes, refusals = unfuse(model), []
    for name, module in model.named_modules():
        if not isinstance(module, SampledBatchNorm):
            continue
        if module.activation is not None and "original_class" not in module.__dict__:
            refusals.append(Refusal(name, f"it applies {module.activation}, which no plain torch BN layer does"))
            if module.statistics.virtual:  # the model's call appends none any more
                changes.append(Change(name, f"statistics {module.statistics} -> full"))
                module.statistics, module.virtual_mark = FullBatch(), None
            continue
        note = " (no longer frozen)" if module.frozen else ""
        abandon(module)
        changes.append(Change(name, f"{type(module).__name__}{note}"))
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


def _check_virtual(statistics: Statistics, left: list[tuple[str, _BatchNorm]]) -> None:
    for name, module in left:
        has_virtual = isinstance(module, SampledBatchNorm) and module.statistics.virtual > 0
        if has_virtual != (statistics.virtual > 0):
            raise ValueError(
                f"virtual samples pass through all layers of a call, so that all must know of them: converting to "
                f"{statistics} would leave {name!r} ({type(module).__name__}) "
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
