import copy

import torch
from torch import nn

import leannorm


def model_and_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    x = torch.randn(6, 3, 8, 8)
    model(x)
    return model, x


def test_frozen_statistics_survive_train():
    model, x = model_and_input()
    expected = copy.deepcopy(model)
    expected[1].eval()
    _, report = leannorm.freeze(model)
    model.train()
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [c.module for c in report.changes] == ["1"]
    assert report.refusals[0].module == "2"
    assert "no running statistics" in report.refusals[0].reason


def test_gamma_and_beta_go_on_learning():
    model, x = model_and_input()
    leannorm.freeze(model)
    model.train()(x).square().sum().backward()
    assert model[1].weight.grad.abs().sum() > 0


def test_unfreeze_restores_mode_and_class():
    model, x = model_and_input()
    leannorm.freeze(model)
    leannorm.freeze(model)
    _, report = leannorm.unfreeze(model.train())
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].training
    assert [c.action for c in report.changes] == ["unfrozen"]
    tracked = model[1].num_batches_tracked.item()
    model(x)
    assert model[1].num_batches_tracked == tracked + 1


def test_a_converted_layer_keeps_its_source():
    model, _ = model_and_input()
    leannorm.convert(model, leannorm.GridSampling(1 / 4))
    leannorm.freeze(model)
    leannorm.unfreeze(model)
    assert model[1].statistics == leannorm.GridSampling(1 / 4)
    leannorm.freeze(model)
    _, report = leannorm.revert(model)
    assert report.changes[0].action == "BatchNorm2d (no longer frozen)"
    assert type(model[1]) is nn.BatchNorm2d


def test_a_layer_converted_while_frozen_keeps_its_source():
    model, _ = model_and_input()
    leannorm.freeze(model)
    leannorm.convert(model, leannorm.GridSampling(1 / 4))
    leannorm.unfreeze(model)
    assert model[1].statistics == leannorm.GridSampling(1 / 4)
