"""Small networks whose layers want formats that are known beforehand."""

from __future__ import annotations

import torch
from torch import nn


def network(seed: int = 0) -> nn.Sequential:
    """Three convolutions with batch normalization and a linear layer, on (N, 3, 8, 8); running statistics fit."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return fitted(model)


def scaled(position: int, scale: torch.Tensor, seed: int = 0) -> nn.Sequential:
    """`network` with the outputs of one batch normalization times ``scale``; the next layer undoes it."""
    model = network(seed)
    norm, after = model[position], model[position + 2]
    with torch.no_grad():
        norm.weight *= scale
        norm.bias *= scale
        after.weight /= scale[:, None, None]
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def fitted(model: nn.Sequential) -> nn.Sequential:
    for norm in norms(model):
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for batch in batches(8, seed=1):
            model(batch)
    return model.eval()


def batches(count: int, seed: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(count)]


def hostile() -> torch.Tensor:
    """One channel of 1e3 among channels of 1e-3."""
    scale = torch.full((8,), 1e-3)
    scale[3] = 1e3
    return scale
