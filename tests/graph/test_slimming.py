"""Slimming: channels of the smallest gamma leave, and the report says what that costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leannorm import records
from leannorm.graph.pruning import prune
from leannorm.records import PruningReport
from leannorm.train.models import import_torchvision


def chain(width: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def scaled(model: nn.Module) -> nn.Module:
    """Spread gamma over the whole network: the first layer's are the smaller ones."""
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.01, 0.5, 20))
        model[4].weight.copy_(-torch.linspace(0.4, 1.5, 20).flip(0))
    return model


def test_the_smallest_gammas_of_the_whole_network_go_first(randomized):
    model, x = scaled(randomized(chain())), torch.randn(4, 3, 8, 8)
    gammas = torch.cat([model[1].weight, model[4].weight]).abs()
    bound = gammas.sort().values[12]
    pruned, report = prune(model, x, ratio=0.3)
    assert report.channels_before - report.channels_after == 12
    assert pruned[1].weight.tolist() == model[1].weight[model[1].weight >= bound].tolist()
    assert pruned[4].weight.tolist() == model[4].weight[model[4].weight.abs() >= bound].tolist()
    assert report.changes[0].action.endswith(" of small gamma")
    assert report.refusals == ()


def test_the_largest_gammas_that_would_go_stay_where_layers_keep_multiples(randomized):
    model, x = scaled(randomized(chain())), torch.randn(4, 3, 8, 8)
    everything, _ = prune(model, x, ratio=0.5)
    pruned, report = prune(model, x, ratio=0.5, round_to=4)
    for layer in (1, 4):
        kept = -(-everything[layer].num_features // 4) * 4
        largest = model[layer].weight.abs().sort().values[20 - kept]
        assert pruned[layer].weight.tolist() == model[layer].weight[model[layer].weight.abs() >= largest].tolist()
    assert {refusal.reason.partition(": ")[2] for refusal in report.refusals} == {"each layer keeps a multiple of 4"}


@torch.no_grad()
def test_the_loss_is_stated(randomized):
    model, x = scaled(randomized(chain())), torch.randn(4, 3, 8, 8)
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4), (torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))]
    pruned, report = prune(model, x, ratio=0.5, batches=batches)
    expected = ((pruned(x) - model(x)).norm() / model(x).norm()).item()
    assert expected > 1e-3
    assert report.relative_error == pytest.approx(expected, rel=1e-5)
    for network, accuracy in ((model, report.accuracy_before), (pruned, report.accuracy_after)):
        assert accuracy == sum(int((network(x).argmax(1) == labels).sum()) for x, labels in batches) / 11
    assert records.from_json(PruningReport, records.to_json(report)) == report


@torch.no_grad()
def test_a_channel_is_replaced_by_what_it_is_without_gamma(randomized):
    model, x = scaled(randomized(chain())), torch.randn(2, 3, 8, 8)
    model[4].bias.fill_(0.5)
    pruned, report = prune(model, x, ratio=0.25)
    without = scaled(randomized(chain()))
    without.load_state_dict(model.state_dict())
    for before, after in ((model[1], pruned[1]), (model[4], pruned[4])):
        without_gamma = without[1] if before is model[1] else without[4]
        without_gamma.weight[~torch.isin(before.weight, after.weight)] = 0.0
    torch.testing.assert_close(pruned(x), without(x))
    assert report.relative_error > 0


def test_channels_go_together_by_their_largest_gamma(randomized):
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), first, nn.ReLU(), depthwise, second, nn.Conv2d(8, 4, 1)))
    with torch.no_grad():
        first.weight.copy_(torch.arange(1.0, 9.0))
        second.weight.copy_(torch.arange(1.0, 9.0).flip(0))
    pruned, _ = prune(model, torch.randn(2, 3, 8, 8), ratio=0.25)
    assert set(first.weight.tolist()) - set(pruned[1].weight.tolist()) == {4.0, 5.0}


def test_what_is_exact_goes_first_and_as_it_is(randomized):
    model, x = scaled(randomized(chain())), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model[4].weight[:3], model[4].bias[:3] = 0.0, -1.0
    _, report = prune(model, x, ratio=0.2)
    assert {change.module: change.action for change in report.changes} == {
        "1": "5 of 20 channels removed: 5 of small gamma",
        "4": "3 of 20 channels removed: 3 always zero",
    }


def test_each_layer_keeps_its_least_number(randomized):
    model = scaled(randomized(chain()))
    pruned, report = prune(model, torch.randn(2, 3, 8, 8), ratio=0.9, min_channels=6)
    assert (pruned[1].num_features, pruned[4].num_features) == (6, 6)
    assert report.refusals[0].module == ""
    assert report.refusals[0].reason == "28 of 40 channels can be removed at most, 90% were asked for"


def test_what_cannot_go_is_named(randomized):
    model = randomized(chain()[:5])
    pruned, report = prune(model, torch.randn(2, 3, 8, 8), ratio=0.5)
    assert (pruned[1].num_features, pruned[4].num_features) == (1, 20)
    reasons = {refusal.module: refusal.reason for refusal in report.refusals}
    assert reasons["4"] == "20 of 20 channels kept: they are an output of the model"
    assert "19 of 40 channels can be removed at most" in reasons[""]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_architectures_are_slimmed_and_trained_further(name, randomized):
    import_torchvision()
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = randomized(get_model(name, weights=None, num_classes=10))
    pruned, report = prune(model, torch.randn(1, 3, 32, 32), ratio=0.3)
    assert 0.25 < 1 - report.channels_after / report.channels_before <= 0.3
    pruned.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
