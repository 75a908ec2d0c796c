import copy

import pytest
import torch
from torch import nn

import leannorm
from leannorm import parse_statistics


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))


def batches(sizes=(5, 3, 9), offset=0.0):
    return [torch.randn(n, 3, 8, 8) * (i + 1) + i + offset for i, n in enumerate(sizes)]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pooled_moments_are_those_of_all_data(converted, offset):
    model = nn.Sequential(nn.BatchNorm2d(3, dtype=torch.float64))
    if converted:
        leannorm.convert(model, leannorm.FullBatch())
    data = [batch.double() for batch in batches(offset=offset)]
    leannorm.recalibrate(model, data)
    together = torch.cat(data).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_mean, together.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].running_var, together.var(1), rtol=1e-9, atol=1e-9)


def test_later_layers_see_batch_statistics_and_no_dropout():
    model = network().eval()
    data = batches()
    leannorm.recalibrate(model, data)
    manual = copy.deepcopy(model)
    manual[1].train()
    inputs = torch.cat([manual[3](manual[2](manual[1](manual[0](x)))) for x in data]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[4].running_mean, inputs.mean(1))
    torch.testing.assert_close(model[4].running_var, inputs.var(1))


@pytest.mark.parametrize("mode", [True, False])
def test_modes_momenta_and_counts_are_restored(mode):
    model = network().train(mode)
    model[2].train(not mode)
    model[1].momentum = None
    tracked = model[1].num_batches_tracked.clone()
    leannorm.recalibrate(model, batches())
    assert [m.training for m in model] == [mode, mode, not mode, mode, mode]
    assert (model[1].momentum, model[4].momentum) == (None, 0.1)
    assert model[1].num_batches_tracked == tracked
    assert not model[1]._forward_hooks


def test_the_limit_and_the_forms_of_batches():
    calls = []
    model = network()
    model.register_forward_pre_hook(lambda m, i: calls.append(i[0].shape[0]))
    leannorm.recalibrate(model, ((x, torch.zeros(1)) for x in batches()), limit=2)
    assert calls == [5, 3]


def test_each_layer_pools_its_own_sample():
    model = nn.Sequential(nn.BatchNorm2d(3))
    leannorm.convert(model, leannorm.NaiveSampling(1 / 4, minimum=1))
    data = [torch.randn(8, 3, 4, 4), torch.randn(4, 3, 4, 4)]
    leannorm.recalibrate(model, data)
    sampled = torch.cat([data[0][:2], data[1][:1]]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_mean, sampled.mean(1))
    torch.testing.assert_close(model[0].running_var, sampled.var(1))


def test_virtual_samples_are_pooled():
    model, _ = leannorm.convert(network(), parse_statistics("vdn:4"))
    model.eval()
    report = leannorm.recalibrate(model, batches(sizes=(4,) * 50), limit=50)
    assert len(report.changes) == 2
    # unit normal inputs whatever the batches hold
    first = model[0].weight.flatten(1).square().sum(1)
    torch.testing.assert_close(model[1].running_var, first.detach(), rtol=0.1, atol=0)
    assert not model.training


def test_an_error_restores_the_old_statistics():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="expected input"):
        leannorm.recalibrate(model, [*batches(), torch.randn(2, 7, 8, 8)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_refusals_and_errors():
    model = nn.ModuleDict({"used": network(), "idle": nn.BatchNorm2d(3), "free": nn.BatchNorm2d(3, affine=False)})
    model["free"].running_mean = None
    model.forward = lambda x: model["used"](x)
    leannorm.freeze(model["used"][4])
    report = leannorm.recalibrate(model, batches())
    assert [r.module for r in report.refusals] == ["used.4", "free", "idle"]
    with pytest.raises(ValueError, match="got no batches"):
        leannorm.recalibrate(network(), [])
    with pytest.raises(ValueError, match="no BN layer"):
        leannorm.recalibrate(nn.Linear(2, 2), batches())


@pytest.mark.parametrize("guard", [True, False])
def test_nonfinite_statistics_are_an_error_and_change_nothing(guard):
    model, _ = leannorm.convert(network(), leannorm.FullBatch(), guard_nonfinite=guard)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN or infinity in the statistics of layer '1'"):
        leannorm.recalibrate(model, [*batches(), torch.full((2, 3, 8, 8), torch.nan)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model[1].guard_nonfinite is guard


def test_empty_batches_and_keyword_calls():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(input=x)

    model, plain = ByKeyword(), nn.Sequential(nn.BatchNorm2d(3))
    data = batches()
    leannorm.recalibrate(model, [data[0], data[0][:0], *data[1:]])
    leannorm.recalibrate(plain, data)
    assert torch.equal(model.bn.running_var, plain[0].running_var)
