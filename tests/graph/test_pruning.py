"""Channels that batch normalization makes constant leave the model: sizes, outputs, everything else as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import leannorm
from leannorm.graph.pruning import prune
from leannorm.train.models import import_torchvision

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


def silence(model: nn.Module, share: float, *, aligned: bool = False, beta: float | None = None) -> nn.Module:
    """Give a share of all channels gamma = 0, and beta <= 0 or as said: the first ones, or any."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                chosen = torch.rand(module.num_features, generator=generator) < share
                if aligned:
                    chosen = torch.arange(module.num_features) < round(share * module.num_features)
                module.weight[chosen] = 0.0
                module.bias[chosen] = -module.bias[chosen].abs() if beta is None else beta
    return model


def error(model, pruned, x):
    with torch.no_grad():
        expected, got = model(x), pruned(x)
    return ((got - expected).norm() / expected.norm()).item()


def build(name):
    import_torchvision()
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(name, weights=None, num_classes=10)
    if name == "vgg11_bn":  # its classifier holds nothing but numbers
        return nn.Sequential(model.features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048, 10))
    return model


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2"])
def test_architectures_lose_channels_and_keep_their_outputs(name, dtype, randomized):
    model = silence(randomized(build(name)).to(dtype), 0.3)
    x = torch.randn(2, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    pruned, report = prune(model, x)
    assert report.channels_after < 0.9 * report.channels_before
    assert report.parameters_after < 0.9 * report.parameters_before
    assert report.relative_error < BOUNDS[dtype]
    assert error(model, pruned, x) < BOUNDS[dtype]
    assert error(model, pruned, torch.randn(3, 3, 64, 64, dtype=dtype)) < BOUNDS[dtype]


@pytest.mark.parametrize("round_to", [1, 8, 16])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_layers_keep_multiples_of_channels(name, round_to, randomized):
    model, x = silence(randomized(build(name)).double(), 0.4), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    pruned, report = prune(model, x, round_to=round_to)
    before, after = (
        [module.num_features for module in each.modules() if isinstance(module, _BatchNorm)] for each in (model, pruned)
    )
    assert all(b % round_to == 0 or b == a for a, b in zip(before, after, strict=True))
    assert (report.channels_before, report.channels_after) == (sum(before), sum(after))
    everything, _ = prune(model, x)
    least = [module.num_features for module in everything.modules() if isinstance(module, _BatchNorm)]
    assert all(low <= b for low, b in zip(least, after, strict=True))
    if name == "resnet18":  # nothing but its own residual stream bounds a layer
        assert all(b < low + round_to for low, b in zip(least, after, strict=True))
    assert error(model, pruned, x) < 1e-12
    kept = [refusal.reason for refusal in report.refusals if "keeps a multiple" in refusal.reason]
    assert bool(kept) == (round_to > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["densenet121", "resnext50_32x4d", "mobilenet_v3_small", "efficientnet_b0", "googlenet"]
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_more_architectures_keep_their_outputs(name, randomized):
    model = silence(randomized(build(name)).double(), 0.3)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    pruned, report = prune(model, x)
    assert report.channels_after < report.channels_before
    assert error(model, pruned, x) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_channels_that_are_zero_in_all_branches_leave_a_residual_network_whole(name, randomized):
    model = silence(randomized(build(name)), 0.25, aligned=True)
    x = torch.randn(1, 3, 32, 32)
    pruned, report = prune(model, x)
    assert report.refusals == ()
    assert report.channels_after == 0.75 * report.channels_before
    sizes = {name: module.num_features for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    assert sizes == {layer.layer: layer.inputs_before for layer in report.layers if layer.layer in sizes}
    assert all(pruned.get_submodule(name).num_features == 0.75 * size for name, size in sizes.items())
    assert pruned.fc.in_features == 0.75 * model.fc.in_features
    if name == "resnext50_32x4d":
        assert pruned.layer1[0].conv2.groups == 24
    assert error(model, pruned, x) < 1e-5


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def test_it_is_a_plain_module_of_the_same_classes_with_true_sizes(randomized):
    model = silence(randomized(small()), 0.5, aligned=True)
    model[3].weight.requires_grad_(requires_grad=False)
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned, report = prune(model, torch.randn(2, 3, 8, 8))
    assert [type(module) for module in pruned.modules()] == [type(module) for module in model.modules()]
    assert [module.training for module in pruned.modules()] == [module.training for module in model.modules()]
    assert (pruned[0].out_channels, pruned[1].num_features, pruned[3].in_channels) == (4, 4, 4)
    assert (pruned[3].out_channels, pruned[4].num_features, pruned[8].in_features) == (3, 3, 12)
    assert pruned[8].weight.shape == (5, 12)
    assert list(pruned.state_dict()) == list(model.state_dict())
    copy.deepcopy(pruned).load_state_dict(pruned.state_dict())
    assert [p.requires_grad for p in pruned.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {change.module: change.action for change in report.changes} == {
        "1": "4 of 8 channels removed: 4 always zero",
        "4": "3 of 6 channels removed: 3 always zero",
    }
    pruned.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert pruned[0].weight.grad.shape == (4, 3, 3, 3)


def test_nothing_to_remove_gives_an_equal_copy(randomized):
    model, x = randomized(small()), torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, (x,))
    assert (report.changes, report.refusals, report.layers, report.relative_error) == ((), (), (), 0.0)
    assert torch.equal(pruned(x), model(x))
    assert pruned[0].weight is not model[0].weight


def test_memory_order_and_buffers_keep_their_kinds(randomized):
    model = silence(randomized(small()), 0.5).to(memory_format=torch.channels_last)
    pruned, _ = prune(model, torch.randn(2, 3, 8, 8))
    assert pruned[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not isinstance(pruned[1].running_mean, nn.Parameter)


ACTIVATIONS = [nn.Identity, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.GELU, lambda: nn.PReLU(8), nn.PReLU, nn.LeakyReLU]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("reader", ["1x1", "unpadded", "linear", "transposed", "reflect"])
def test_a_constant_goes_into_the_bias_of_its_reader(activation, reader, randomized):
    torch.manual_seed(0)
    layers: list[nn.Module] = {
        "1x1": [nn.Conv2d(8, 4, 1, bias=False)],
        "unpadded": [nn.Conv2d(8, 4, 3, stride=2)],
        "linear": [nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.LazyLinear(4)],
        "transposed": [nn.ConvTranspose2d(8, 4, 1)],
        "reflect": [nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")],
    }[reader]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), *layers)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    model.double()(x)
    model = silence(randomized(model), 0.5, beta=0.7, aligned=True)
    pruned, report = prune(model, x)
    assert report.changes[0].action == "4 of 8 channels removed: 4 constant"
    assert (pruned[1].num_features, report.refusals) == (4, ())
    assert pruned[-1].bias is not None
    assert error(model, pruned, x) < 1e-12


def test_a_depthwise_convolution_passes_what_is_zero_behind_it(randomized):
    torch.manual_seed(0)
    depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), norms[0], depthwise, norms[1], nn.ReLU(), nn.Conv2d(16, 4, 1)))
    with torch.no_grad():
        norms[1].weight[4:8] = 0.0  # the results of two groups; the second is not 0 behind it
        norms[1].bias[4:8] = torch.tensor([-1.0, -2.0, 0.5, -1.0])
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    assert (pruned[0].out_channels, pruned[1].num_features, pruned[2].groups, pruned[3].num_features) == (6, 6, 6, 12)
    assert {c.module: c.action for c in report.changes}["1"] == "2 of 8 channels removed: 1 always zero, 1 constant"
    assert error(model, pruned, x) < 1e-5


def test_what_is_zero_before_a_depthwise_convolution_is_constant_behind_it(randomized):
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), first, nn.ReLU(), depthwise, second, nn.SiLU(), nn.Conv2d(8, 4, 1))
    model = randomized(model)
    with torch.no_grad():
        first.weight[:3], first.bias[:3] = 0.0, -1.0
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    assert {change.action for change in report.changes} == {"3 of 8 channels removed: 3 constant"}
    assert pruned[3].groups == 5
    assert error(model, pruned, x) < 1e-5


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("stride", [1, 2])
def test_whole_groups_leave_a_grouped_convolution(kind, stride, randomized):
    torch.manual_seed(0)
    grouped, norm = kind(8, 12, 3, stride=stride, padding=1, groups=4), nn.BatchNorm2d(12)
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), grouped, norm, nn.ReLU(), kind(12, 4, 3)))
    with torch.no_grad():
        norm.weight[3:6], norm.bias[3:6] = 0.0, -1.0
        norm.weight[9:11], norm.bias[9:11] = 0.0, -1.0
    pruned, report = prune(model, torch.randn(2, 3, 8, 8))
    assert (grouped.groups, pruned[1].groups) == (4, 3)
    assert (pruned[0].out_channels, pruned[1].in_channels, pruned[1].out_channels) == (6, 6, 9)
    assert (pruned[2].num_features, pruned[4].in_channels) == (9, 9)
    assert report.refusals[0].reason.startswith("2 of 12 channels kept, though constant: ")
    assert error(model, pruned, torch.randn(2, 3, 9, 9)) < 1e-5


class Block(nn.Module):
    """Two convolutions whose results are joined."""

    def __init__(self, join, width=8):
        super().__init__()
        self.join = join
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.join(self.left(x), self.right(x))))


class Gate(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.squeeze, self.excite, self.head = nn.Linear(8, 4), nn.Linear(4, 8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.body(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.head(x * gate.view(*self.sizes(x), 1, 1))


@pytest.mark.parametrize("sizes", [lambda x: x.shape[:2], lambda x: (x.size(0), -1)])
def test_squeeze_and_excitation_loses_what_is_zero_on_all_sides(sizes, randomized):
    torch.manual_seed(0)
    model = silence(randomized(Gate(sizes)), 0.5, aligned=True)
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    assert (pruned.squeeze.in_features, pruned.excite.out_features, pruned.head.in_channels) == (4, 4, 4)
    assert report.refusals == ()
    assert error(model, pruned, x) < 1e-5


def test_a_concatenation_moves_the_places_of_channels(randomized):
    torch.manual_seed(0)
    model = silence(randomized(Block(lambda a, b: torch.cat([b, a], 1), width=16)), 0.4)
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    left, right = pruned.left[1].num_features, pruned.right[1].num_features
    assert left < 8
    assert right < 8
    assert pruned.head.in_channels == left + right
    assert report.refusals == ()
    assert error(model, pruned, x) < 1e-5


def test_a_channel_without_any_weight_before_batch_normalization_is_constant(randomized):
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.SiLU(), nn.Conv1d(8, 4, 3)))
    with torch.no_grad():
        model[0].weight[2:4] = 0.0
    pruned, report = prune(model, torch.randn(2, 3, 9))
    assert report.changes[0].action == "2 of 8 channels removed: 2 constant"
    assert error(model, pruned, torch.randn(2, 3, 9)) < 1e-5


def test_leannorms_layers_are_cut_like_torchs(randomized):
    model, _ = leannorm.convert(silence(randomized(small()), 0.5), leannorm.GridSampling(1 / 4))
    model, _ = leannorm.fuse(model)
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    assert report.channels_after < report.channels_before
    assert type(pruned[1]) is type(model[1])
    assert pruned[1].statistics == leannorm.GridSampling(1 / 4)
    assert error(model, pruned, x) < 1e-5
    pruned.train()(x).sum().backward()


def test_a_pruned_model_is_folded_and_exported(randomized):
    model = silence(randomized(small()), 0.5)
    x = torch.randn(2, 3, 8, 8)
    pruned, _ = prune(model, x)
    folded, report = leannorm.fold(pruned, x)
    assert report.refusals == ()
    assert error(model, folded, x) < 1e-5


BLOCKS = ["plain", "residual", "depthwise", "grouped", "dense", "pool", "gate"]


class Net(nn.Module):
    """Blocks of every kind in any order."""

    def __init__(self, kinds, padding, activation):
        super().__init__()
        self.kinds, self.padding = kinds, padding
        self.act = activation()
        self.layers = nn.ModuleList()
        channels = 3
        for kind in ["plain", *kinds]:
            made = channels if kind in ("residual", "depthwise", "grouped") else 6
            groups = channels if kind == "depthwise" else 3 if kind == "grouped" else 1
            inside = 2 * padding if kind != "residual" and kind != "dense" else 2
            conv = nn.Conv2d(channels, made, 3 if inside else 1, padding=inside // 2, groups=groups, bias=padding == 1)
            gate = nn.Linear(made, made) if kind == "gate" else nn.Identity()
            self.layers.append(nn.ModuleList([conv, nn.BatchNorm2d(made), gate]))
            channels = channels + made if kind == "dense" else made
        self.head = nn.Linear(4 * channels, 3)

    def forward(self, x):
        for kind, (conv, norm, gate) in zip(["plain", *self.kinds], self.layers, strict=True):
            y = self.act(norm(conv(x)))
            if kind == "residual":
                y = x + y
            elif kind == "dense":
                y = torch.cat([x, y], 1)
            elif kind == "pool":
                y = F.avg_pool2d(y, 3, 1, 1)
            elif kind == "gate":
                y = y * torch.sigmoid(gate(y.mean((2, 3))))[..., None, None]
            x = y
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(BLOCKS), max_size=4),
    padding=st.sampled_from([0, 1]),
    activation=st.sampled_from([nn.ReLU, nn.SiLU, nn.Sigmoid]),
    beta=st.sampled_from([None, 0.0, 0.5]),
    share=st.sampled_from([0.3, 0.8, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_network_keeps_its_outputs(kinds, padding, activation, beta, share, seed):
    torch.manual_seed(seed)
    model = Net(kinds, padding, activation).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.bias.normal_()
    silence(model, share, beta=beta)
    pruned, report = prune(model, torch.randn(1, 3, 6, 6, dtype=torch.float64))
    assert report.relative_error < 1e-12
    assert error(model, pruned, torch.randn(2, 3, 7, 7, dtype=torch.float64)) < 1e-12
    constant = {refusal.module for refusal in report.refusals} | {change.module for change in report.changes}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and (module.weight == 0).any():
            assert name in constant
