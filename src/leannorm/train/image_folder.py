"""Folders of class folders: what is in them, and their images as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as transforms

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from leannorm.train.pipeline import Images

VALIDATION_SHARE = 0.2
SIZES_READ = 256


@dataclass(frozen=True)
class ImageReader:
    """Reads an image file as RGB (3, H, W) with values in [0, 1].

    Args:
        size: (H, W) of the result.
        resize: resize the shorter side and crop the centre; if False, an image of another size is an error.
    """

    size: tuple[int, int]
    resize: bool

    def __call__(self, path: str) -> Tensor:
        """Read one file.

        Raises:
            ValueError: if it cannot be decoded, has more than 8 bits a channel, or is of another size; names the file.
        """
        try:
            with Image.open(path) as file:
                if file.mode.startswith(("I", "F")):  # Pillow would clip these at 255
                    raise ValueError(f"{path} has pixels of mode {file.mode}, expected 8 bits a channel: convert it")
                image = transforms.pil_to_tensor(file.convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
            raise ValueError(f"{path} cannot be decoded ({error}): replace or remove it") from error
        if self.resize:
            image = transforms.resize(image, [min(self.size)], antialias=True)
            image = transforms.center_crop(image, list(self.size))
        elif tuple(image.shape[1:]) != self.size:
            height, width = image.shape[1:]
            raise ValueError(
                f"{path} is {width}x{height} pixels, expected {self.size[1]}x{self.size[0]}: "
                "give --image-size to resize all of them"
            )
        return image.to(torch.float32) / 255


@dataclass(frozen=True)
class Folder:
    """The two parts of a folder of class folders."""

    classes: tuple[str, ...]
    training: Images
    validation: Images


def open_folder(root: Path, reader: ImageReader | None = None) -> tuple[Folder, ImageReader]:
    """List a folder that holds `train/CLASS/` and `val/CLASS/`, or class folders directly.

    Class folders without a split get one: a fifth of each class is held out, the same images always.

    Args:
        root: the folder.
        reader: reads its images; None reads them at their own size, which must be one.

    Returns:
        The parts, and the reader.

    Raises:
        ValueError: if there are no class folders, a class is empty, the parts have different classes, an image cannot
            be decoded, or images differ in size.
    """
    parts = [part for part in ("train", "val") if _subfolders(root / part)]
    if len(parts) == 1:
        (other,) = {"train", "val"} - set(parts)
        raise ValueError(f"{root} has {parts[0]}/ but no class folders in {other}/: expected both, or classes directly")
    if not parts:
        images = _list(root)
        reader = reader or _reader_of_own_size(images)
        images.loader = reader
        return _split(root, images), reader
    training, validation = (_list(root / part) for part in parts)
    if training.classes != validation.classes:
        lone = sorted(set(training.classes) ^ set(validation.classes))
        raise ValueError(f"{root}: train/ and val/ must hold the same classes, but only one of them has {lone}")
    reader = reader or _reader_of_own_size(training)
    training.loader = validation.loader = reader
    return Folder(tuple(training.classes), training, validation), reader


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _list(folder: Path) -> ImageFolder:
    names = _subfolders(folder)
    if len(names) < 2:
        raise ValueError(f"{folder} holds {len(names)} class folders, expected one folder of images for each class")
    images = ImageFolder(str(folder), allow_empty=True)
    empty = sorted(set(names) - {images.classes[label] for label in set(images.targets)})
    if empty:
        raise ValueError(f"no images in {', '.join(str(folder / name) for name in empty)}: fill or remove the folder")
    return images


def _split(root: Path, images: ImageFolder) -> Folder:
    counts = np.bincount(images.targets)
    if counts.min() < 2:
        alone = root / images.classes[int(counts.argmin())]
        raise ValueError(f"{alone} holds one image; a class needs at least 2, one of them for validation")
    training, validation = stratified_split(images.targets)
    return Folder(tuple(images.classes), Subset(images, training), Subset(images, validation))


def stratified_split(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split the indices of ``labels`` four to one in each class (at least one each), always alike."""
    held_out: list[int] = []
    for label in range(max(labels) + 1):
        members = np.flatnonzero(np.asarray(labels) == label)
        share = max(1, round(VALIDATION_SHARE * len(members)))
        held_out.extend(np.random.default_rng(label).permutation(members)[:share].tolist())
    return sorted(set(range(len(labels))) - set(held_out)), sorted(held_out)


def _reader_of_own_size(images: ImageFolder) -> ImageReader:
    """Make a reader for the size that the images share, as far as some of them tell."""
    first: tuple[str, tuple[int, int]] | None = None
    for index in np.linspace(0, len(images) - 1, min(SIZES_READ, len(images))).round().astype(int):
        path = images.samples[index][0]
        try:
            with Image.open(path) as file:
                size = file.size
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} cannot be decoded ({error}): replace or remove it") from error
        first = first or (path, size)
        if size != first[1]:
            raise ValueError(
                f"images differ in size: {first[0]} is {first[1][0]}x{first[1][1]}, {path} is {size[0]}x{size[1]}: "
                "give --image-size to resize all of them"
            )
    assert first is not None
    width, height = first[1]
    return ImageReader((height, width), resize=False)
