"""convert, revert, freeze, recalibrate and fuse with methods."""

import copy

import pytest
import torch
from torch import nn

import leannorm
from cases import METHODS
from leannorm import parse_target
from leannorm.conversion.methods import has_method
from method_cases import PER_SAMPLE, WITH_LAYER, Net, arguments, call, converted, trained


@pytest.mark.parametrize("spelling", METHODS)
def test_revert_computes_the_same_in_eval_mode_or_refuses(spelling):
    model = trained(spelling).eval()
    expected = call(model, spelling)
    names = set(Net().state_dict())
    _, report = leannorm.revert(model)
    if spelling in PER_SAMPLE or spelling.startswith(("mixture", "none")):
        assert {refusal.module for refusal in report.refusals} == {"bn1", "bn2"}
        assert call(model, spelling).equal(expected)
        return
    assert not report.refusals
    assert type(model.bn1) is nn.BatchNorm1d
    assert type(model.conv1) is nn.Conv1d
    assert set(model.state_dict()) == names
    assert vars(model.bn1).keys() == vars(Net().bn1).keys()
    tolerance = {"rtol": 0, "atol": 0.05} if spelling.startswith("wageubn") else {}
    torch.testing.assert_close(model(arguments(spelling)[0]), expected, **tolerance)


def test_revert_refuses_a_convolution_that_mixes_positions():
    model = converted("bnet:3")
    nn.init.normal_(model.bn1.kernel)
    _, report = leannorm.revert(model)
    assert [refusal.module for refusal in report.refusals] == ["bn1"]
    assert "mixes neighbouring positions" in report.refusals[0].reason
    _, report = leannorm.convert(model, leannorm.GhostBatch(4))
    assert "mixes neighbouring positions" in report.refusals[0].reason


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize(
    "first", ["grid:1/4", "vdn:1", "gn:2", "in", "renorm:3", "mabn:2", "bnet:3", "masked", "wageubn:8"]
)
def test_any_follows_any(first, second):
    model = trained(first, steps=1)
    gamma = torch.full((8,), 0.5)
    (model.bn1.weight if first != "bnet:3" else model.bn1.kernel[:, 0, 1]).data.copy_(gamma)
    _, report = leannorm.convert(model, parse_target(second))
    assert not report.refusals
    assert report.changes[0].action == f"statistics {parse_target(first)} -> {parse_target(second)}"
    fresh = converted(second)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in fresh.modules()]
    found = model.bn1.kernel[:, 0, 1] if second == "bnet:3" else model.bn1.weight
    assert torch.equal(found, gamma)
    call(model, second).sum().backward()
    leannorm.convert(model, parse_target("grid:1/4"))
    if second not in ("mixture:2", "none"):
        assert str(model.bn1.statistics) == "grid:1/4"
        assert not has_method(model.bn1)


@pytest.mark.parametrize("spelling", WITH_LAYER)
def test_frozen_layers_stay(spelling):
    model = trained(spelling)
    expected = call(copy.deepcopy(model).eval(), spelling)
    leannorm.freeze(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    torch.testing.assert_close(call(model.train(), spelling), expected)
    torch.testing.assert_close(dict(model.named_buffers()), buffers)
    leannorm.unfreeze(model)
    call(model, spelling)
    assert spelling == "none" or not torch.equal(model.bn1.running_var, buffers["bn1.running_var"])


@pytest.mark.parametrize("spelling", WITH_LAYER)
def test_recalibration_pools_exact_statistics_or_refuses(spelling):
    model = trained(spelling)
    exact = leannorm.revert(copy.deepcopy(model))[0]
    state = copy.deepcopy(model.state_dict())
    batches = [arguments("", seed)[0] for seed in range(3)]
    if not spelling.startswith(("renorm", "ghost", "accumulated", "adaptive", "bnet")):
        with pytest.raises(ValueError, match="no BN layer with running statistics"):
            leannorm.recalibrate(model, batches)
        torch.testing.assert_close(model.state_dict(), state)
        return
    leannorm.recalibrate(model, batches)
    leannorm.recalibrate(exact, batches)
    for name, buffer in exact.named_buffers():
        if "running" in name:
            torch.testing.assert_close(model.get_buffer(name), buffer)
    others = {name for name in state if "running" not in name}
    torch.testing.assert_close({name: model.state_dict()[name] for name in others}, {n: state[n] for n in others})
    assert not model.bn1.exact


def test_recalibration_goes_through_the_convolution_of_bnet():
    model = converted("bnet:3")
    nn.init.normal_(model.bn1.kernel)
    batches = [arguments("", seed)[0] for seed in range(3)]
    seen = []
    model.bn2.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    leannorm.recalibrate(model, batches)
    pooled = torch.cat(seen)
    torch.testing.assert_close(model.bn2.running_mean, pooled.mean([0, 2]))
    with torch.no_grad():
        y = model.conv1(batches[2])
        normalized = (y - y.mean([0, 2], keepdim=True)) / (y.var([0, 2], correction=0, keepdim=True) + 1e-5).sqrt()
        convolved = nn.functional.conv1d(normalized, model.bn1.kernel, model.bn1.bias, padding=1, groups=8)
    torch.testing.assert_close(seen[2], model.conv2(torch.relu(convolved)))


def test_converting_a_part_leaves_the_other_methods_whole():
    def first(module, name):
        return name == "bn1"

    model = converted("masked")
    leannorm.convert(model, leannorm.FullBatch(), filter_fn=first)
    call(model, "masked")
    model = converted("mabn:2")
    leannorm.convert(model, leannorm.FullBatch(), filter_fn=first)
    assert type(model.conv2).__name__ == "CenteredConv1d"
    leannorm.convert(model, leannorm.FullBatch())
    assert type(model.conv2) is nn.Conv1d


def test_timms_layer_keeps_its_activation_with_a_method():
    from leannorm.train.models import import_torchvision

    import_torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act")
    layer = norm_act.BatchNormAct2d(3, act_layer=nn.ReLU, inplace=False)
    model = nn.Sequential(layer)
    x = torch.randn(4, 3, 6, 6)
    expected = torch.relu(leannorm.nn.GhostBatchNorm(3, leannorm.GhostBatch(2))(x))
    leannorm.convert(model, leannorm.GhostBatch(2))
    torch.testing.assert_close(model(x), expected)
    _, report = leannorm.convert(model, leannorm.GroupNormalization(3))
    assert "applies relu" in report.refusals[0].reason
    leannorm.revert(model)
    assert type(layer) is norm_act.BatchNormAct2d


@pytest.mark.parametrize("spelling", [s for s in WITH_LAYER if s not in ("masked", "wageubn:8", "mixture:2")])
def test_fused_blocks_compute_methods_too(spelling):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) + x)

    torch.manual_seed(0)
    model, _ = leannorm.convert(nn.Sequential(Block()), parse_target(spelling))
    expected = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert report.changes, report.refusals
    for _ in range(4):
        x = torch.randn(5, 4, 6, 6)
        torch.testing.assert_close(model(x), expected(x))


def test_refusals_of_convert():
    model = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, affine=False),
        leannorm.BatchNorm2d(3, activation="relu"),
        leannorm.freeze(nn.BatchNorm2d(3))[0],
    )
    reasons = {}
    for spelling in ("adaptive", "bnet:3", "gn:3"):
        _, report = leannorm.convert(copy.deepcopy(model), parse_target(spelling))
        reasons |= {(spelling, refusal.module): refusal.reason for refusal in report.refusals}
    assert set(reasons) == {("adaptive", "0"), ("bnet:3", "1"), ("gn:3", "2"), ("gn:3", "3")}
    assert "track_running_stats=False" in reasons["adaptive", "0"]
    assert "affine=False" in reasons["bnet:3", "1"]
    assert "applies relu" in reasons["gn:3", "2"]
    assert "unfreeze it first" in reasons["gn:3", "3"]


def test_torchs_synchronizing_converter_drops_no_method_in_silence():
    for spelling in WITH_LAYER:
        with pytest.raises(RuntimeError, match=r"would drop the statistics.*leannorm\.revert"):
            nn.SyncBatchNorm.convert_sync_batchnorm(converted(spelling))
