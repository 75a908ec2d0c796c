"""What a training did, epoch by epoch, and what its layers did meanwhile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """Metrics of one training epoch; losses in nats, accuracies in [0, 1]."""

    epoch: int
    training_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class TrainingRun:
    """What was trained, how, and how it went."""

    model: str
    data: str
    statistics: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    history: tuple[Epoch, ...]
    environment: Environment
    gamma_l1: float = 0.0
    channels_last: bool = False
    fuse: bool = False


@dataclass(frozen=True)
class Environment:
    """Where a result was made: machine, versions, and the commit of leannorm ("unknown" outside a repository)."""

    machine: str
    cores: int
    python: str
    versions: tuple[tuple[str, str], ...]
    commit: str


@dataclass(frozen=True)
class LayerPoint:
    """What a normalization layer gives in one training step, over all its channels.

    ``mean`` and ``variance`` are those of its output: the mean over channels of |mean|, and of the variance. ``shift``
    is how far the channels' means have moved since the step before, ||mean_t - mean_(t-1)|| / ||sigma_t||, None in the
    first step. ``gradient_norm`` is the 2-norm of the loss's gradient at that output.
    """

    step: int
    mean: float
    variance: float
    shift: float | None
    gradient_norm: float


@dataclass(frozen=True)
class LayerTrace:
    """A layer's points, by its qualified name."""

    layer: str
    points: tuple[LayerPoint, ...]


@dataclass(frozen=True)
class SmoothnessPoint:
    """The loss of one batch along its own gradient, w - a g.

    ``lowest`` and ``highest`` are the extremes over the lengths a; ``gradient_change`` is ||g(w - a g) - g|| / ||g|| at
    the training's own step length.
    """

    step: int
    loss: float
    lowest: float
    highest: float
    gradient_change: float


@dataclass(frozen=True)
class TrainingTrace:
    """What the layers and the loss did while training."""

    statistics: str
    layers: tuple[LayerTrace, ...]
    smoothness: tuple[SmoothnessPoint, ...]
