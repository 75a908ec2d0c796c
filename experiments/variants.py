"""Models of the experiments, spelled `experiments/variants.py:NAME`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

import leannorm
from leannorm.train.resnet import BasicBlock, ResNet, resnet8, resnet20


def _after_activation(make: Callable[..., ResNet]) -> Callable[..., ResNet]:
    def build(num_classes: int, in_channels: int = 3) -> ResNet:
        model = make(num_classes, in_channels)
        for block in model.modules():
            if isinstance(block, BasicBlock):
                block.__class__ = _ActivatedFirst
        return model

    return build


class _ActivatedFirst(BasicBlock):
    """The two convolutions of a block with BN after the activation: ``bn(relu(conv(x)))``."""

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.bn1(F.relu(self.conv1(x)))
        return self.bn2(F.relu(self.conv2(out))) + self.shortcut(x)


def _gamma(make: Callable[..., ResNet], value: float, *, last_alone: bool) -> Callable[..., ResNet]:
    def build(num_classes: int, in_channels: int = 3) -> ResNet:
        model = make(num_classes, in_channels)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.BatchNorm2d) and (not last_alone or name.endswith("bn2")):
                nn.init.constant_(layer.weight, value)
        return model

    return build


def _dropout(make: Callable[..., ResNet]) -> Callable[..., ResNet]:
    def build(num_classes: int, in_channels: int = 3) -> ResNet:
        model = make(num_classes, in_channels)
        model.stages = nn.Sequential(*(nn.Sequential(block, nn.Dropout(0.2)) for block in model.stages))
        return model

    return build


def _folded(make: Callable[..., ResNet]) -> Callable[..., ResNet]:
    def build(num_classes: int, in_channels: int = 3) -> ResNet:
        return leannorm.fuse(make(num_classes, in_channels), convolution=True)[0]

    return build


resnet8_after_activation, resnet20_after_activation = map(_after_activation, (resnet8, resnet20))
resnet8_gamma_01, resnet20_gamma_01 = (_gamma(make, 0.1, last_alone=False) for make in (resnet8, resnet20))
resnet8_gamma_0, resnet20_gamma_0 = (_gamma(make, 0.0, last_alone=True) for make in (resnet8, resnet20))
resnet8_dropout, resnet20_dropout = map(_dropout, (resnet8, resnet20))
resnet8_folded, resnet20_folded = map(_folded, (resnet8, resnet20))
