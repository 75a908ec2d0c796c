"""Every classification model of torchvision, converted and reverted."""

import pytest
import torch
from torch import nn

import leannorm
from leannorm.train.models import import_torchvision

import_torchvision()

from torchvision import models  # noqa: E402 - after the guard

FAST = ("resnet18", "densenet121", "mobilenet_v3_small", "inception_v3")
WEIGHTLESS = {"inception_v3": {"init_weights": False}, "googlenet": {"init_weights": False}}


def sized(name: str) -> int:
    return 224 if name.startswith(("vit", "maxvit")) else 96


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in models.list_models(module=models)],
)
@torch.no_grad()
def test_convert_and_revert_keep_the_outputs_bit_for_bit(name):
    torch.manual_seed(0)
    model = models.get_model(name, **WEIGHTLESS.get(name, {})).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 3, sized(name), sized(name))
    expected, keys = model(x), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    _, converted = leannorm.convert(model, leannorm.parse_statistics("grid:1/8+vdn:1"))
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(converted.changes) == len(layers)
    assert not converted.refusals
    assert torch.equal(model(x), expected), "converted, in eval mode"
    _, reverted = leannorm.revert(model)
    assert len(reverted.changes) == len(layers)
    assert torch.equal(model(x), expected), "reverted"
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
