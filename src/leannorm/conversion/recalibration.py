"""recalibrate: running statistics recomputed over batches with frozen weights (precise BN)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.entry import is_entry
from leannorm.nn.method import MethodNorm
from leannorm.nn.virtual import VirtualEntry
from leannorm.records import Change, Refusal, TransformReport
from leannorm.statistics import FullBatch


class _Pool:
    """One layer's moments over all batches, merged without cancellation (Chan et al., 1979), in float64.

    The layer runs with momentum 1, so that after each forward its running statistics are the batch's own; a hook
    pools them.
    """

    def __init__(self, name: str, layer: _BatchNorm, running_mean: Tensor, running_var: Tensor) -> None:
        self.name = name
        self.layer = layer
        self.running = running_mean, running_var
        self.before = running_mean.clone(), running_var.clone()
        self.momentum = layer.momentum
        self.guard = isinstance(layer, SampledBatchNorm) and layer.guard_nonfinite
        self.tracked = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
        self.count = 0
        self.mean = torch.zeros_like(running_mean, dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        """Merge what the forward that has just ended saw: a forward hook."""
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:
            return
        sampled = isinstance(layer, SampledBatchNorm)
        source, place = (layer.statistics, layer.place) if sampled else (FullBatch(), 0)
        regions = source.regions_of(x, place)
        count = round(1 / regions.inverse_count)
        mean, var = self.running[0].double(), self.running[1].double() / regions.unbiased
        if not (mean.isfinite().all() and var.isfinite().all()):
            raise ValueError(
                f"recalibrate met NaN or infinity in the statistics of layer {self.name!r} ({self.running[1].dtype}); "
                "leave out the batches that cause it, or recalibrate in float32. The old statistics are kept"
            )
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * (count / total)
        self.squares += var * count + delta**2 * (self.count * count / total)
        self.count = total

    def keep(self) -> None:
        """Make the pooled moments the layer's running statistics."""
        self.running[0].copy_(self.mean)
        self.running[1].copy_(self.squares / (self.count - 1))

    def restore_statistics(self) -> None:
        """Give the layer the running statistics that it had."""
        for running, before in zip(self.running, self.before, strict=True):
            running.copy_(before)

    def track_last_batch(self) -> None:
        """Let the running statistics be those of the last batch, whatever they are."""
        self.layer.momentum = 1.0
        if isinstance(self.layer, SampledBatchNorm):
            self.layer.guard_nonfinite = False
        if isinstance(self.layer, MethodNorm):
            self.layer.exact = True

    def restore_tracking(self) -> None:
        """Give the layer the momentum, the guard and the number of batches that it had."""
        self.layer.momentum = self.momentum
        if isinstance(self.layer, SampledBatchNorm):
            self.layer.guard_nonfinite = self.guard
        if isinstance(self.layer, MethodNorm):
            vars(self.layer).pop("exact", None)
        if self.layer.num_batches_tracked is not None and self.tracked is not None:
            self.layer.num_batches_tracked.copy_(self.tracked)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, limit: int = 200) -> TransformReport:
    r"""Replace the running statistics by those of many batches pooled, with the weights as they are; in place.

    .. math:: \mu = E[x], \quad \sigma^2 = E[(x - \mu)^2] \text{ over the sampled elements of all batches}

    BN layers normalize with their batch's statistics while all else runs in eval mode (no dropout). Each layer pools
    the elements that its own source samples; layers of a method normalize as exact BN meanwhile. Frozen layers, those
    without running statistics and those of a method whose statistics are others than BN's are refused. Modes and
    momenta are restored, and after an error the old statistics too. Give batches as training saw them, augmented alike.

    Args:
        model: any module with BN layers, torch's or leannorm's.
        batches: inputs; of a tuple or list the first item is the input; a dict is passed as keyword arguments.
        limit: use this many batches at most.

    Returns:
        A report of every BN layer.

    Raises:
        ValueError: if there are no batches, no BN layer to recalibrate, or NaN or infinity among the statistics.

    Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576.

    >>> from leannorm import FullBatch
    >>> model = nn.BatchNorm1d(2)
    >>> recalibrate(model, [torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[4.0, 1.0], [6.0, 5.0]])]).changes
    (Change(module='', action='running statistics of 4 elements a channel in 2 batches'),)
    >>> model.running_mean
    tensor([3., 2.])
    """
    pools, refusals = _pools(model)
    if not pools:
        raise ValueError(f"recalibrate found no BN layer with running statistics in {type(model).__name__}")
    seen = 0
    try:
        with _batch_statistics(model, pools):
            for batch in islice(batches, limit):
                _call(model, batch)
                seen += 1
        if not seen:
            raise ValueError("recalibrate got no batches")
    except BaseException:
        for pool in pools:
            pool.restore_statistics()
        raise
    changes = []
    for pool in pools:
        if pool.count < 2:
            pool.restore_statistics()
            refusals.append(Refusal(pool.name, "the batches never reached it"))
        else:
            pool.keep()
            action = f"running statistics of {pool.count} elements a channel in {seen} batches"
            changes.append(Change(pool.name, action))
    return TransformReport(tuple(changes), tuple(refusals))


def can_recalibrate(model: nn.Module) -> bool:
    """Whether a model has a layer whose running statistics `recalibrate` can recompute."""
    return bool(_pools(model)[0])


def _pools(model: nn.Module) -> tuple[list[_Pool], list[Refusal]]:
    pools, refusals = [], []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None or module.running_var is None:
            refusals.append(Refusal(name, "it has no running statistics"))
        elif isinstance(module, SampledBatchNorm) and module.frozen:
            refusals.append(Refusal(name, "it is frozen"))
        elif isinstance(module, MethodNorm) and module.why_not_recalibrated is not None:
            refusals.append(Refusal(name, f"{module.method}: {module.why_not_recalibrated}"))
        else:
            pools.append(_Pool(name, module, module.running_mean, module.running_var))
    return pools, refusals


@contextmanager
def _batch_statistics(model: nn.Module, pools: list[_Pool]) -> Iterator[None]:
    """Let the pools' layers, and a virtual entry that feeds them, be in training mode, and all else in eval mode."""
    modes = {module: module.training for module in model.modules()}
    layers = {pool.layer for pool in pools}
    handles = [pool.layer.register_forward_hook(pool.add, with_kwargs=True) for pool in pools]
    try:
        for module in modes:
            module.training = module in layers or is_entry(module, VirtualEntry)
        for pool in pools:
            pool.track_last_batch()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for pool in pools:
            pool.restore_tracking()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, tuple | list) else batch)
