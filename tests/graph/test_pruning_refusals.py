"""Channels that stay, each with its reason; and what is no pruning at all."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leannorm.graph.pruning import prune
from leannorm.records import Refusal


class Around(nn.Module):
    """A convolution, batch normalization and ReLU, what a case does with the result, and what reads that."""

    def __init__(self, between, head=None, **layers):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1) if head is None else head
        self.between = between
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.head(self.between(self, F.relu(self.norm(self.conv(x)))))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight)


class Gained(nn.Conv2d):
    """A convolution with one number more a channel."""

    def __init__(self):
        super().__init__(8, 4, 1)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, input):
        return super().forward(input) * self.gain


def shuffle(model, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def tied(model, x):
    return model.other(x)


def twice(model, x):
    return model.other(model.other(x))


def overwritten(model, x):
    y = x + 1
    y.mul_(2)
    x.add_(1)
    return y + x


def stale(model, x):
    y = x.view(x.shape)
    x.sigmoid_()
    return y


def normed():
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))


CASES = {
    "residual": (lambda m, x: x + m.other(x), {"other": nn.Conv2d(8, 8, 1)}, "add joins them with others that are not"),
    "product": (
        lambda m, x: torch.sigmoid(x) * m.other(x),
        {"other": nn.Conv2d(8, 8, 1)},
        "mul joins them with others",
    ),
    "shuffle": (shuffle, {}, "view mixes or selects channels"),
    "shuffle_operator": (lambda m, x: torch.channel_shuffle(x, 2), {}, "channel_shuffle reads them in a way"),
    "unshuffle": (lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), {}, "pixel_shuffle reads them in a way"),
    "sizes": (lambda m, x: x.view(-1, 8, 64).view(-1, 8, 8, 8), {}, "view writes out how many there are"),
    "unflatten": (lambda m, x: x.unflatten(1, (8, 1)).flatten(1, 2), {}, "unflatten writes out how many there are"),
    "slice": (lambda m, x: torch.cat([x[:, :2], x[:, 2:]], 1), {}, "slice mixes or selects channels"),
    "chunk": (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), {}, "chunk reads them in a way"),
    "index": (lambda m, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], {}, "index reads them in a way"),
    "flip": (lambda m, x: x.flip(1), {}, "flip reads them in a way"),
    "mean": (lambda m, x: m.other(x.mean(1, keepdim=True)), {"other": nn.Conv2d(1, 8, 1)}, "mean mixes or selects"),
    "softmax": (lambda m, x: x.softmax(1), {}, "softmax reads them in a way"),
    "sum": (lambda m, x: x - x.sum(1, keepdim=True), {}, "sum reads them in a way"),
    "expand": (lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, 8, 8, 8), {}, "expand reads them in a way"),
    "dropout": (lambda m, x: F.dropout(x, 0.0, training=True), {}, "dropout reads them in a way"),
    "transposed": (lambda m, x: x + x.transpose(1, 2), {}, "add lays them over channels in another dimension"),
    "scale": (lambda m, x: x * m.scale, {"scale": nn.Parameter(torch.ones(8, 1, 1))}, "mul joins them with p_scale"),
    "group_norm": (lambda m, x: m.other(x), {"other": nn.GroupNorm(2, 8)}, "group_norm (other) reads them in a way"),
    "layer_norm": (
        lambda m, x: m.other(x),
        {"other": nn.LayerNorm([8, 8, 8])},
        "layer_norm (other) reads them in a way",
    ),
    "reused": (twice, {"other": nn.Conv2d(8, 8, 1)}, "conv2d (other) shares its weight with conv2d (other"),
    "reused_norm": (twice, {"other": nn.BatchNorm2d(8)}, "batch_norm (other) shares its weight with batch_norm"),
    "computed": (tied, {"other": normed()}, "the weight of conv2d (other) is computed, given or written to"),
    "function": (tied, {"other": Scaled()}, "belongs to a Scaled, whose sizes only its own code knows"),
    "held": (tied, {"other": Gained(), "head": nn.Conv2d(4, 4, 1)}, "other, a Gained, holds more than its class: gain"),
    "groups": (tied, {"other": nn.Conv2d(8, 8, 1, groups=2)}, "conv2d (head) reads more than a constant in them"),
    "width": (tied, {"other": nn.Linear(8, 8)}, "linear (other) takes its inputs from another dimension"),
    "attention": (lambda m, x: x @ x.transpose(2, 3) @ x, {}, "matmul reads"),
    "stack": (lambda m, x: torch.stack([x, x]).sum(0), {}, "stack reads them in a way"),
    "stale": (stale, {}, "sigmoid_ writes over them before"),
}


def silent(model: nn.Module) -> nn.Module:
    """Make the first three channels of batch normalization always zero behind a ReLU."""
    with torch.no_grad():
        model.norm.weight[:3], model.norm.bias[:3] = 0.0, -0.5
        model.norm.running_mean.normal_()
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_channels_stay_with_the_reason(case):
    torch.manual_seed(0)
    between, layers, reason = CASES[case]
    model = silent(Around(between, **copy.deepcopy(layers)))
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    assert pruned.norm.num_features == 8
    assert "norm" not in [change.module for change in report.changes]
    (refusal,) = [refusal for refusal in report.refusals if refusal.module == "norm"]
    assert refusal.reason.startswith("3 of 8 channels kept, though constant: ")
    assert reason in refusal.reason
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=0)


FREE = {
    "nothing": (lambda m, x: x, {}),
    "depthwise": (tied, {"other": nn.Conv2d(8, 8, 1, groups=8, bias=False)}),
    "itself": (lambda m, x: x + x.mean((2, 3), keepdim=True), {}),
    "one_gate": (lambda m, x: x * torch.sigmoid(m.other(x)), {"other": nn.Conv2d(8, 1, 3, padding=1)}),
    "computed_sizes": (lambda m, x: x.view(x.shape[0], x.shape[1], -1).view(x.shape), {}),
    "rows": (lambda m, x: x.transpose(1, 3).transpose(1, 3)[:, :, 1:], {}),
    "dtype": (lambda m, x: x.to(torch.float32), {}),
    "rewritten": (lambda m, x: x.mul_(2).add_(x), {}),
}


@pytest.mark.parametrize("case", FREE)
def test_where_nothing_stands_in_the_way_they_go(case):
    torch.manual_seed(0)
    between, layers = FREE[case]
    model, x = silent(Around(between, **copy.deepcopy(layers))), torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    assert pruned.norm.num_features == 5
    assert report.refusals == ()
    torch.testing.assert_close(pruned(x), model(x))


@pytest.mark.parametrize(
    "head",
    [
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(8, 4, 3, padding="same"),
        nn.ConvTranspose2d(8, 4, 3),
        nn.ConvTranspose2d(8, 4, 1, stride=2),
        nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.Conv2d(8, 4, 3)),
        nn.Sequential(nn.ConstantPad2d(1, 5.0), nn.Conv2d(8, 4, 3)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)),
    ],
    ids=str,
)
def test_a_constant_other_than_zero_stays_before_borders(head):
    torch.manual_seed(0)
    model = silent(Around(lambda model, x: x, head=copy.deepcopy(head)))
    x = torch.randn(2, 3, 8, 8)
    zero, _ = prune(model, x)
    assert (zero.norm.num_features == 8) == ("5.0" in str(head))
    with torch.no_grad():
        model.norm.bias[:3] = 0.5
    pruned, report = prune(model, x)
    assert pruned.norm.num_features == 8
    (refusal,) = report.refusals
    assert "zeros" in refusal.reason or "reads more than a constant in them" in refusal.reason


def test_an_output_of_the_model_keeps_its_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        model[1].weight[0] = 0.0
    pruned, report = prune(model, torch.randn(2, 3, 4, 4))
    assert report.refusals == (Refusal("1", "1 of 8 channels kept, though constant: they are an output of the model"),)
    assert pruned[0].out_channels == 8


def test_what_the_model_is_given_keeps_its_channels():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0.0, -1.0
    _, report = prune(model, torch.randn(4, 8))
    assert report.refusals == (Refusal("0", "1 of 8 channels kept, though constant: they come from input"),)


def test_a_concatenation_with_what_the_model_is_given_keeps_only_that():
    class Concatenated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(11, 4, 3, padding=1)

        def forward(self, x):
            return self.head(torch.cat([F.relu(self.norm(self.conv(x))), x], 1))

    model, x = silent(Concatenated()), torch.randn(2, 3, 8, 8)
    pruned, _ = prune(model, x)
    assert pruned.head.in_channels == 8
    torch.testing.assert_close(pruned(x), model(x))


def test_weights_held_by_two_modules_stay_tied():
    model = silent(Around(lambda model, x: x))
    model.twin = nn.Conv2d(3, 8, 3)
    model.twin.weight = model.conv.weight
    pruned, report = prune(model, torch.randn(2, 3, 8, 8))
    assert "the weight of conv2d (conv) is held by another module too" in report.refusals[0].reason
    assert pruned.twin.weight is pruned.conv.weight


def test_a_layer_keeps_its_last_channels():
    model = silent(Around(lambda model, x: x))
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(-1.0)
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model, x)
    assert (pruned.conv.out_channels, pruned.head.in_channels) == (1, 1)
    assert report.refusals == (Refusal("norm", "1 of 8 channels kept, though constant: each layer keeps at least 1"),)
    pruned, _ = prune(model, x, min_channels=6)
    assert pruned.conv.out_channels == 6
    torch.testing.assert_close(pruned(x), model(x))


def test_a_group_that_is_not_constant_as_a_whole_stays():
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    with torch.no_grad():
        norm.weight[:5], norm.bias[:5] = 0.0, -1.0
    pruned, report = prune(model, torch.randn(2, 3, 8, 8))
    assert pruned[1].groups == 1
    assert (pruned[0].out_channels, pruned[2].num_features) == (4, 4)
    reason = "1 of 8 channels kept, though constant: conv2d (4) reads more than a constant in them"
    assert report.refusals == (Refusal("2", reason),)


def test_batch_statistics_make_nothing_constant_but_gamma_does():
    model = Around(lambda model, x: x)
    model.norm = nn.BatchNorm2d(8, track_running_stats=False)
    with torch.no_grad():
        model.conv.weight[0] = 0.0
        model.norm.weight[1], model.norm.bias[1] = 0.0, -1.0
    x = torch.randn(2, 3, 8, 8)
    pruned, report = prune(model.eval(), x)
    assert report.changes[0].action == "1 of 8 channels removed: 1 always zero"
    torch.testing.assert_close(pruned(x), model(x))


def test_a_beta_far_below_zero_is_not_always_zero():
    model = Around(lambda model, x: x).eval()
    with torch.no_grad():
        model.norm.bias[:4] = -100.0
    _, report = prune(model, torch.randn(2, 3, 8, 8))
    assert (report.changes, report.refusals) == ((), ())


def test_code_that_counts_channels_is_an_error():
    model = silent(Around(lambda model, x: x / x.shape[1]))
    with pytest.raises(RuntimeError, match=r"differs from the original.*keep the original"):
        prune(model, torch.randn(2, 3, 8, 8))


def test_code_that_insists_on_a_number_of_channels_is_an_error():
    def insist(model, x):
        if x.shape[1] != 8:
            raise ValueError(f"expected 8 channels, got {x.shape[1]}")
        return x

    with pytest.raises(RuntimeError, match=r"the pruned model does not run.*expected 8 channels, got 5"):
        prune(silent(Around(insist)), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), a share of the channels, got 1.0"),
        ({"ratio": -0.1}, "ratio must be in"),
        ({"ratio": float("nan")}, "ratio must be in"),
        ({"min_channels": 0}, "min_channels must be at least 1, got 0"),
        ({"round_to": 0}, "round_to must be at least 1, got 0: give 8 or 16"),
        ({"batches": []}, "batches hold no samples"),
    ],
)
def test_bad_arguments_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        prune(silent(Around(lambda model, x: x)), torch.randn(2, 3, 8, 8), **options)
