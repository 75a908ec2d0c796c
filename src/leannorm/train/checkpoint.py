"""Checkpoint files: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import leannorm
from leannorm import records
from leannorm.records import TrainingRun
from leannorm.train import models
from leannorm.train.configuration import Configuration
from leannorm.train.data import ImageData, open_data

try:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
except ImportError as missing:
    raise ImportError(f"Checkpoints need Lightning: pip install 'leannorm[train]' (got: {missing})") from missing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary name beside its own and renames it: a killed run leaves the old one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, safe on disk when this returns."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.partial")  # one name: what a killed run left is overwritten
        with temporary.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: str | Path) -> tuple[nn.Module, TrainingRun]:
    """Rebuild a trained model from its checkpoint.

    The model is built from the spelling that the checkpoint names, so a factory of the user's own must still be there.

    Args:
        path: `last.ckpt`, `best.ckpt` or `interrupted.ckpt` of `leannorm train`.

    Returns:
        The converted model in eval mode with the checkpoint's weights, and the record of its training so far.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, no checkpoint of `leannorm train`, holds anything but tensors and plain
            data, or its weights do not fit the model that it names.
    """
    checkpoint = read(path)
    configuration = Configuration.from_plain(checkpoint["hyper_parameters"])
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace of their drawing
        model = build(configuration)
    reason = why_not_loaded(checkpoint, model)
    if reason is not None:
        raise ValueError(f"{path} is a checkpoint of another architecture than {configuration.model}: {reason}")
    model.load_state_dict(_weights(checkpoint))
    return model.eval(), records.from_json(TrainingRun, checkpoint["training_run"])


def why_not_loaded(checkpoint: dict[str, Any], model: nn.Module) -> str | None:
    """Name what of a checkpoint's weights is missing, unknown or of another shape in a model; None if nothing is."""
    weights, expected = _weights(checkpoint), model.state_dict()
    missing, unknown = [n for n in expected if n not in weights], [n for n in weights if n not in expected]
    shapes = [n for n in expected if n in weights and expected[n].shape != weights[n].shape]
    if not (missing or unknown or shapes):
        return None
    return f"missing {_first(missing)}; unknown {_first(unknown)}; of another shape {_first(shapes)}"


def open_data_of(path: str | Path, data: str | None = None, *, batch_size: int, workers: int = 0) -> ImageData:
    """Open data for the model in a checkpoint, preprocessed as its training data were.

    Args:
        path: the checkpoint.
        data: spelling of the data; None means those that it was trained on.
        batch_size: images in a batch.
        workers: processes that decode images.

    Raises:
        ValueError: as `load` and `open_data`, and if the data have other classes or shapes than the training data.
    """
    configuration = Configuration.from_plain(read(path)["hyper_parameters"])
    data = configuration.data if data is None else data
    opened = open_data(
        data,
        batch_size=batch_size,
        seed=configuration.seed,
        workers=workers,
        preprocessing=configuration.preprocessing,
    )
    if opened.classes != configuration.classes:
        raise ValueError(
            f"{data} has the classes {_first(opened.classes)}, {path} was trained on {_first(configuration.classes)}"
        )
    return opened


def build(configuration: Configuration) -> nn.Module:
    """Build and convert the model of a run, with fresh weights.

    Raises:
        ValueError: as `models.build`, and if no layer of the model can take the statistics asked for.
    """
    channels = configuration.preprocessing.input_shape[0]
    model = models.build(configuration.model, classes=len(configuration.classes), channels=channels)
    target = leannorm.parse_target(configuration.statistics)
    model, report = leannorm.convert(model, target, guard_nonfinite=True)
    if not report.changes:
        reasons = "; ".join(f"{refusal.module}: {refusal.reason}" for refusal in report.refusals)
        raise ValueError(f"{configuration.model} has no batch normalization to convert{reasons and ': '}{reasons}")
    return model


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file of `leannorm train` without running code that it may hold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, no checkpoint of `leannorm train`, or holds anything but tensors and plain
            data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}" + (" (a folder)" if path.is_dir() else ""))
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        raise ValueError(f"{path} is truncated: take another" if zipped else f"{path} is not a checkpoint")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load checks no sums
    if damaged is not None:
        raise ValueError(f"{path} is damaged at {damaged}: take another")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain data, and reading that could run code: refused ({error})"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not a checkpoint: {error}") from error
    expected = {"hyper_parameters", "state_dict", "training_run"}
    if not isinstance(checkpoint, dict) or not expected <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of `leannorm train`: expected the entries {sorted(expected)}")
    return checkpoint


def _weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}


def _first(names: list[str] | tuple[str, ...]) -> str:
    return (", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")) or "none"
