"""fuse(convolution=True): what stands in the way is said, and what does not fit computes as before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_fold_training import IMAGES, folded, operators
from test_fusion import Block, assert_same_training, block, residual_network
from torch import nn

from leannorm.nn import folding


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnPadding(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input * 2, weight, bias)


def _hooked(module):
    module.register_forward_hook(lambda m, i, y: None)
    return module


REFUSED = {
    "transposed": (nn.ConvTranspose2d(4, 4, 3), "a transposed convolution spreads each input"),
    "own forward": (Own(4, 4, 3), "the Own before it has a forward of its own"),
    "own padding": (OwnPadding(4, 4, 3), "the OwnPadding before it has a forward of its own"),
    "hooked": (_hooked(nn.Conv2d(4, 4, 3)), "the Conv2d before it has hooks"),
    "pooling": (nn.MaxPool2d(2), "its input is not the output of a convolution or a linear layer"),
}


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(("module", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason_and_computed_apart(module, reason, sequential):
    module = copy.deepcopy(module)
    if sequential:
        plain = nn.Sequential(module, nn.BatchNorm2d(4), nn.ReLU())
    else:
        plain = block(lambda self, y, x: F.relu(y))
        plain._modules["conv"] = module
    model, reference, report = folded(plain)
    assert [change.action for change in report.changes] == ["batch norm + relu"]
    assert [refusal.reason.split(": ")[0] for refusal in report.refusals] == ["its convolution stays apart"]
    assert reason in report.refusals[0].reason
    assert operators(model, torch.randn(3, 4, 5, 5)) == (0, 1)
    assert_same_training(model, reference)


class Tapped(Block):
    def forward(self, x):
        u = self.conv(x)
        return F.relu(self.bn(u)) + u


class Late(Block):
    def forward(self, x):
        x = x * 1
        y = self.bn(self.conv(x))
        z = self.skip(x) * 2
        return F.relu(y) + z


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Tapped, "the convolution's output is used 2 times"),
        (Late, "its convolution's input is used until"),
    ],
)
def test_convolutions_that_others_need(make, reason):
    model, reference, report = folded(make())
    assert reason in report.refusals[0].reason
    assert operators(model, torch.randn(3, 4, 5, 5)) == (0, 1)
    assert_same_training(model, reference)


def test_changes_after_fusing():
    model, reference, _ = folded(residual_network())
    seen = []
    for network in (model, reference):
        network[0][0].register_forward_hook(lambda m, i, y: seen.append(y.detach()))
        network[1].conv1.register_full_backward_hook(lambda m, i, o: seen.append(o[0].detach()))
        network[2].downsample[1].register_forward_hook(lambda m, i, y: seen.append(y.detach()))
        network[3]._modules["bn1"] = nn.GroupNorm(2, 4)
    assert operators(model, IMAGES.float()) == (5, 3)
    seen.clear()
    assert_same_training(model, reference, IMAGES)
    assert len(seen) == 6
    torch.testing.assert_close(seen[:3], seen[3:])


def test_inputs_that_the_operator_does_not_take():
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(5))
    model, reference, _ = folded(plain)
    x = torch.randn(16, 5, 6, dtype=torch.float64)
    assert operators(model.double(), x) == (0, 1)
    assert_same_training(model, reference, x)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        model(torch.randn(6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="dtype"):
        model(x.float())
    model, reference, _ = folded(residual_network())
    for network in (model, reference):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            network(torch.randn(4, 4, 2, 2))
        with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels"):
            network(torch.randn(4, 3, 16, 16))


def test_the_check_compares_folded_outputs(monkeypatch):
    right = folding.Fold.compute

    def wrong(*args):
        y, mean, var = right(*args)
        return y * 1.5, mean, var

    monkeypatch.setattr(folding.Fold, "compute", wrong)
    model, reference, report = folded(residual_network(), example_inputs=IMAGES.float())
    assert report.changes == ()
    assert all("changed its training outputs: a relative error of" in refusal.reason for refusal in report.refusals)
    assert_same_training(model, reference, IMAGES)
