"""Residual networks in the CIFAR form: three stages of 16, 32 and 64 channels, 6 n + 2 layers.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2, with its option B shortcut (a
1x1 convolution and batch normalization) where the shape changes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images.

    Args:
        blocks: blocks in each of the three stages (n).
        num_classes: width of the output.
        in_channels: channels of the input images.
    """

    def __init__(self, blocks: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stages = nn.Sequential()
        channels = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(blocks):
                self.stages.append(BasicBlock(channels, width, stride if block == 0 else 1))
                channels = width
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        out = F.relu(self.bn(self.conv(x)))
        return self.fc(self.stages(out).mean(dim=(2, 3)))


def resnet8(num_classes: int, in_channels: int = 3) -> ResNet:
    """Build the 8-layer network: one block a stage."""
    return ResNet(1, num_classes=num_classes, in_channels=in_channels)


def resnet20(num_classes: int, in_channels: int = 3) -> ResNet:
    """Build the 20-layer network: three blocks a stage."""
    return ResNet(3, num_classes=num_classes, in_channels=in_channels)
