"""Which neighbour takes a batch normalization up, through what, by named cases: exact in float64, for any batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leannorm.graph import fold
from leannorm.graph.batch_norm import find

IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
VECTORS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).double()


class Layers(nn.Module):
    """Named layers under test and the computation on them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.compute(self, x)


def conv(outputs=4, kernel=3, inputs=4, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


def bn(channels=4):
    return nn.BatchNorm2d(channels, eps=1e-3)


class Dense(nn.Module):
    """Two layers of DenseNet and a transition."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = conv(4, padding=1, bias=False), bn(4)
        self.norm1, self.conv1, self.norm2, self.conv2 = bn(4), conv(8, 1, bias=False), bn(8), conv(3, 3, 8, padding=1)
        self.norm3, self.conv3 = bn(7), conv(5, 1, 7, bias=False)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return F.avg_pool2d(self.conv3(F.relu(self.norm3(torch.cat([x, new], 1)))), 2)


class RepVGG(nn.Module):
    def __init__(self, groups=1, stride=1):
        super().__init__()
        self.large = conv(4, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.small = conv(4, 1, stride=stride, groups=groups, bias=False)
        self.bn_large, self.bn_small, self.bn_identity = bn(), bn(), bn() if stride == 1 else None

    def forward(self, x):
        y = self.bn_large(self.large(x)) + self.bn_small(self.small(x))
        return F.relu(y if self.bn_identity is None else y + self.bn_identity(x))


FOLDED = {
    "one layer on two paths": (
        Layers(
            lambda m, x: m.conv(torch.cat([y := m.bn(x), y.clone()], 1)),
            bn=bn(),
            conv=conv(5, 3, inputs=8),
        ),
        IMAGES,
        {"bn": "the conv2d conv and the conv2d conv"},
    ),
    "transposed convolution": (
        Layers(lambda m, x: m.bn(m.up(x)), up=nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), bn=bn(6)),
        IMAGES,
        {"bn": "the conv_transpose2d up"},
    ),
    "through average pooling": (
        Layers(lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 2, padding=1, count_include_pad=False)), conv=conv(), bn=bn()),
        IMAGES,
        {"bn": "the conv2d conv"},
    ),
    "through global pooling and flatten": (
        Layers(lambda m, x: m.bn(F.adaptive_avg_pool2d(m.conv(x), 1).flatten(1)), conv=conv(), bn=nn.BatchNorm1d(4)),
        IMAGES,
        {"bn": "the conv2d conv"},
    ),
    "through a mean": (
        Layers(lambda m, x: m.bn(m.conv(x).mean((-2, -1))), conv=conv(), bn=nn.BatchNorm1d(4)),
        IMAGES,
        {"bn": "the conv2d conv"},
    ),
    "through upsampling": (
        Layers(
            lambda m, x: m.bn(F.interpolate(m.conv(x), scale_factor=2, mode="bilinear")), conv=conv(bias=False), bn=bn()
        ),
        IMAGES,
        {"bn": "the conv2d conv"},
    ),
    "through dropout in eval mode": (
        Layers(lambda m, x: m.bn(m.drop(m.conv(x))), conv=conv(), drop=nn.Dropout(), bn=bn()),
        IMAGES,
        {"bn": "the conv2d conv"},
    ),
    "through a strided slice and padding by reflection": (
        Layers(lambda m, x: m.bn(F.pad(m.conv(x)[:, :, 1::2], (1, 1, 0, 1), mode="reflect")), conv=conv(), bn=bn()),
        IMAGES,
        {"bn": "the conv2d conv"},
    ),
    "linear layer on tokens by axis": (
        Layers(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(6, 4), bn=nn.BatchNorm1d(4)),
        TOKENS,
        {"bn": "the linear fc"},
    ),
    "linear layer on flattened tokens": (
        Layers(
            lambda m, x: m.bn(m.fc(x).flatten(0, 1)).unflatten(0, (-1, 5)),
            fc=nn.Linear(6, 4, bias=False),
            bn=nn.BatchNorm1d(4),
        ),
        TOKENS,
        {"bn": "the linear fc"},
    ),
    "linear layer as a map": (
        Layers(lambda m, x: m.bn(m.fc(x).unflatten(1, (4, 3, 3))), fc=nn.Linear(6, 36), bn=bn()),
        VECTORS,
        {"bn": "the linear fc"},
    ),
    "concatenated convolutions": (
        Layers(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), a=conv(2), b=conv(3, bias=False), bn=bn(5)),
        IMAGES,
        {"bn": "the conv2d a and the conv2d b"},
    ),
    "added convolutions": (
        Layers(lambda m, x: m.bn(torch.sub(m.a(x), m.b(F.relu(x)), alpha=3)), a=conv(), b=conv(bias=False), bn=bn()),
        IMAGES,
        {"bn": "the conv2d a and the conv2d b"},
    ),
    "before a linear layer": (
        Layers(lambda m, x: m.fc(m.bn(x)), bn=nn.BatchNorm1d(6), fc=nn.Linear(6, 3)),
        VECTORS,
        {"bn": "the linear fc"},
    ),
    "before a linear layer through flatten": (
        Layers(lambda m, x: m.fc(m.bn(x).flatten(1)), bn=bn(), fc=nn.Linear(256, 3, bias=False)),
        IMAGES,
        {"bn": "the linear fc"},
    ),
    "before a linear layer through global pooling": (
        Layers(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.bn(x), 1).flatten(1)), bn=bn(), fc=nn.Linear(4, 3)),
        IMAGES,
        {"bn": "the linear fc"},
    ),
    "before a linear layer on the last axis": (
        Layers(lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1)), bn=bn(), fc=nn.Linear(4, 3)),
        IMAGES,
        {"bn": "the linear fc"},
    ),
    "before two convolutions": (
        Layers(
            lambda m, x: m.a(y := m.bn(x)) * m.b(F.dropout(y, training=False)),
            bn=bn(),
            a=conv(3),
            b=conv(3, bias=False),
        ),
        IMAGES,
        {"bn": "the conv2d a and the conv2d b"},
    ),
    "before a grouped convolution": (
        Layers(lambda m, x: m.a(m.bn(x)), bn=bn(), a=conv(6, 3, groups=2, stride=2, bias=False)),
        IMAGES,
        {"bn": "the conv2d a"},
    ),
    "before a transposed convolution of one pixel": (
        Layers(lambda m, x: m.up(m.bn(x)), bn=bn(), up=nn.ConvTranspose2d(4, 6, 1, groups=2)),
        IMAGES,
        {"bn": "the conv_transpose2d up"},
    ),
    "before a convolution through a concatenation": (
        Layers(lambda m, x: m.a(torch.cat([x, m.bn(x)], 1)), bn=bn(), a=conv(3, 3, 8)),
        IMAGES,
        {"bn": "the conv2d a"},
    ),
    "two before a convolution through a concatenation": (
        Layers(lambda m, x: m.a(torch.cat([m.bn(x), m.other(F.relu(x))], 1)), bn=bn(), other=bn(), a=conv(3, 3, 8)),
        IMAGES,
        {"bn": "the conv2d a", "other": "the conv2d a"},
    ),
    "before a convolution through a maximum": (
        Layers(lambda m, x: m.a(F.max_pool2d(m.bn(x), 3, 2, 1)), bn=bn(), a=conv()),
        IMAGES,
        {"bn": "the conv2d a"},
    ),
    "batch norm after batch norm": (
        Layers(lambda m, x: m.bn2(m.bn1(F.relu(x))), bn1=bn(), bn2=bn()),
        IMAGES,
        {"bn1": "the batch normalization bn2"},
    ),
    "three batch norms in a row behind a convolution": (
        Layers(lambda m, x: m.c(m.b(m.a(m.conv(x)))), conv=conv(bias=False), a=bn(), b=bn(), c=bn()),
        IMAGES,
        {"a": "the conv2d conv", "b": "the conv2d conv", "c": "the conv2d conv"},
    ),
    "before a convolution with a border of zeros, without shift": (
        Layers(lambda m, x: m.a(m.bn(x)), bn=nn.BatchNorm2d(4, affine=False), a=conv(padding=1)),
        IMAGES,
        {"bn": "the conv2d a"},
    ),
    "DenseNet": (Dense(), IMAGES, {"norm0": "the conv2d stem", "norm2": "the conv2d conv1"}),
}


def check_fold(model, x, bound=1e-12):
    """Fold and return the report: nothing normalises, and the outputs are the same for another batch too."""
    model = model.double()
    folded, report = fold(model, x)
    assert not list(find(folded.graph))
    assert report.refusals == ()
    for batch in (x, torch.cat([x, 2 * x, x - 1])):
        torch.testing.assert_close(folded(batch), model(batch), rtol=bound, atol=bound)
    return folded, report


@pytest.mark.parametrize("case", FOLDED)
def test_folded_into(case, randomized):
    model, x, expected = FOLDED[case]
    model = randomized(model)
    if "without shift" in case:
        model.bn.running_mean.zero_()
    _, report = check_fold(model, x)
    actions = {change.module: change.action for change in report.changes}
    for module, targets in expected.items():
        assert actions[module] == f"folded into {targets}"
    left = sorted(set(actions) - set(expected))
    assert all(actions[module].startswith("replaced by a scale and a shift per channel: ") for module in left)
    assert left == {"DenseNet": ["norm1", "norm3"], "batch norm after batch norm": ["bn2"]}.get(case, [])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_branches_of_repvgg_become_one_convolution(randomized, groups):
    folded, report = check_fold(randomized(RepVGG(groups)), IMAGES)
    calls = [node.target for node in folded.graph.nodes if node.op == "call_function"]
    assert [str(target).split(".")[1] for target in calls] == ["conv2d", "relu"]
    actions = {change.module: change.action for change in report.changes}
    assert actions["bn_large"] == "folded into the conv2d large"
    assert actions["bn_identity"] == "folded into the parallel conv2d large"
    assert actions["small"] == "merged with the parallel conv2d large"


def test_the_branches_of_a_strided_repvgg_merge_too(randomized):
    folded, _ = check_fold(randomized(RepVGG(stride=2)), IMAGES)
    assert len(folded.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)) == 1


def tied():
    a, b = conv(padding=1), conv(padding=1)
    b.weight = a.weight
    return a, b


UNMERGED = {
    "other strides": (conv(padding=1, stride=2), conv(kernel=5)),
    "other groups": (conv(padding=1), conv(kernel=1, groups=2)),
    "other dilations": (conv(padding=2, dilation=2), conv(padding=1)),
    "padding in words": (conv(padding="same"), conv(padding="same")),
    "a place outside of the larger kernel": (conv(stride=5), conv(kernel=1, stride=5, padding=1)),
    "shared weights": tied(),
    "results that broadcast": (conv(kernel=8), conv(kernel=1)),
    "another input": (conv(), conv()),
    "another user": (conv(), conv()),
    "a factor": (conv(), conv()),
}


@pytest.mark.parametrize("case", UNMERGED)
def test_branches_that_do_not_fit_stay_two_convolutions(case, randomized):
    def forward(m, x):
        a, b = m.bn_a(m.a(x)), m.bn_b(m.b(F.relu(x) if case == "another input" else x))
        total = torch.add(a, b, alpha=2) if case == "a factor" else a + b
        return total * a if case == "another user" else total

    a, b = UNMERGED[case]
    folded, report = check_fold(randomized(Layers(forward, a=a, b=b, bn_a=bn(), bn_b=bn())), IMAGES)
    assert sum("conv2d" in str(node.target) for node in folded.graph.nodes if node.op == "call_function") == 2
    assert [change.module for change in report.changes] == ["bn_a", "bn_b"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 2, padding=1)), "it follows avg_pool2d"),
        (lambda m, x: m.bn(F.pad(m.conv(x), (1, 1))), "it follows pad"),
        (lambda m, x: m.bn(F.dropout(m.conv(x), 0.0, training=True)), "it follows dropout"),
        (lambda m, x: m.bn(m.conv(x).transpose(1, 2)[:, :4]), "the slice before it mixes channels"),
        (lambda m, x: m.bn(m.conv(x) + 1), "it follows add"),
        (lambda m, x: m.bn(m.conv(x) + x[:, :, 1:-1, 1:-1]), "it follows add"),
        (lambda m, x: m.bn((y := m.conv(x)) + y), "reads one tensor twice"),
        (lambda m, x: m.bn(torch.cat([y := m.conv(x)[:, :2], y], 1)), "reads one tensor twice"),
        (lambda m, x: m.bn(m.conv(x) + F.relu(m.conv(x))), "shares its weight with conv2d_1"),
        (lambda m, x: m.bn((y := F.avg_pool2d(m.conv(x), 2)) * 1) + y, "it follows mul"),
        (lambda m, x: m.bn(y := F.avg_pool2d(m.conv(x), 2)) + y, "the avg_pool2d before it has other users: add"),
        (lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)), "mixes channels with other dimensions"),
        (lambda m, x: F.relu(m.bn(x)), "relu (relu) after it cannot absorb it"),
        (lambda m, x: m.padded(m.bn(x)), "the zeros at the border of the conv2d after it would get no shift"),
        (lambda m, x: m.same(m.bn(x)), "the zeros at the border of the conv2d after it would get no shift"),
        (lambda m, x: m.up(m.bn(x)), "the shift would differ at the borders of the conv_transpose2d after it"),
        (
            lambda m, x: m.spread(m.bn(x)),
            "the shift would differ between the positions of the conv",
        ),
        (lambda m, x: m.longer(m.bn(x)), "the shift would differ at the borders of the conv_transpose2d after it"),
        (lambda m, x: m.conv(y := m.bn(x)) + y[:, :, 1:-1, 1:-1], "after it cannot absorb it"),
        (lambda m, x: m.conv(m.bn(x)) + m.conv(x), "the conv2d after it shares its weight with conv2d_1"),
        (lambda m, x: m.conv(F.max_pool2d(m.bn(x), 2)), "mixes channels with other dimensions"),
        (lambda m, x: m.fc(m.bn(x)), "takes channels from another dimension"),
        (lambda m, x: F.linear(x, m.bn(x)[0, 0]), "after it cannot absorb it"),
        (lambda m, x: F.conv2d(x, m.bn(m.conv.weight)), "reads it as a weight or bias"),
        (lambda m, x: m.conv(m.bn(x)) + x.mul_(2)[:, :, 1:-1, 1:-1], "mul_ writes to its input"),
        (lambda m, x: (y := x * 2, z := m.bn(y), y.add_(1), m.conv(z))[-1], "writes to its input"),
        (
            lambda m, x: (y := x * 2, z := m.bn(y), y.view(-1)[::2].zero_(), m.conv(z))[-1],
            "writes to its input",
        ),
    ],
)
def test_what_would_be_wrong_is_not_folded(forward, reason, randomized):
    model = Layers(
        forward,
        conv=conv(),
        bn=bn(),
        padded=conv(padding=1),
        same=conv(padding="same"),
        up=nn.ConvTranspose2d(4, 4, 2),
        spread=nn.ConvTranspose2d(4, 4, 1, stride=2),
        longer=nn.ConvTranspose2d(4, 4, 1, dilation=2, output_padding=1),
        fc=nn.Linear(8, 3),
    )
    model = randomized(model).double()
    with torch.no_grad():
        model.bn.weight[1] = -0.5
    folded, report = fold(model, IMAGES.clone())
    assert not list(find(folded.graph))
    (change,) = report.changes
    assert change.action.startswith("replaced by")
    assert reason in change.action
    torch.testing.assert_close(folded(IMAGES.clone()), model(IMAGES.clone()), rtol=1e-12, atol=1e-12)
