"""From an image to a batch: augmentation, normalisation and order, each a pure function of (seed, epoch, index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Images(Protocol):
    """Pairs of an image (C, H, W), all of one shape with values in [0, 1], and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image before the model sees it: ``(image - mean) / std``.

    Args:
        input_shape: (C, H, W) of the images.
        resize: whether images of other sizes are resized and cropped to H x W, or refused.
        mean: one value a channel; image values are in [0, 1].
        std: one value a channel.
    """

    input_shape: tuple[int, ...]
    resize: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor) -> Tensor:
        """Normalise an image (C, H, W)."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


@dataclass(frozen=True)
class Augmentation:
    """Pad with zeros, crop at a random place to the size that the image had, and mirror every other image.

    Args:
        padding: pixels on each side.
        flip: whether to mirror; not for images in which left and right differ, such as digits.
    """

    padding: int
    flip: bool

    def __call__(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Augment an image (C, H, W) by draws from ``generator``."""
        height, width = image.shape[-2:]
        top, left = generator.integers(2 * self.padding + 1, size=2).tolist()
        image = F.pad(image, [self.padding] * 4)[..., top : top + height, left : left + width]
        return image.flip(-1) if self.flip and generator.random() < 0.5 else image


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) for every image, in an order that (seed, epoch) decide.

    The epoch travels with the index, so that worker processes need no word of it. Lightning calls `set_epoch`.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in stream(self.seed, self.epoch).permutation(self.samples).tolist():
            yield self.epoch, index


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Augmented, normalised images; item (epoch, index) is a pure function of (seed, epoch, index)."""

    def __init__(self, images: Images, augmentation: Augmentation, preprocessing: Preprocessing, seed: int) -> None:
        self.images = images
        self.augmentation = augmentation
        self.preprocessing = preprocessing
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.images[index]
        return self.preprocessing(self.augmentation(image, stream(self.seed, epoch, index))), int(label)


class ValidationImages(Dataset[tuple[Tensor, int]]):
    """Normalised images."""

    def __init__(self, images: Images, preprocessing: Preprocessing) -> None:
        self.images = images
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.preprocessing(image), int(label)


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of this seed and key; those of different keys are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def mean_and_std(images: Images, limit: int = 2048) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation of each channel over at most ``limit`` evenly spaced images.

    Raises:
        ValueError: if a channel is constant.
    """
    indices: Sequence[int] = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int).tolist()
    sums = torch.zeros(2, images[0][0].shape[0], dtype=torch.float64)
    for index in indices:
        image = images[index][0].double()
        sums += torch.stack((image.mean((1, 2)), image.square().mean((1, 2))))
    mean, square = sums / len(indices)
    variance = square - mean.square()
    if (variance < 1e-8).any():
        raise ValueError(f"the training images are constant: the channels' variances are {variance.tolist()}")
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())
