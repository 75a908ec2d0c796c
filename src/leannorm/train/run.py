"""One training run, from its arguments to its folder of results."""

from __future__ import annotations

import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import leannorm
from leannorm.methods import AccumulatedBatch
from leannorm.records import TrainingRun
from leannorm.train import checkpoint
from leannorm.train.configuration import ONE_CYCLE, Configuration
from leannorm.train.data import ImageData, open_data
from leannorm.train.environment import environment
from leannorm.train.layers import TRACE, LayerRecorder
from leannorm.train.module import ImageClassifier, penalized
from leannorm.train.recorder import BEST, INTERRUPTED, LAST, METRICS, RUN, Recorder

try:
    import lightning.pytorch as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Callback, RichProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger
except ImportError as missing:
    raise ImportError(f"Training needs Lightning: pip install 'leannorm[train]' (got: {missing})") from missing

TENSORBOARD = "tensorboard"
POINTS_LOGGED = 100  # of an epoch, by the logger


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
    schedule: str = ONE_CYCLE,
    accumulate: int = 1,
    gamma_l1: float = 0.0,
    image_size: int | None = None,
    workers: int = 0,
    accelerator: str = "auto",
    channels_last: bool = True,
    fuse: bool = True,
    record_layers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> TrainingRun:
    """Train an image classifier whose batch normalization takes its statistics from the given source, or its method.

    Writes to ``out``: `last.ckpt` (every epoch), `best.ckpt` (by validation accuracy), `interrupted.ckpt` (where it
    stopped early), `metrics.csv`, `run.json` and TensorBoard's event files. On a CPU the same arguments give the same
    weights, bit for bit, also if the run was killed and resumed. Seeds torch's, numpy's and Python's generators.

    Args:
        model: spelling of the model (`models.build`).
        data: spelling of the data (`data.open_data`).
        statistics: spelling of the source of statistics, or of a method (`leannorm.parse_target`).
        epochs: passes over the training images.
        seed: decides initial weights, order, augmentation, and what is drawn while training.
        out: folder of the results, made where it is missing.
        batch_size: images in a batch.
        learning_rate: the highest of the schedule.
        weight_decay: of all parameters but biases and those of normalization.
        schedule: "one-cycle", or "drops:50,80" for a tenth of the rate from these epochs on.
        accumulate: batches whose gradients make one step of the optimiser; an epoch leaves out the batches of a last
            step that would have fewer.
        gamma_l1: weight of the penalty ``sum |gamma|`` over all batch normalizations, for channels to be pruned by.
        image_size: resize images to this many pixels; None keeps their own size.
        workers: processes that decode images.
        accelerator: Lightning's name of the device: "cpu", "gpu", "auto", ...
        channels_last: keep weights and activations of images channels last, which most convolutions compute faster.
        fuse: compute batch norm with the addition and the activation after it (`leannorm.fuse`). Layers that are
            recorded are not fused, since their own outputs must be seen.
        record_layers: record layers and loss every so many steps in `layers.json` (`layers.LayerRecorder`), or not.
        resume: go on with the run in ``out`` from its last finished epoch.
        overwrite: remove the run in ``out`` first.
        progress: show a progress bar.

    Returns:
        The record of the whole run.

    Raises:
        ValueError: if an argument is not what it should be, a run is resumed with other arguments or a model of other
            weights, or training diverged to a loss that is not finite.
        FileExistsError: if ``out`` holds a run and neither ``resume`` nor ``overwrite`` is given.
        FileNotFoundError: if there is no run to resume.
        KeyboardInterrupt: on SIGINT, after `interrupted.ckpt` is written.
        SystemExit: on SIGTERM, likewise.
    """
    out = Path(out)
    _check_folder(out, resume=resume, overwrite=overwrite)
    source = leannorm.parse_target(statistics)
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
        schedule=schedule,
        accumulate=accumulate,
        gamma_l1=gamma_l1,
        channels_last=channels_last,
        fuse=fuse and record_layers is None,
    )
    if isinstance(source, AccumulatedBatch) and source.steps != accumulate:
        raise ValueError(
            f"{source} pools {source.steps} batches a step, got accumulate={accumulate}: give both the same"
        )
    batches = len(images.train_dataloader())
    if batches < accumulate:
        raise ValueError(f"an epoch has {batches} batches: fewer than the {accumulate} to accumulate over")
    L.seed_everything(seed, verbose=False)
    network = checkpoint.build(configuration)
    if configuration.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if configuration.fuse:
        leannorm.fuse(network)
    if gamma_l1 and not penalized(network):
        raise ValueError(f"{model} with {source} has no gamma of batch normalization to penalize: leave gamma_l1 out")
    _check_logits(network, configuration)
    step = _check_same_run(out / LAST, configuration, network) if resume else None
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
        gamma_l1=gamma_l1,
        channels_last=channels_last,
        fuse=configuration.fuse,
    )
    recorder = Recorder(out, run)
    callbacks: list[Callback] = [recorder]
    if record_layers is not None:
        callbacks.append(LayerRecorder(out, configuration.statistics, every=record_layers))
    if progress:
        callbacks.append(RichProgressBar())
    trainer = _trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        limit_train_batches=batches // accumulate * accumulate,
        callbacks=callbacks,
        # steps that a killed run logged after its last checkpoint are hidden from the resumed one
        logger=TensorBoardLogger(out, TENSORBOARD, "", default_hp_metric=False, purge_step=step),
        plugins=[checkpoint.AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        log_every_n_steps=max(1, batches // accumulate // POINTS_LOGGED),
        enable_checkpointing=True,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    if overwrite:
        _remove_run(out)
    out.mkdir(parents=True, exist_ok=True)
    _fit(trainer, ImageClassifier(network, configuration), images, out / LAST if resume else None)
    return recorder.run


def default_folder(model: str, data: str, statistics: str) -> Path:
    """Name the folder of a run that was given none, `runs/MODEL-DATA-STATISTICS`, whatever its spellings hold."""
    spellings = (model, Path(data).name, statistics)
    return Path("runs") / "-".join(re.sub(r"[^\w.@+]+", "_", spelling) for spelling in spellings)


def _trainer(**options: Any) -> L.Trainer:
    try:
        return L.Trainer(**options)
    except MisconfigurationException as error:  # an accelerator that is not there
        raise ValueError(str(error)) from error


def _fit(trainer: L.Trainer, module: ImageClassifier, images: ImageData, ckpt_path: Path | None) -> None:
    try:
        with warnings.catch_warnings():
            # decoding in this process is our default: it serves small images best
            warnings.filterwarnings("ignore", ".*does not have many workers.*", category=UserWarning)
            # Lightning 2.6 still asks torch's pytree in the old way
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", category=FutureWarning)
            trainer.fit(module, images, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as error:
        # Lightning makes SystemExit of both, with codes that hide which it was
        if trainer.received_sigterm:
            raise SystemExit(128 + signal.SIGTERM) from error
        raise KeyboardInterrupt from error


def _check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: give one of them")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, expected a folder: choose another name")
    held = [name for name in (LAST, BEST, INTERRUPTED, METRICS, RUN) if (out / name).exists()]
    if held and not (resume or overwrite):
        raise FileExistsError(
            f"{out} already holds a run ({', '.join(held)}): --resume goes on with it, --overwrite removes it first"
        )
    if resume and LAST not in held:
        raise FileNotFoundError(f"{out} holds no run to resume (no {LAST}): start it without --resume")


def _check_same_run(last: Path, configuration: Configuration, network: nn.Module) -> int:
    """Return the step that the saved run has come to, if it is this one."""
    saved = checkpoint.read(last)
    difference = Configuration.from_plain(saved["hyper_parameters"]).difference(configuration)
    if difference is not None:
        raise ValueError(
            f"{last.parent} holds a run of other arguments: it has {difference}. Resume with the same arguments, or "
            "choose another folder"
        )
    reason = checkpoint.why_not_loaded(saved, network)
    if reason is not None:
        raise ValueError(
            f"{last} holds other weights than {configuration.model} has now: {reason}. Resume with the model as it "
            "was, or train this one in another folder"
        )
    return saved["global_step"]


def _check_logits(model: nn.Module, configuration: Configuration) -> None:
    shape = configuration.preprocessing.input_shape
    expected = (2, len(configuration.classes))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    except RuntimeError as error:
        raise ValueError(f"{configuration.model} does not take images of shape {shape}: {error}") from error
    finally:
        model.train(training)
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if got != expected:
        raise ValueError(
            f"{configuration.model} maps images {(2, *shape)} to {got}, expected logits {expected}: "
            "a factory must take num_classes=, and its model return one tensor"
        )


def _remove_run(out: Path) -> None:
    for name in (LAST, BEST, INTERRUPTED, METRICS, RUN, TRACE):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / TENSORBOARD, ignore_errors=True)
