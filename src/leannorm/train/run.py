"""One training run, from its arguments to its folder of results."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import leannorm
from leannorm.records import TrainingRun
from leannorm.train import checkpoint
from leannorm.train.configuration import Configuration
from leannorm.train.data import ImageData, open_data
from leannorm.train.environment import environment
from leannorm.train.module import ImageClassifier
from leannorm.train.recorder import BEST, INTERRUPTED, LAST, METRICS, RUN, Recorder

TENSORBOARD = "tensorboard"


def train(
    model: str,
    data: str,
    *,
    statistics: str,
    epochs: int,
    seed: int,
    out: str | Path,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    image_size: int | None = None,
    workers: int = 0,
    accelerator: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> TrainingRun:
    """Train an image classifier whose batch normalization takes its statistics from the given source.

    Writes to ``out``: `last.ckpt` (every epoch), `best.ckpt` (by validation accuracy), `interrupted.ckpt` (where the run
    stopped early), `metrics.csv`, `run.json` and TensorBoard's event files. On a CPU the same arguments give the same
    weights, bit for bit, also if the run was killed and resumed. Seeds torch's, numpy's and Python's generators.

    Args:
        model: spelling of the model (`models.build`).
        data: spelling of the data (`data.open_data`).
        statistics: spelling of the source of statistics (`leannorm.parse_statistics`).
        epochs: passes over the training images.
        seed: decides initial weights, order, augmentation, and what is drawn while training.
        out: folder of the results, made where it is missing.
        batch_size: images in a batch.
        learning_rate: the highest of the one-cycle schedule.
        weight_decay: of all parameters but biases and those of normalization.
        image_size: resize images to this many pixels; None keeps their own size.
        workers: processes that decode images.
        accelerator: Lightning's name of the device: "cpu", "gpu", "auto", ...
        resume: go on with the run in ``out`` from its last finished epoch.
        overwrite: remove the run in ``out`` first.
        progress: show a progress bar.

    Returns:
        The record of the whole run.

    Raises:
        ValueError: if an argument is not what it should be, or a run is resumed with other arguments.
        FileExistsError: if ``out`` holds a run and neither ``resume`` nor ``overwrite`` is given.
        FileNotFoundError: if there is no run to resume.
        KeyboardInterrupt: if the run is interrupted; `last.ckpt` and `interrupted.ckpt` are there.
    """
    out = Path(out)
    _check_folder(out, resume=resume, overwrite=overwrite)
    source = leannorm.parse_statistics(statistics)
    images = open_data(data, batch_size=batch_size, seed=seed, workers=workers, image_size=image_size)
    configuration = Configuration(
        model=model,
        data=data,
        statistics=str(source),
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        classes=images.classes,
        training_images=images.training_images,
        preprocessing=images.preprocessing,
    )
    L.seed_everything(seed, verbose=False)
    network = checkpoint.build(configuration)
    _check_logits(network, configuration)
    step = _check_same_run(out / LAST, configuration) if resume else 0
    if overwrite:
        _remove_run(out)
    out.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(
        model=model,
        data=data,
        statistics=configuration.statistics,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        classes=images.classes,
        input_shape=images.input_shape,
        history=(),
        environment=environment(),
    )
    recorder = Recorder(out, run)
    callbacks: list[Callback] = [recorder]
    if progress:
        callbacks.append(RichProgressBar())
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks,
        # steps that a killed run logged after its last checkpoint are hidden from the resumed one
        logger=TensorBoardLogger(out, TENSORBOARD, "", default_hp_metric=False, purge_step=step or None),
        plugins=[checkpoint.AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    _fit(trainer, ImageClassifier(network, configuration), images, out / LAST if resume else None)
    return recorder.run
