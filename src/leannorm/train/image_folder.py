"""Folders of class folders: what is in them, and their images as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms.v2 import functional as transforms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leannorm.train.pipeline import Images

VALIDATION_SHARE = 0.2
SIZES_READ = 4096
KEPT_BYTES = 2**29  # of decoded images


@dataclass(frozen=True)
class ImageReader:
    """Reads an image file as RGB (3, H, W) with values in [0, 1].

    Decoded images are kept, as bytes, while there is room: the first 512 MiB of them. Worker processes, which end with
    the epoch, keep none, and a pickled reader takes none along.

    Args:
        size: (H, W) of the result.
        resize: resize the shorter side and crop the centre; if False, an image of another size is an error.
    """

    size: tuple[int, int]
    resize: bool
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, path: str) -> Tensor:
        """Read one file.

        Raises:
            ValueError: if it cannot be decoded, has more than 8 bits a channel, or is of another size; names the file.
        """
        image = self._kept.get(path)
        if image is None:
            image = self._decode(path)
            if get_worker_info() is None and (len(self._kept) + 1) * image.nbytes <= KEPT_BYTES:
                self._kept[path] = image
        return image.to(torch.float32) / 255

    def __reduce__(self) -> tuple[type[ImageReader], tuple[tuple[int, int], bool]]:
        return ImageReader, (self.size, self.resize)

    def _decode(self, path: str) -> Tensor:
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
        return image


@dataclass(frozen=True)
class Folder:
    """The two parts of a folder of class folders."""

    classes: tuple[str, ...]
    training: Images
    validation: Images


def open_folder(root: Path, reader: ImageReader | None = None) -> tuple[Folder, ImageReader]:
    """List a folder that holds `train/CLASS/` and `val/CLASS/`, or class folders directly.

    Class folders without a split get one: a fifth of each class is held out, the same images always. Folders and files
    whose names begin with a dot are left out. Where images are not resized, the sizes of both parts are checked by the
    files' headers: of all up to 4,096 a part, else of so many evenly spaced ones and the first of each class.

    Args:
        root: the folder.
        reader: reads its images; None reads them at their own size, which must be one.

    Returns:
        The parts, and the reader.

    Raises:
        ValueError: if there are no class folders, a class is empty, the parts have different classes, an image cannot
            be decoded, or images differ in size, or from the size that the reader expects.
    """
    parts = [part for part in ("train", "val") if _subfolders(root / part)]
    if len(parts) == 1:
        (other,) = {"train", "val"} - set(parts)
        raise ValueError(f"{root} has {parts[0]}/ but no class folders in {other}/: expected both, or classes directly")
    if not parts:
        images = _list(root)
        images.loader = reader = _checked(reader, images)
        return _split(root, images), reader
    training, validation = (_list(root / part) for part in parts)
    if training.classes != validation.classes:
        lone = sorted(set(training.classes) ^ set(validation.classes))
        raise ValueError(f"{root}: train/ and val/ must hold the same classes, but only one of them has {lone}")
    training.loader = validation.loader = reader = _checked(reader, training, validation)
    return Folder(tuple(training.classes), training, validation), reader


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


class _VisibleImages(ImageFolder):
    """Class folders and images, without what is hidden: `.ipynb_checkpoints`, `.DS_Store`, `._1.png`."""

    def __init__(self, folder: Path) -> None:
        def is_visible_image(path: str) -> bool:
            hidden = any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
            return not hidden and has_file_allowed_extension(path, IMG_EXTENSIONS)

        super().__init__(str(folder), is_valid_file=is_visible_image, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = _subfolders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}


def _list(folder: Path) -> ImageFolder:
    names = _subfolders(folder)
    if len(names) < 2:
        raise ValueError(f"{folder} holds {len(names)} class folders, expected one folder of images for each class")
    images = _VisibleImages(folder)
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


def _checked(reader: ImageReader | None, *parts: ImageFolder) -> ImageReader:
    """Check the sizes of images that are not to be resized; give the reader, or one for the size that they share."""
    if reader is not None and reader.resize:
        return reader
    first, size = "", None if reader is None else reader.size
    for images in parts:
        spaced = np.linspace(0, len(images) - 1, min(SIZES_READ, len(images))).round().astype(int)
        for index in np.union1d(spaced, np.unique(images.targets, return_index=True)[1]):
            path = images.samples[index][0]
            height, width = own = _size(path)
            if size is None:
                first, size = path, own
            elif own != size and first:
                raise ValueError(
                    f"images differ in size: {first} is {size[1]}x{size[0]}, {path} is {width}x{height}: "
                    "give --image-size to resize all of them"
                )
            elif own != size:
                raise ValueError(
                    f"{path} is {width}x{height} pixels, expected {size[1]}x{size[0]} as in the training: resize it, "
                    "or train with --image-size"
                )
    assert size is not None
    return reader or ImageReader(size, resize=False)


def _size(path: str) -> tuple[int, int]:
    """Read height and width from a file's header."""
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be decoded ({error}): replace or remove it") from error
