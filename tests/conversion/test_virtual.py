"""Virtual samples: appended, marked, stripped; never mistaken."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import leannorm
from leannorm import VirtualDataset, parse_statistics

Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    """A model whose output a test chooses."""

    def __init__(self, output=lambda y: y, *, checkpointed=None):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.output = output
        self.checkpointed = checkpointed
        self.seen = []

    def forward(self, x, **_):
        self.seen.append(x.shape[0])
        if self.checkpointed is None:
            return self.output(self.features(x))
        return self.output(checkpoint(self.features, x, use_reentrant=self.checkpointed))


def make(samples=2, **options):
    return leannorm.convert(Net(**options), VirtualDataset(samples))[0]


def test_virtual_samples_come_and_go_in_training_only():
    model = make()
    x = torch.randn(5, 3, 8, 8)
    assert model(x).shape[0] == 5
    assert model.eval()(x).shape[0] == 5
    assert model.seen == [7, 5]


def test_only_virtual_samples_feed_the_statistics():
    model = make(3)
    seen = []
    model.features[0].register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    model.features[1].momentum = 1.0
    model(torch.full((5, 3, 8, 8), 100.0))
    virtual = seen[0][5:]
    torch.testing.assert_close(model.features[1].running_mean, virtual.mean([0, 2, 3]))
    torch.testing.assert_close(model.features[1].running_var, virtual.transpose(0, 1).flatten(1).var(1))


@pytest.mark.parametrize("distribution", ["normal", "uniform", "matched"])
def test_distributions(distribution):
    model = nn.Sequential(leannorm.BatchNorm2d(2, momentum=1.0))
    leannorm.convert(model, VirtualDataset(64, distribution))
    x = torch.randn(8, 2, 16, 16) * torch.tensor([2.0, 3.0]).view(1, 2, 1, 1) + 5
    model(x)
    mean, std = (torch.full((2,), 5.0), torch.tensor([2.0, 3.0])) if distribution == "matched" else (0.0, 1.0)
    torch.testing.assert_close(model[0].running_mean, torch.zeros(2) + mean, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model[0].running_var, (torch.ones(2) * std) ** 2, rtol=0.1, atol=0.1)


def test_channels_last_stays():
    model = make()
    layouts = []
    model.features[1].register_forward_pre_hook(
        lambda m, i: layouts.append(i[0].is_contiguous(memory_format=torch.channels_last))
    )
    model.to(memory_format=torch.channels_last)(torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last))
    assert layouts == [True]


def test_a_part_called_alone_raises():
    model = make()
    with pytest.raises(RuntimeError, match="no marked call is under way"):
        model.features(torch.randn(4, 3, 8, 8))
    assert model.eval().features(torch.randn(4, 3, 8, 8)).shape[0] == 4


def test_a_batch_reshaped_on_the_way_raises():
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.BatchNorm2d(3))
    leannorm.convert(model, VirtualDataset(1))
    with pytest.raises(RuntimeError, match="got 10 samples where the marked call has 5"):
        model(torch.randn(4, 6, 8, 8))


def test_after_an_exception_no_call_is_marked():
    def fail(y):
        raise KeyError("in the middle")

    model = make(output=fail)
    with pytest.raises(KeyError, match="in the middle"):
        model(torch.randn(4, 3, 8, 8))
    with pytest.raises(RuntimeError, match="no marked call"):
        model.features(torch.randn(6, 3, 8, 8))


def test_nested_outputs_are_stripped():
    model = make(output=lambda y: {"a": [y, (y, None)], "b": Pair(y, 3), "c": OrderedDict(d=y, e="text")})
    out = model(torch.randn(4, 3, 8, 8))
    assert isinstance(out["b"], Pair)
    leaves = [out["a"][0], out["a"][1][0], out["b"].first, out["c"]["d"]]
    assert [leaf.shape[0] for leaf in leaves] == [4] * 4
    assert (out["a"][1][1], out["b"].second, out["c"]["e"]) == (None, 3, "text")


class Opaque:
    def __init__(self, y):
        self.y = y


@pytest.mark.parametrize(
    ("output", "error", "says"),
    [
        (lambda y: y.mean(), ValueError, r"shape \(\).*reduce outside"),
        (lambda y: y.transpose(0, 1), ValueError, "leading size is not the extended batch, 6"),
        (lambda y: [y, y[:4]], ValueError, r"shape \(4, "),
        (Opaque, TypeError, "type Opaque"),
    ],
)
def test_outputs_that_cannot_be_stripped_raise(output, error, says):
    with pytest.raises(error, match=says):
        make(output=output)(torch.randn(4, 3, 8, 8))


def test_inputs_with_one_entry_a_sample_raise():
    model = make()
    with pytest.raises(ValueError, match=r"shape \(4,\) and dtype torch.int64"):
        model(torch.randn(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"need a floating \(N, C"):
        model(torch.zeros(4, 3, 8, 8, dtype=torch.int64))
    assert model(torch.randn(4, 3, 8, 8), scale=torch.ones(())).shape[0] == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_mark_survives_checkpoint_recomputation(reentrant):
    gradients = []
    x = torch.randn(4, 3, 8, 8)
    for checkpointed in (None, reentrant):
        torch.manual_seed(0)
        model = make(checkpointed=checkpointed)
        torch.manual_seed(1)
        model(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()] + list(model.buffers()))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_converting_again_replaces_the_entry():
    model = make(2)
    leannorm.convert(model, parse_statistics("grid:1/4+vdn:1"))
    model(torch.randn(4, 3, 8, 8))
    leannorm.convert(model, leannorm.GridSampling(1 / 4))
    model(torch.randn(4, 3, 8, 8))
    assert model.seen == [5, 4]


def test_a_converted_part_in_a_converted_whole_has_one_entry():
    model = Net()
    leannorm.convert(model.features, VirtualDataset(1))
    leannorm.convert(model, VirtualDataset(2))
    assert model(torch.randn(4, 3, 8, 8)).shape[0] == 4
    assert model.seen == [6]


@pytest.mark.parametrize("spelling", ["vdn:2@matched", "fs:1/4+vdn:1", "vdn:1"])
def test_an_empty_batch_passes_without_virtual_samples(spelling):
    model, _ = leannorm.convert(Net(), parse_statistics(spelling))
    assert model(torch.empty(0, 3, 8, 8)).shape[0] == 0
    assert model.seen == [0]
    assert not model.features[1].running_mean.any()
