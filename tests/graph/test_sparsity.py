"""Zeros behind batch normalization and ReLU, counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leannorm.graph.zeros import sparsity


def layer_of(norm, activation):
    model = nn.Sequential(norm, activation)
    return model.eval()


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0.0, 4.0), nn.Threshold(0.5, 0.0)], ids=str
)
def test_zeros_are_those_of_the_activation(activation, randomized):
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 2, 1)))
    batches = [torch.randn(2, 3, 8, 8), (torch.randn(3, 3, 8, 8), torch.zeros(3))]
    measured = sparsity(model, batches)
    with torch.no_grad():
        outputs = torch.cat([model[:3](batches[0]), model[:3](batches[1][0])])
    (layer,) = measured.layers
    assert measured.samples == 5
    assert (layer.layer, layer.channels) == ("1", 8)
    assert layer.zeros == (outputs == 0).double().mean().item()
    assert layer.silent == int((outputs == 0).all(dim=(0, 2, 3)).sum())


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(), nn.Identity(), nn.Hardtanh(-1.0, 1.0), nn.Sigmoid()])
def test_other_activations_have_no_line(activation):
    assert sparsity(nn.Sequential(nn.BatchNorm1d(4), activation), [torch.randn(8, 4)]).layers == ()


def test_parameters_tell_what_is_always_and_nearly_zero():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0]))
        model[0].bias.copy_(torch.tensor([-1.0, 0.0, 2.0, -3.0, -2.9]))
    (layer,) = sparsity(model, [torch.randn(64, 5)]).layers
    assert (layer.always_zero, layer.constant, layer.nearly_zero) == (2, 1, 3)
    (layer,) = sparsity(model, [torch.randn(64, 5)], k=2.0).layers
    assert layer.nearly_zero == 4
    assert layer.silent >= 2


def test_an_addition_before_the_activation_is_followed(randomized):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)) + x)

    model, x = randomized(Residual()), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(-1.0)
        (layer,) = sparsity(model, [x]).layers
        assert layer.zeros == pytest.approx((model(x) == 0).double().mean().item())
    assert (layer.layer, layer.always_zero, layer.nearly_zero) == ("norm", 0, None)


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsity(model, [torch.randn(8, 4)])
    assert model.training
    assert model[0].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="sparsity got no batches"):
        sparsity(nn.BatchNorm1d(4), [])
    with pytest.raises(ValueError, match="k must be a finite number of standard deviations >= 0, got -1"):
        sparsity(nn.BatchNorm1d(4), [torch.randn(2, 4)], k=-1.0)
