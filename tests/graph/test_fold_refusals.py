"""What no neighbour takes up, and what fold leaves alone: each with its reason, and the outputs stay as they were."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

import leannorm
from leannorm.graph import fold

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Named layers under test and the computation on them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def conv_bn(**options):
    return {"conv": nn.Conv2d(3, 3, 3, padding=1, **options), "bn": nn.BatchNorm2d(3)}


def weight_normed():
    return torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))


def tied():
    layers = {"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 3, 3), "bn": nn.BatchNorm2d(3)}
    layers["b"].weight = layers["a"].weight
    return layers


def tied_bias():
    layers = {"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 3, 3), "bn": nn.BatchNorm2d(3)}
    layers["b"].bias = layers["a"].bias
    return layers


# Folding would be wrong: these become a scale and a shift.
TABLED = {
    "output with two users": (
        Layers(lambda m, x: m.bn(y := m.conv(x)) + y, **conv_bn()),
        IMAGES,
        {"bn": "the conv2d before it has other users: add"},
    ),
    "output returned as well": (
        Layers(lambda m, x: (m.bn(y := m.conv(x)), y), **conv_bn()),
        IMAGES,
        {"bn": "the conv2d before it has other users: output"},
    ),
    "reused convolution": (
        Layers(lambda m, x: m.bn(m.conv(m.conv(x))), **conv_bn()),
        IMAGES,
        {"bn": "the conv2d before it shares its weight with conv2d"},
    ),
    "tied weight": (
        Layers(lambda m, x: m.b(x) + m.bn(m.a(x)), **tied()),
        IMAGES,
        {"bn": "shares its weight with conv2d"},
    ),
    "tied bias": (
        Layers(lambda m, x: m.b(x) + m.bn(m.a(x)), **tied_bias()),
        IMAGES,
        {"bn": "shares its bias with conv2d"},
    ),
    "computed weight": (
        Layers(lambda m, x: m.bn(m.conv(x)), conv=weight_normed(), bn=nn.BatchNorm2d(3)),
        IMAGES,
        {"bn": "the weight of the conv2d before it is not a constant"},
    ),
    "weight given as an input": (
        Layers(lambda m, x, w: m.bn(F.conv2d(x, w)), bn=nn.BatchNorm2d(3)),
        (IMAGES, torch.randn(3, 3, 3, 3)),
        {"bn": "the weight of the conv2d before it is not a constant"},
    ),
    "linear on three dimensions": (
        Layers(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(5, 7), bn=nn.BatchNorm1d(4)),
        torch.randn(2, 4, 5),
        {"bn": "dimension 1 is not its channels"},
    ),
    "linear on as many tokens as features": (
        Layers(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(5, 4), bn=nn.BatchNorm1d(4)),
        torch.randn(2, 4, 5),
        {"bn": "dimension 1 is not its channels"},
    ),
    "convolution without a batch": (
        Layers(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm1d(8)),
        torch.randn(3, 8, 8),
        {"bn": "dimension 1 is not its channels"},
    ),
    "activation before": (
        Layers(lambda m, x: m.bn(m.act(m.conv(x))), act=nn.ReLU(), **conv_bn()),
        IMAGES,
        {"bn": "it follows relu (act)"},
    ),
    "concatenation before": (
        Layers(lambda m, x: m.bn(torch.cat([m.conv(x), x], 1)), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(6)),
        IMAGES,
        {"bn": "it follows cat (cat), where it follows input (inputs_0)"},
    ),
    "the model's input before": (
        Layers(lambda m, x: m.conv(m.bn(x)), **conv_bn()),
        IMAGES,
        {"bn": "it follows input (inputs_0)"},
    ),
}

REFUSED = {
    "no running statistics": (
        Layers(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3, track_running_stats=False)),
        IMAGES,
        {"bn": "it keeps no running statistics (track_running_stats=False)"},
    ),
    "running statistics given as an input": (
        Layers(lambda m, x, mean: F.batch_norm(m.conv(x), mean, m.bn.running_var), **conv_bn()),
        (IMAGES, torch.zeros(3)),
        {"batch_norm": "its running_mean is not constant"},
    ),
    "computed scale": (
        Layers(
            lambda m, x: F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, weight=1 + m.bn.weight),
            **conv_bn(),
        ),
        IMAGES,
        {"batch_norm": "its weight is not constant"},
    ),
    "statistics written by the model": (
        Layers(lambda m, x: m.bn.running_mean.add_(1) + m.bn(m.conv(x)).mean((0, 2, 3)), **conv_bn()),
        IMAGES,
        {"bn": "its running_mean is not constant"},
    ),
    "inside a branch": (
        Layers(lambda m, x: torch.cond(x.sum() > 0, lambda x: m.bn(m.conv(x)), lambda x: m.conv(x), (x,)), **conv_bn()),
        IMAGES,
        {"batch_norm": "it runs in a region that the graph calls"},
    ),
    "group normalization": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
        IMAGES,
        {"1": "it is group normalization, by statistics of each input"},
    ),
    "instance normalization": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)),
        IMAGES,
        {"1": "it is instance normalization, by statistics of each input"},
    ),
    "layer normalization": (
        nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5)),
        torch.randn(2, 8),
        {"1": "it is layer normalization, by statistics of each input"},
    ),
}


def unchanged_by_fold(model, inputs):
    """The report, after checking that the folded model computes the same and the model stays as it is."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folded, report = fold(model, inputs)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(folded(*inputs), copy.deepcopy(model)(*inputs))
    return report


@pytest.mark.parametrize("case", TABLED)
def test_not_folded_with_its_reason_and_left_exact(case, randomized):
    model, inputs, reasons = TABLED[case]
    report = unchanged_by_fold(randomized(model), inputs)
    assert [refusal for refusal in report.refusals if refusal.module] == []
    actions = {change.module: change.action for change in report.changes}
    assert actions.keys() == reasons.keys()
    for module, reason in reasons.items():
        assert actions[module].startswith("replaced by a scale and a shift per channel: ")
        assert reason in actions[module]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason_and_left_alone(case, randomized):
    model, inputs, reasons = REFUSED[case]
    report = unchanged_by_fold(randomized(model), inputs)
    assert report.changes == ()
    refusals = {refusal.module: refusal.reason for refusal in report.refusals if refusal.module}
    assert refusals.keys() == reasons.keys()
    for module, reason in reasons.items():
        assert reason in refusals[module]


def test_training_mode_is_refused_and_not_switched(randomized):
    model = randomized(Layers(lambda m, x: m.bn(m.conv(x)), **conv_bn())).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    _, report = fold(model, IMAGES)
    (refusal,) = report.refusals
    assert refusal.module == "bn"
    assert "call model.eval() first" in refusal.reason
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_one_layer_left_in_training_mode_does_not_stop_the_others(randomized):
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model[3].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    _, report = fold(model, IMAGES)
    assert [change.module for change in report.changes] == ["1"]
    assert [refusal.module for refusal in report.refusals] == ["3"]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_leannorm_layers_in_training_mode_are_refused_once_each(randomized):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model, _ = leannorm.convert(model, leannorm.GridSampling(1 / 4))
    _, report = fold(randomized(model).train(), IMAGES)
    assert report.changes == ()
    assert [refusal.module for refusal in report.refusals] == ["1", "3"]
    assert all("call model.eval() first" in refusal.reason for refusal in report.refusals)


def test_a_decomposed_training_program_is_refused(randomized):
    model = randomized(Layers(lambda m, x: m.bn(m.conv(x)), **conv_bn())).train()
    program = export(model, (IMAGES,), dynamic_shapes={"inputs": ({0: Dim.AUTO},)}).run_decompositions()
    folded, report = fold(program)
    assert report.changes == ()
    assert [refusal.module for refusal in report.refusals] == ["bn"]
    folded.module()(IMAGES)


def test_saved_statistics_that_are_read_are_refused(randomized):
    def forward(m, x):
        bn = m.bn
        args = (bn.weight, bn.bias, bn.running_mean, bn.running_var, True, 0.1, bn.eps)
        y, mean, _ = torch.native_batch_norm(m.conv(x), *args[:4], False, *args[5:])
        return y, mean.sum()

    _, report = fold(randomized(Layers(forward, **conv_bn())), IMAGES)
    assert [refusal.reason for refusal in report.refusals] == ["its saved statistics are read elsewhere"]


@pytest.mark.parametrize(("variance", "mean"), [(float("nan"), 0.0), (float("inf"), float("inf")), (-1.0, 0.0)])
def test_broken_statistics_are_refused(randomized, variance, mean):
    model = randomized(Layers(lambda m, x: m.bn(m.conv(x)), **conv_bn()))
    model.bn.running_var[1] = variance
    model.bn.running_mean[1] = mean
    _, report = fold(model, IMAGES)
    assert report.changes == ()
    assert "not finite" in report.refusals[0].reason


def test_weights_that_overflow_their_dtype_are_refused(randomized):
    model = randomized(Layers(lambda m, x: m.bn(m.conv(x)), **conv_bn()))
    model.conv.to(torch.float16)
    with torch.no_grad():
        model.bn.weight.fill_(1e8)
    _, report = fold(model, IMAGES.half())
    assert report.changes == ()
    assert "do not fit into torch.float16" in report.refusals[0].reason


@pytest.mark.parametrize("case", ["addmm of a residual", "scaled product"])
def test_products_that_are_no_linear_layers_absorb_nothing(case, randomized):
    def forward(m, x):
        if case == "scaled product":
            return m.bn(torch.addmm(m.bias, x, m.weight, alpha=2))
        return m.bn(torch.addmm(x, x, m.weight))

    model = Layers(forward, bn=nn.BatchNorm1d(4))
    model.weight, model.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    report = unchanged_by_fold(randomized(model), torch.randn(3, 4))
    assert [change.action.partition(":")[0] for change in report.changes] == [
        "replaced by a scale and a shift per channel"
    ]


def test_a_layer_called_twice_is_reported_twice(randomized):
    model = randomized(Layers(lambda m, x: m.bn(F.relu(m.bn(m.conv(x)))), **conv_bn()))
    folded, report = fold(model, IMAGES)
    assert [(change.module, change.action.partition(" ")[0]) for change in report.changes] == [
        ("bn", "folded"),
        ("bn", "replaced"),
    ]
    torch.testing.assert_close(folded(IMAGES), model(IMAGES))
