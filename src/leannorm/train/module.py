"""The training step, the optimiser and the schedule."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import lightning.pytorch as L
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR

from leannorm.train.pipeline import stream

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from torch.optim import Optimizer

    from leannorm.train.configuration import Configuration

Batch = tuple[Tensor, Tensor]


class ImageClassifier(L.LightningModule):
    """Trains a model with cross entropy, SGD with Nesterov momentum 0.9, and the configuration's schedule.

    With ``gamma_l1`` the loss has the penalty ``gamma_l1 sum |gamma|`` over all batch normalizations, which makes of
    network slimming (Liu et al., arXiv 1708.06519) a matter of `leannorm.prune`; the logged loss goes without it.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes).
        configuration: of the run; goes into its checkpoints' `hyper_parameters`.
    """

    def __init__(self, model: nn.Module, configuration: Configuration) -> None:
        super().__init__()
        self.save_hyperparameters(dataclasses.asdict(configuration))
        self.configuration = configuration
        self.model = model

    def on_train_epoch_start(self) -> None:
        """Seed the default generators for this epoch, so that a resumed run draws what an unbroken one draws."""
        seed = stream(self.configuration.seed, self.current_epoch).integers(2**32)
        L.seed_everything(int(seed), verbose=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("training_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(labels))
        (learning_rate,) = {group["lr"] for group in self.trainer.optimizers[0].param_groups}
        self.log("learning_rate", learning_rate, on_step=True, batch_size=len(labels))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the subgradient of the penalty, ``gamma_l1 sign(gamma)``, once for each step."""
        if not self.configuration.gamma_l1:
            return
        for gamma in penalized(self.model):
            if gamma.grad is not None:
                gamma.grad.add_(gamma.detach().sign(), alpha=self.configuration.gamma_l1)

    def on_train_epoch_end(self) -> None:
        """Stop a training that has diverged.

        Raises:
            ValueError: if the epoch's loss is not finite.
        """
        loss = self.trainer.callback_metrics["training_loss_epoch"]
        if not loss.isfinite():
            raise ValueError(
                f"training diverged: the loss of epoch {self.current_epoch} is {loss.item()}; lower the learning rate "
                f"({self.configuration.learning_rate:g})"
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of a batch."""
        images, labels = batch
        logits = self.model(images)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log("validation_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("validation_accuracy", accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimiser, which decays neither biases nor normalization's parameters, and the schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.configuration.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        peak = self.configuration.learning_rate
        optimizer = SGD(groups, lr=peak, momentum=0.9, nesterov=True)
        drops = self.configuration.drops
        if drops is not None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": MultiStepLR(optimizer, list(drops))}}
        steps = int(self.trainer.estimated_stepping_batches)
        rise = 0.3 if steps == 5 else 0.2  # torch divides by rise * steps - 1
        schedule = OneCycleLR(optimizer, peak, total_steps=steps, pct_start=rise, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def penalized(model: nn.Module) -> list[nn.Parameter]:
    """The gammas of a model's batch normalizations that are trained, each once."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    gammas = {layer.weight: None for layer in layers if layer.weight is not None and layer.weight.requires_grad}
    return list(gammas)
