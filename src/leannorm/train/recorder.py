"""Keeps the folder of a run: checkpoints, metrics and the record of the run."""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Checkpoint

from leannorm import records
from leannorm.records import Epoch, TrainingRun

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as L

LAST, BEST, INTERRUPTED = "last.ckpt", "best.ckpt", "interrupted.ckpt"
METRICS, RUN = "metrics.csv", "run.json"


class Recorder(Checkpoint):
    """After each epoch writes `metrics.csv`, `run.json`, `best.ckpt` (by validation accuracy) and `last.ckpt`.

    The history travels in the checkpoints and the other files are written from it, so that they hold one row an epoch
    whenever a run was killed and resumed. A run that is interrupted leaves `interrupted.ckpt`, with the weights of that
    moment; it goes on from `last.ckpt`, which is always at an epoch's boundary.

    Args:
        out: the folder.
        run: the record of the run, without its history.
    """

    def __init__(self, out: Path, run: TrainingRun) -> None:
        self.out = out
        self.run = run
        self._started = False
        self._epoch_start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files as they are at this boundary."""
        self._write_records()
        if not self.run.history:
            trainer.save_checkpoint(self.out / LAST, weights_only=False)
        self._started = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._epoch_start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the epoch and save it."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        epoch = Epoch(
            epoch=trainer.current_epoch,
            training_loss=metrics["training_loss_epoch"],
            validation_loss=metrics["validation_loss"],
            validation_accuracy=metrics["validation_accuracy"],
            learning_rate=metrics["learning_rate"],
            seconds=time.perf_counter() - self._epoch_start,
        )
        best = max((past.validation_accuracy for past in self.run.history), default=-1.0)
        self.run = dataclasses.replace(self.run, history=(*self.run.history, epoch))
        self._write_records()
        if epoch.validation_accuracy > best:
            trainer.save_checkpoint(self.out / BEST, weights_only=False)
        trainer.save_checkpoint(self.out / LAST, weights_only=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what an earlier interruption left: the run is whole."""
        (self.out / INTERRUPTED).unlink(missing_ok=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the weights of this moment."""
        if self._started:
            trainer.save_checkpoint(self.out / INTERRUPTED, weights_only=False)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the record of the run into a checkpoint, as JSON."""
        checkpoint["training_run"] = records.to_json(self.run)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the history up again."""
        saved = records.from_json(TrainingRun, checkpoint["training_run"])
        self.run = dataclasses.replace(self.run, history=saved.history)

    def _write_records(self) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, [field.name for field in dataclasses.fields(Epoch)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(epoch) for epoch in self.run.history)
        records.write_text(self.out / METRICS, table.getvalue())
        records.write(self.out / RUN, self.run)
