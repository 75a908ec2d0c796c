"""What to measure, as frozen values that validate themselves."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TypeVar

import torch

from leannorm.spelling import parse_statistics

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """What every kind of benchmark asks.

    Args:
        image_size: pixels of a side of the images.
        batch: images.
        statistics: spellings of the sources that leannorm is timed with.
        compiled: time torch.compile too.
        device: cpu or cuda.
        repeats: rounds of samples.
        seed: of the data and of the order of the samples.
        quick: the shortest samples of tiny tensors, which prove nothing about speed: see `quickly`.

    Raises:
        ValueError: for what is unknown, not positive, or needs more than a layer.
    """

    image_size: int = 224
    batch: int = 16
    statistics: tuple[str, ...] = ("full", "fs:1/32", "grid:1/32", "grid:1/8")
    compiled: bool = False
    device: str = "cpu"
    repeats: int = 11
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for spelling in self.statistics:
            if parse_statistics(spelling).virtual:
                raise ValueError(
                    f"bench cannot measure {spelling!r}: virtual samples make the batch larger than torch's; "
                    "leave vdn out"
                )


@dataclass(frozen=True)
class LayerPlan(Plan):
    """What `leannorm bench layers` measures: ResNet-50's shapes at this image size, in each layout and dtype."""

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, values, known in (("layout", self.layouts, LAYOUTS), ("dtype", self.dtypes, DTYPES)):
            for value in values:
                if value not in known:
                    raise ValueError(f"unknown {what} {value!r}; expected one of {', '.join(known)}")


@dataclass(frozen=True)
class TrainingPlan(Plan):
    """What `leannorm bench training` measures: the step of each torchvision model, channels_last, fp32."""

    batch: int = 8
    models: tuple[str, ...] = ("resnet50", "densenet121", "efficientnet_b0", "mobilenet_v3_large", "regnet_y_400mf")


P = TypeVar("P", bound=Plan)


def quickly(plan: P) -> P:
    """Shrink a plan to seconds, to see that it works."""
    return dataclasses.replace(plan, quick=True, image_size=64, batch=4, repeats=3)


def listed(text: str) -> tuple[str, ...]:
    """Split a list of names, or of sources, whose own options are separated by commas too.

    >>> listed("full,grid:1/8@step,minimum=4,fs:1/32")
    ('full', 'grid:1/8@step,minimum=4', 'fs:1/32')
    """
    between = r",(?=full\b|[^,]*:)" if ":" in text else ","
    return tuple(item.strip() for item in re.split(between, text))
