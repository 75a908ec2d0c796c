"""What to measure, as frozen values that validate themselves."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from leannorm.spelling import parse_statistics

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
OPERATIONS = ("bn", "bn+relu", "bn+add+relu")
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

    ON_CUDA: ClassVar[dict[str, Any]] = {"batch": 256, "compiled": True, "statistics": ("full", "fs:1/32", "grid:1/32")}

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
    """What `leannorm bench layers` measures: ResNet-50's shapes at this image size, in each layout and dtype.

    ``decomposed`` adds each source in two forms under `torch.compile`: as the one operator that the compiler calls, and
    decomposed into PyTorch's operators, which it fuses. ``replayed`` adds each side as a replayed CUDA graph: its time
    on the device alone, which is what a layer costs where the host keeps ahead of the device.
    """

    ON_CUDA: ClassVar = {**Plan.ON_CUDA, "layouts": ("channels_last",), "dtypes": ("bf16",), "replayed": True}

    replayed: bool = False
    decomposed: bool = False
    operations: tuple[str, ...] = OPERATIONS
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = (
            ("operation", self.operations, OPERATIONS),
            ("layout", self.layouts, LAYOUTS),
            ("dtype", self.dtypes, DTYPES),
        )
        for what, values, known in asked:
            for value in values:
                if value not in known:
                    raise ValueError(f"unknown {what} {value!r}; expected one of {', '.join(known)}")
        if self.replayed and torch.device(self.device).type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, got {self.device!r}; leave replayed out")


@dataclass(frozen=True)
class TrainingPlan(Plan):
    """What `leannorm bench training` measures: the step of each torchvision model, channels_last.

    ``dtype`` bf16 is autocast: parameters and optimizer stay in fp32. The gate, in float64 too, takes at most
    ``gate_batch`` images. ``folded`` adds the sides that fold convolutions into sampled layers: all that can be, and
    those where `leannorm.tune` finds it faster. Each sample follows ``settle`` untimed steps of the same model, as a
    training's steps follow each other. ``apart`` gives each side a process of its own, as a training has; on a GPU,
    where the device is what is timed, all are in one. These are begun anew ``starts`` times, for ``repeats`` rounds
    each, so that no process by itself decides.
    """

    ON_CUDA: ClassVar = {
        **Plan.ON_CUDA,
        "statistics": ("full", "grid:1/32"),
        "models": ("resnet50", "densenet121"),
        "dtype": "bf16",
        "gate_batch": 16,
        "folded": False,
        "apart": False,
    }

    batch: int = 8
    gate_batch: int = 2**31
    folded: bool = True
    settle: int = 1
    apart: bool = True
    starts: int = 1
    dtype: str = "fp32"
    models: tuple[str, ...] = ("resnet50", "densenet121", "efficientnet_b0", "mobilenet_v3_large", "regnet_y_400mf")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.settle < 0:
            raise ValueError(f"settle must be at least 0, got {self.settle}")
        if self.apart and torch.device(self.device).type != "cpu":
            raise ValueError(f"steps of one process are timed on {self.device!r}; leave apart out")
        if self.starts < 1 or (self.starts > 1 and not self.apart):
            raise ValueError(f"starts must be at least 1, and 1 unless apart, got {self.starts}")


P = TypeVar("P", bound=Plan)


def planned(kind: type[P], device: str, **options: Any) -> P:
    """Make a plan of the options that are not None; the others have the kind's defaults for the device.

    >>> planned(LayerPlan, "cuda", batch=None).batch, planned(LayerPlan, "cuda", batch=32).batch
    (256, 32)
    """
    defaults = kind.ON_CUDA if device.startswith("cuda") else {}
    given = {name: value for name, value in options.items() if value is not None}
    return kind(**{"device": device, **defaults, **given})


def quickly(plan: P) -> P:
    """Shrink a plan to seconds, to see that it works."""
    options: dict[str, Any] = {"apart": False, "starts": 1} if isinstance(plan, TrainingPlan) else {}
    return dataclasses.replace(plan, quick=True, image_size=64, batch=4, repeats=3, **options)


def listed(text: str | None) -> tuple[str, ...] | None:
    """Split a list of names, or of sources, whose own options are separated by commas too; None stays None.

    >>> listed("full,grid:1/8@step,minimum=4,fs:1/32")
    ('full', 'grid:1/8@step,minimum=4', 'fs:1/32')
    """
    if text is None:
        return None
    between = r",(?=full\b|[^,]*:)" if ":" in text else ","
    return tuple(item.strip() for item in re.split(between, text))
