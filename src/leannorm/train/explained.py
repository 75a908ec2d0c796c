"""What `leannorm explain` tells of a model by name."""

from __future__ import annotations

import torch

import leannorm
from leannorm.records import Explanation
from leannorm.train import models


def explain_spelled(
    model: str,
    *,
    statistics: str,
    fuse: bool = True,
    convolution: bool = False,
    image_size: int = 224,
    batch_size: int = 8,
    channels: int = 3,
    device: str = "cpu",
) -> Explanation:
    """Build a model, convert and fuse it as asked, and explain a training step's call on random images.

    Args:
        model: spelling of the model (`models.build`).
        statistics: spelling of the source of statistics, or of a method (`leannorm.parse_target`).
        fuse: compute batch norm, addition and activation in one operator (`leannorm.fuse`).
        convolution: fuse the convolution before it too.
        image_size: pixels of a side of the images.
        batch_size: images in the batch.
        channels: of the images.
        device: of the model and the images, as torch names it.

    Raises:
        ValueError: if an argument is not what it should be, or the model does not take such images.
    """
    for name, value in (("image size", image_size), ("batch size", batch_size), ("number of channels", channels)):
        if value < 1:
            raise ValueError(f"the {name} must be at least 1, got {value}")
    if convolution and not fuse:
        raise ValueError("the convolution is fused with the batch norm after it: leave --no-fuse or --convolution away")
    target = leannorm.parse_target(statistics)
    try:
        where = torch.device(device)
        network = models.build(model, classes=10, channels=channels).to(where)
        images = torch.randn(batch_size, channels, image_size, image_size, device=where)
    except (RuntimeError, AssertionError) as error:  # torch raises both for devices that are not there
        raise ValueError(f"{model} cannot be built on {device!r}: {error}") from error
    leannorm.convert(network, target)
    if fuse:
        leannorm.fuse(network, convolution=convolution or None)
    try:
        return leannorm.explain(network, images)
    except (RuntimeError, AssertionError) as error:  # some of torchvision's models assert their input's size
        raise ValueError(f"{model} does not take images of shape {tuple(images.shape)}: {error}") from error
