"""What normalization does while training: statistics and gradients of its layers, and the loss along its gradient."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm import records
from leannorm.conversion.methods import has_method
from leannorm.ops.definition import reduced_dimensions
from leannorm.records import LayerPoint, LayerTrace, SmoothnessPoint, TrainingTrace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import lightning.pytorch as L

TRACE = "layers.json"
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the steps along the gradient, in learning rates


class LayerRecorder(Callback):
    """Records every n-th training step in `layers.json`; the training of the unfused model is what it would be without.

    For each normalization layer (also where a method took normalization away): mean, variance and gradient norm of its
    output, and how far its mean has shifted since the step before. For the loss: its range, and the gradient's change,
    along the gradient (Santurkar et al., How Does Batch Normalization Help Optimization?, arXiv 1805.11604). A recorded
    step costs about seven.

    The record begins anew where a training is resumed: its steps before are kept if ``out`` has them.

    Args:
        out: the folder of the run.
        statistics: spelling of what the layers are converted to.
        every: record this often; the shift takes the step before, too.
    """

    def __init__(self, out: Path, statistics: str, *, every: int) -> None:
        if every < 1:
            raise ValueError(f"layers must be recorded every 1 or more steps, got {every}")
        self.out, self.statistics, self.every = out, statistics, every
        self.layers: dict[str, list[LayerPoint]] = {}
        self.smoothness: list[SmoothnessPoint] = []
        self._means: dict[str, tuple[int, Tensor]] = {}
        self._step: int | None = None  # the step under way, if the layers' calls are looked at
        self._batch: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the layers' calls from now on."""
        if trainer.global_step and (self.out / TRACE).exists():
            saved = records.read(TrainingTrace, self.out / TRACE)
            kept = [point for point in saved.smoothness if point.step < trainer.global_step]
            self.smoothness = kept
            self.layers = {
                trace.layer: [p for p in trace.points if p.step < trainer.global_step] for trace in saved.layers
            }
        for name, layer in pl_module.model.named_modules():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            if isinstance(layer, _BatchNorm) or has_method(layer):
                self.layers.setdefault(name, [])  # in the model's order: gradients come in the reverse one
                layer.register_forward_hook(_Watch(self, name))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at this step if it, or the one after it, is recorded."""
        step = trainer.global_step
        recorded = step % self.every == 0
        if batch_idx % trainer.accumulate_grad_batches:  # one batch stands for the step
            self._batch = self._step = None
            return
        self._batch = batch if recorded else None
        self._step = step if recorded or (step + 1) % self.every == 0 else None

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the loss along the gradient of a recorded step."""
        step, self._step = self._step, None
        if self._batch is None or step is None:
            return
        (length,) = {group["lr"] for group in trainer.optimizers[0].param_groups}
        with _unchanged(pl_module):
            self.smoothness.append(_smoothness(pl_module.model, self._batch, step, length))  # pyright: ignore[reportArgumentType]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record."""
        layers = tuple(LayerTrace(name, tuple(points)) for name, points in self.layers.items())
        records.write(self.out / TRACE, TrainingTrace(self.statistics, layers, tuple(self.smoothness)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look no more."""
        for layer in pl_module.modules():
            for key, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, _Watch):
                    del layer._forward_hooks[key]

    def see(self, name: str, output: Tensor) -> None:
        """Record what a layer gives, and wait for its gradient."""
        step = self._step
        if step is None or not torch.is_grad_enabled():
            return
        var, mean = torch.var_mean(output.detach().double(), reduced_dimensions(output), correction=0)
        before = self._means.get(name)
        self._means[name] = (step, mean)
        if step % self.every:
            return
        shift = None
        if before is not None and before[0] == step - 1:
            shift = ((mean - before[1]).norm() / var.sum().sqrt()).item()
        means = mean.abs().mean().item(), var.mean().item()

        def keep(gradient: Tensor) -> None:
            self.layers[name].append(LayerPoint(step, *means, shift, gradient.double().norm().item()))

        output.register_hook(keep)


class _Watch:
    """A forward hook that is told from others by its class."""

    def __init__(self, recorder: LayerRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor) -> None:
        self.recorder.see(self.name, output)

    def __deepcopy__(self, memo: dict) -> _Watch:
        return self


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put back parameters, gradients and buffers."""
    kept = [(p, p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in kept:
                parameter.copy_(value)
                parameter.grad = gradient
            for buffer, value in buffers:
                buffer.copy_(value)


def _smoothness(model: nn.Module, batch: tuple[Tensor, Tensor], step: int, length: float) -> SmoothnessPoint:
    images, labels = batch
    parameters = [p for p in model.parameters() if p.grad is not None]
    values = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(dict(model.named_buffers()))
    devices = [p.device for p in parameters if p.is_cuda][:1]

    def at(a: float) -> Tensor:
        """Give the loss at w - a g, from the same state each time."""
        with torch.no_grad():
            for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
                parameter.copy_(value - a * gradient)
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
        with torch.random.fork_rng(
            devices=devices
        ):  # what it draws is the same each time, and the training's own after
            return F.cross_entropy(model(images), labels)

    gradients = [torch.zeros_like(p) for p in parameters]
    here = at(0.0)
    gradients = [g.detach() for g in torch.autograd.grad(here, parameters)]
    there = torch.autograd.grad(at(length), parameters)
    with torch.no_grad():
        losses = [at(a * length).item() for a in LENGTHS]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    change = math.sqrt(
        sum((a.double() - b.double()).square().sum().item() for a, b in zip(there, gradients, strict=True))
    )
    return SmoothnessPoint(step, here.item(), min(losses), max(losses), change / norm if norm else 0.0)
