"""Image data by its command-line spelling: `digits`, or a folder of class folders.

The batches of an epoch are a function of (seed, epoch) alone: the same for every source of statistics, any number of
workers and a resumed run, whatever is drawn from torch's default generator.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from leannorm.train.image_folder import Folder, ImageReader, open_folder, stratified_split
from leannorm.train.pipeline import (
    Augmentation,
    EpochSampler,
    Preprocessing,
    TrainingImages,
    ValidationImages,
    mean_and_std,
)

try:
    import lightning.pytorch as L
    from sklearn.datasets import load_digits
except ImportError as missing:
    raise ImportError(
        f"Image data need Lightning and scikit-learn: pip install 'leannorm[train]' (got: {missing})"
    ) from missing


class ImageData(L.LightningDataModule):
    """Training and validation batches: normalised images (B, C, H, W) float32, labels (B,) int64.

    A last training batch that would be smaller than the others is left out, since statistics of a handful of samples
    harm; each epoch leaves out other images.

    Attributes:
        classes: names of the classes, in the order of the labels.
        input_shape: (C, H, W).
        preprocessing: what has been done to the images, and must be done wherever the model runs.
        training_images: number of training images.
    """

    def __init__(
        self,
        folder: Folder,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        seed: int,
        workers: int,
    ) -> None:
        super().__init__()
        self.classes = folder.classes
        self.input_shape = preprocessing.input_shape
        self.preprocessing = preprocessing
        self.training_images = len(folder.training)
        self._training = TrainingImages(folder.training, augmentation, preprocessing, seed)
        self._validation = ValidationImages(folder.validation, preprocessing)
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers

    def train_dataloader(self) -> DataLoader:
        """Load shuffled, augmented batches; `sampler.set_epoch` chooses the epoch, 0 at first."""
        return DataLoader(
            self._training,
            self._batch_size,
            sampler=EpochSampler(self.training_images, self._seed),
            num_workers=self._workers,
            drop_last=self.training_images > self._batch_size,
            generator=torch.Generator(),  # without one the loader would draw from the default generator
        )

    def val_dataloader(self) -> DataLoader:
        """Load all validation images in a fixed order; without gradients there is room for more in a batch."""
        batch_size = max(self._batch_size, min(8 * self._batch_size, 128))
        return DataLoader(self._validation, batch_size, num_workers=self._workers, generator=torch.Generator())


def open_data(
    spec: str,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> ImageData:
    """Open image data by its spelling.

    A folder holds either `train/CLASS/` and `val/CLASS/`, or class folders directly; of these, as of the digits, a
    fifth of each class is held out for validation: the same images for every seed.

    Args:
        spec: `digits` (scikit-learn's 1,797 images of 1x8x8) or the path of a folder (3 channels).
        batch_size: images in a batch.
        seed: decides order and augmentation.
        workers: processes that decode images; 0 decodes in this one.
        image_size: resize the shorter side to this many pixels and crop the centre; None keeps the images' own size.
        preprocessing: that of the data which a model was trained on; None measures it on the training images.

    Raises:
        ValueError: if the spelling is unknown, a folder has no classes, a class is empty, training and validation have
            different classes, an image cannot be decoded, or images differ in size and no size is given.
    """
    for name, value in (("batch size", batch_size), ("image size", image_size)):
        if value is not None and value < 1:
            raise ValueError(f"the {name} must be at least 1, got {value}")
    if workers < 0:
        raise ValueError(f"the number of workers must be at least 0, got {workers}")
    if spec == "digits":
        if image_size is not None:
            raise ValueError("the digits are images of 8x8 pixels: leave the image size away")
        folder, shape, resize = _digits(), (1, 8, 8), False
        augmentation = Augmentation(padding=1, flip=False)
    elif Path(spec).is_dir():
        folder, reader = open_folder(Path(spec), _reader(spec, image_size, preprocessing))
        shape, resize = (3, *reader.size), reader.resize
        augmentation = Augmentation(padding=shape[1] // 8, flip=True)
    else:
        raise ValueError(f"unknown data {spec!r}: no such folder; expected 'digits' or a folder of class folders")
    if preprocessing is None:
        preprocessing = Preprocessing(shape, resize, *mean_and_std(folder.training))
    elif preprocessing.input_shape != shape:
        raise ValueError(f"{spec} has images of shape {shape}, expected {preprocessing.input_shape}")
    return ImageData(folder, augmentation, preprocessing, batch_size=batch_size, seed=seed, workers=workers)


def _reader(spec: str, image_size: int | None, preprocessing: Preprocessing | None) -> ImageReader | None:
    if preprocessing is not None:
        channels, height, width = preprocessing.input_shape
        if channels != 3:
            raise ValueError(f"{spec} has images of shape {(3, height, width)}, expected {preprocessing.input_shape}")
        return ImageReader((height, width), preprocessing.resize)
    return None if image_size is None else ImageReader((image_size, image_size), resize=True)


def _digits() -> Folder:
    pixels, labels = load_digits(return_X_y=True)
    images = TensorDataset(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels))
    training, validation = stratified_split(labels.tolist())
    classes = tuple(str(digit) for digit in range(10))
    return Folder(classes, Subset(images, training), Subset(images, validation))
