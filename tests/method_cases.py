"""A small network for every method, and how it is called and trained."""

import torch
from torch import nn

import leannorm
from cases import METHODS
from leannorm import parse_target

PER_SAMPLE = ("gn:2", "in", "ln")


WITH_LAYER = [spelling for spelling in METHODS if spelling not in PER_SAMPLE]


TRAINED_WITH = [
    s for s in METHODS if s.startswith(("gn", "renorm", "mabn", "ghost", "accumulated", "adaptive", "masked"))
]


class Net(nn.Module):
    """Two normalized convolutions over sequences, so that masked statistics fit, too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 4, 3, stride=2, bias=False), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


def converted(spelling, dtype=torch.float32):
    torch.manual_seed(0)
    return leannorm.convert(Net().to(dtype), parse_target(spelling))[0]


def arguments(spelling, seed=0, dtype=torch.float32):
    x = torch.randn(8, 3, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    lengths = {"lengths": torch.tensor([12, 12, 7, 5, 3, 12, 1, 10])} if spelling == "masked" else {}
    return x, lengths


def call(model, spelling, seed=0, dtype=torch.float32):
    x, lengths = arguments(spelling, seed, dtype)
    return model(x, **lengths)


def trained(spelling, steps=3, dtype=torch.float32):
    model = converted(spelling, dtype)
    for step in range(steps):
        call(model, spelling, step, dtype).square().mean().backward()
    model.zero_grad()
    return model
