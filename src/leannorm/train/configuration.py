"""What a training run is: everything that its weights depend on."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from leannorm import records
from leannorm.train.pipeline import Preprocessing

ONE_CYCLE = "one-cycle"


@dataclass(frozen=True)
class Configuration:
    """The identity of a run, kept in its checkpoints as plain types: equal configurations train equal weights.

    Args:
        model: spelling of the model.
        data: spelling of the data.
        statistics: spelling of the source of statistics.
        seed: decides initial weights, order, augmentation and what is drawn while training.
        epochs: passes over the training images.
        batch_size: images in a batch.
        learning_rate: the highest of the schedule.
        weight_decay: of all parameters but biases and those of normalization.
        classes: names of the classes.
        training_images: number of training images.
        preprocessing: of the images.
        schedule: "one-cycle", or "drops:50,80", a tenth of the rate from these epochs on.
        accumulate: batches whose gradients are added up for one step of the optimiser.
        gamma_l1: weight of the penalty on the absolute values of batch normalization's gammas.
        channels_last: weights and activations of images lie in memory channels last.
        fuse: batch norm is computed with the addition and the activation after it.
    """

    model: str
    data: str
    statistics: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    classes: tuple[str, ...]
    training_images: int
    preprocessing: Preprocessing
    schedule: str = ONE_CYCLE
    accumulate: int = 1
    gamma_l1: float = 0.0
    channels_last: bool = False
    fuse: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"the seed must be in [0, 2**32), got {self.seed}")
        if self.epochs < 1:
            raise ValueError(f"the number of epochs must be at least 1, got {self.epochs}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"the learning rate must be positive and finite, got {self.learning_rate}")
        if self.accumulate < 1:
            raise ValueError(f"gradients must be accumulated over at least 1 batch, got {self.accumulate}")
        _ = self.drops
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"the weight decay must be at least 0 and finite, got {self.weight_decay}")
        if not (self.gamma_l1 >= 0 and math.isfinite(self.gamma_l1)):
            raise ValueError(f"the L1 penalty on gamma must be at least 0 and finite, got {self.gamma_l1}")

    @property
    def drops(self) -> tuple[int, ...] | None:
        """The epochs at which the learning rate drops; None for the one-cycle schedule."""
        name, colon, epochs = self.schedule.partition(":")
        if self.schedule == ONE_CYCLE:
            return None
        numbers = epochs.split(",")
        if name != "drops" or not colon or not all(number.isdecimal() for number in numbers):
            raise ValueError(
                f"unknown schedule {self.schedule!r}; expected {ONE_CYCLE!r}, or epochs as in 'drops:50,80'"
            )
        return tuple(map(int, numbers))

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Configuration:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            ValueError: if a field is missing, unknown or of another type.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        return records.from_json(cls, json.dumps(defaults | values))  # earlier checkpoints have not all fields

    def difference(self, other: Configuration) -> str | None:
        """Say which fields differ ("seed 1, got 2"); None if none does."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        lines = [f"{name} {mine[name]}, got {others[name]}" for name in mine if mine[name] != others[name]]
        return "; ".join(lines) or None
