"""Training steps of a model in float32 and channels-last memory, against those of a twin."""

import torch
from torch import Tensor, nn

from leannorm.train.models import import_torchvision

import_torchvision()

from torchvision.models.densenet import DenseNet  # noqa: E402 - after its missing operators are defined


def images(*shape: int) -> Tensor:
    """Make the same images at each call."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def train_step(model: nn.Module, x: Tensor):
    """Give everything that a training step computes."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = model(x * 1)  # blocks may work in place
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return y, x.grad, gradients, dict(model.named_buffers())


def assert_same_training(model: nn.Module, twin: nn.Module, x: Tensor, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Compare a step of both, and the names of their states."""
    torch.testing.assert_close(train_step(model, x), train_step(twin, x), rtol=rtol, atol=atol)
    assert list(model.state_dict()) == list(twin.state_dict())


def small_densenet(*layers: int) -> nn.Module:
    """Make a DenseNet of torchvision's with so many layers a block."""
    torch.manual_seed(0)
    return DenseNet(growth_rate=8, block_config=layers or (3, 2), num_init_features=16, num_classes=5)
