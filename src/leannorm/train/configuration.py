"""What a training run is: everything that its weights depend on."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from leannorm import records
from leannorm.train.pipeline import Preprocessing


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
        learning_rate: the highest of the one-cycle schedule.
        weight_decay: of all parameters but biases and those of normalization.
        classes: names of the classes.
        training_images: number of training images.
        preprocessing: of the images.
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

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"the seed must be in [0, 2**32), got {self.seed}")
        if self.epochs < 1:
            raise ValueError(f"the number of epochs must be at least 1, got {self.epochs}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"the learning rate must be positive and finite, got {self.learning_rate}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"the weight decay must be at least 0 and finite, got {self.weight_decay}")

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Configuration:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            ValueError: if a field is missing, unknown or of another type.
        """
        return records.from_json(cls, json.dumps(values))

    def difference(self, other: Configuration) -> str | None:
        """Say which fields differ ("seed 1, got 2"); None if none does."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        lines = [f"{name} {mine[name]}, got {others[name]}" for name in mine if mine[name] != others[name]]
        return "; ".join(lines) or None
