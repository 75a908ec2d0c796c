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
from leannorm.nn.virtual import VirtualEntry
from leannorm.records import Change, Refusal, TransformReport
from leannorm.statistics import FullBatch


class _Pool:
    """Moments of many batches, merged without cancellation (Chan et al., 1979), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, count: int, mean: Tensor, var: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + var * count + delta**2 * (self.count * count / total)
        self.count = total


def recalibrate(model: nn.Module, batches: Iterable[Any], *, limit: int = 200) -> TransformReport:
    r"""Replace the running statistics by those of many batches pooled, with the weights as they are; in place.

    .. math:: \mu = E[x], \quad \sigma^2 = E[(x - \mu)^2] \text{ over the sampled elements of all batches}

    BN layers normalize with their batch's statistics while all else runs in eval mode (no dropout). Each layer pools the
    elements that its own source samples. Frozen layers and those without running statistics are refused. Modes and
    momenta are restored, and after an error the old statistics too. Give batches as training saw them, augmented alike.

    Args:
        model: any module with BN layers, torch's or leannorm's.
        batches: inputs; of a tuple or list the first item is the input; a dict is passed as keyword arguments.
        limit: use this many batches at most.

    Returns:
        A report of every BN layer.

    Raises:
        ValueError: if there are no batches, or no BN layer to recalibrate.

    Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576.
    """
    layers, refusals = _layers(model)
    if not layers:
        raise ValueError(f"recalibrate found no BN layer with running statistics in {type(model).__name__}")
    pools = {name: _Pool() for name in layers}
    old = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in layers.items()}
    seen = 0
    try:
        with _batch_statistics(model, layers, pools), torch.no_grad():
            for batch in islice(batches, limit):
                _call(model, batch)
                seen += 1
        if not seen:
            raise ValueError("recalibrate got no batches")
    except BaseException:
        for name, layer in layers.items():
            layer.running_mean.copy_(old[name][0])
            layer.running_var.copy_(old[name][1])
        raise
    changes = []
    for name, layer in layers.items():
        pool = pools[name]
        if pool.count < 2:
            layer.running_mean.copy_(old[name][0])
            layer.running_var.copy_(old[name][1])
            refusals.append(Refusal(name, "the batches never reached it"))
            continue
        layer.running_mean.copy_(pool.mean)
        layer.running_var.copy_(pool.squares / (pool.count - 1))
        changes.append(Change(name, f"running statistics of {pool.count} elements a channel in {seen} batches"))
    return TransformReport(tuple(changes), tuple(refusals))


def _layers(model: nn.Module) -> tuple[dict[str, _BatchNorm], list[Refusal]]:
    layers, refusals = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None:
            refusals.append(Refusal(name, "it has no running statistics"))
        elif isinstance(module, SampledBatchNorm) and module.frozen:
            refusals.append(Refusal(name, "it is frozen"))
        else:
            layers[name] = module
    return layers, refusals


@contextmanager
def _batch_statistics(model: nn.Module, layers: dict[str, _BatchNorm], pools: dict[str, _Pool]) -> Iterator[None]:
    """Set the modes, and let each layer's running statistics be the last batch's, which a hook then pools."""
    modes = {module: module.training for module in model.modules()}
    momenta = {layer: (layer.momentum, layer.num_batches_tracked.clone()) for layer in layers.values()}

    def pooling(pool: _Pool):
        def hook(layer, inputs, output):
            x = inputs[0]
            source = layer.statistics if isinstance(layer, SampledBatchNorm) else FullBatch()
            regions = source.regions(x.shape, getattr(layer, "place", 0))
            count = round(1 / regions.inverse_count)
            biased = layer.running_var.double() / regions.unbiased
            pool.add(count, layer.running_mean.double(), biased)

        return hook

    handles = [layer.register_forward_hook(pooling(pools[name])) for name, layer in layers.items()]
    try:
        for module in modes:
            module.training = module in momenta or _is_entry(module)
        for layer in momenta:
            layer.momentum = 1.0
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for layer, (momentum, tracked) in momenta.items():
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(tracked)


def _is_entry(module: nn.Module) -> bool:
    return any(isinstance(getattr(h, "__self__", None), VirtualEntry) for h in module._forward_pre_hooks.values())


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, tuple | list) else batch)
