"""The shapes that a model's batch normalization layers see."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm.train.models import build


def batch_norm_shapes(spec: str, image_size: int) -> tuple[tuple[int, ...], ...]:
    """Give (C, H, W) of the input of each BN layer, in the order of the calls; computes nothing.

    Args:
        spec: a model's command-line spelling, such as `torchvision:resnet50`.
        image_size: pixels of a side of the square image.
    """
    with torch.device("meta"):
        model = build(spec, classes=1000, channels=3).eval()
        image = torch.empty(1, 3, image_size, image_size)
    shapes: list[tuple[int, ...]] = []

    def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes.append(tuple(inputs[0].shape[1:]))

    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(record)
    model(image)
    return tuple(shapes)
