"""The cases on which other folders are tested, or were found wrong, by the names of their cases.

onnxscript: `rewriter/rules/common/_fuse_batchnorm_test.py`. pytorch: `test/inductor/test_efficient_conv_bn_eval.py`,
and issues by number. torchao: the guards of its pt2e fold, by issue. ExecuTorch: `backends/arm/test/passes`.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leannorm.graph import fold
from leannorm.graph.batch_norm import find

PAIRS = [
    (nn.Linear, nn.BatchNorm1d),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
    (nn.ConvTranspose1d, nn.BatchNorm1d),
    (nn.ConvTranspose2d, nn.BatchNorm2d),
    (nn.ConvTranspose3d, nn.BatchNorm3d),
]


class Layers(nn.Module):
    """Named layers and the computation on them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def folded_and_checked(model, *inputs):
    """Fold; the model stays, nothing normalises in the result, and that computes the same. Gives module -> action."""
    state = copy.deepcopy(model.state_dict())
    folded, report = fold(model, inputs)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not list(find(folded.graph))
    torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert {refusal.module for refusal in report.refusals} <= {""}
    return [(change.module, change.action) for change in report.changes]


@pytest.mark.parametrize("bias", [False, True])
def test_onnxscript_fuse_batchnorm_convtranspose(bias, randomized):
    model = randomized(nn.Sequential(nn.ConvTranspose2d(32, 64, 3, bias=bias), nn.BatchNorm2d(64)))
    actions = folded_and_checked(model, torch.randn(1, 32, 14, 16))
    assert actions == [("1", "folded into the conv_transpose2d 0")]


@pytest.mark.parametrize("bias", [False, True])
def test_onnxscript_fuse_batchnorm_conv(bias, randomized):
    model = randomized(nn.Sequential(nn.Conv2d(32, 64, 3, bias=bias), nn.BatchNorm2d(64)))
    assert folded_and_checked(model, torch.randn(1, 32, 14, 16)) == [("1", "folded into the conv2d 0")]


@pytest.mark.parametrize(("bias", "transposed"), [*itertools.product([False, True], repeat=2)])
def test_onnxscript_fuse_batchnorm_gemm(bias, transposed, randomized):
    def forward(m, x):
        weight = m.weight.t() if transposed else m.weight
        return m.bn(torch.addmm(m.bias, x, weight) if bias else torch.mm(x, weight))

    model = Layers(forward, bn=nn.BatchNorm1d(64))
    model.weight = nn.Parameter(torch.randn((64, 32) if transposed else (32, 64)))
    model.bias = nn.Parameter(torch.randn(64))
    ((module, action),) = folded_and_checked(randomized(model), torch.randn(3, 32))
    assert module == "bn"
    assert action.startswith(f"folded into the {'addmm' if bias else 'mm'} ")


def test_onnxscript_fuse_batchnorm_non_initializers():
    class Given(nn.Module):
        def forward(self, x, weight, bias, gamma, beta, var, mean):
            return F.batch_norm(F.conv2d(x, weight, bias), mean, var, gamma, beta)

    constants = (torch.randn(64, 32, 3, 3), *(torch.rand(64) + 0.5 for _ in range(5)))
    folded, report = fold(Given().eval(), (torch.randn(1, 32, 14, 16), *constants))
    assert report.changes == ()
    assert [r.reason.partition(":")[0] for r in report.refusals if r.module] == ["its running_mean is not constant"]
    assert len(list(find(folded.graph))) == 1


def test_onnxscript_fuse_batchnorm_graph_inputs(randomized):
    model = randomized(Layers(lambda m, x, weight: m.bn(F.conv2d(x, weight)), bn=nn.BatchNorm2d(64)))
    ((module, action),) = folded_and_checked(model, torch.randn(1, 32, 14, 16), torch.randn(64, 32, 3, 3))
    assert module == "bn"
    assert action.startswith("replaced by a scale and a shift per channel: the weight of the conv2d before it is not a")


def pair(layer, norm, bias, channels=32):
    options = {} if layer is nn.Linear else {"kernel_size": 3, "stride": 2}
    size = 2 if "Transpose" in layer.__name__ else 12
    dims = 0 if layer is nn.Linear else int(layer.__name__[-2])
    return (lambda inputs: (layer(inputs, channels, bias=bias, **options), norm(channels))), torch.rand(
        4, 3, *[size] * dims
    )


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("layer", "norm"), PAIRS)
def test_pytorch_conv_op(layer, norm, bias, synchronized, randomized):
    build, x = pair(layer, norm, bias)
    model = nn.Sequential(*build(3))
    if synchronized:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ((module, action),) = folded_and_checked(randomized(model), x)
    assert module == "1"
    assert action.startswith("folded into the ")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("layer", "norm"), PAIRS)
def test_pytorch_multi_user_conv_op(layer, norm, bias, randomized):
    channels = 8  # four transposed convolutions make 47 positions a side of 2
    build, x = pair(layer, norm, bias, channels)
    layers = {}
    for i in (1, 2, 3):
        layers[f"conv{i}"], layers[f"bn{i}"] = build(3 if i == 1 else channels)
    if "Transpose" not in layer.__name__ and layer is not nn.Linear:
        x = torch.rand(4, 3, *[40] * (x.ndim - 2))

    def forward(m, x):
        x = m.bn2(m.conv2(m.conv2(m.bn1(m.conv1(x)))))
        x = m.bn3(m.conv3(x))
        return m.bn3(x) + x

    actions = folded_and_checked(randomized(Layers(forward, **layers)), x)
    kinds = [(module, action.partition(" ")[0]) for module, action in actions]
    second = "replaced" if "Transpose" in layer.__name__ else "folded"  # conv2 is called twice, conv3 may take it
    assert kinds == [("bn1", "folded"), ("bn2", second), ("bn3", "folded"), ("bn3", "replaced")]
    assert ("shares its weight with" in actions[1][1]) == (second == "replaced")
    assert actions[1][1].endswith(" conv3") == (second == "folded")


def test_pytorch_197539_a_reused_convolution_is_not_corrupted(randomized):
    model = Layers(lambda m, x: m.bn(m.conv(x)) + m.conv(torch.relu(x)), conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3))
    ((_, action),) = folded_and_checked(randomized(model), torch.randn(2, 3, 8, 8))
    assert "the conv2d before it shares its weight with conv2d_1" in action


@pytest.mark.parametrize("groups", [2, 4])
def test_pytorch_180995_grouped_transposed_convolution(groups, randomized):
    model = randomized(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups), nn.BatchNorm2d(8)))
    assert folded_and_checked(model, torch.randn(2, 4, 5, 5)) == [("1", "folded into the conv_transpose2d 0")]


@pytest.mark.parametrize("channels", [1, 4])
def test_pytorch_118990_features_that_are_not_the_norms(channels, randomized):
    model = randomized(nn.Sequential(nn.Linear(3, 7), nn.BatchNorm2d(channels)))
    ((_, action),) = folded_and_checked(model, torch.randn(2, channels, 5, 3))
    assert "is not its channels" in action


@pytest.mark.parametrize("tokens", [4, 7])
def test_torchao_4116_linear_on_three_dimensions(tokens, randomized):
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(tokens)))
    ((_, action),) = folded_and_checked(model, torch.randn(2, tokens, 5))
    assert "the linear before it gives shape" in action
    assert "dimension 1 is not its channels" in action


@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
def test_torchao_2980_eps_is_the_layers_own(eps, randomized):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=eps), nn.ReLU(), nn.BatchNorm2d(4, eps=2 * eps))
    actions = folded_and_checked(randomized(model), torch.randn(2, 3, 5, 5))
    assert [action.partition(" ")[0] for _, action in actions] == ["folded", "replaced"]


def test_torchao_a_convolution_with_another_user_is_left(randomized):
    model = Layers(lambda m, x: F.hardtanh(y := m.conv(x)) + m.bn(y), conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3))
    ((_, action),) = folded_and_checked(randomized(model), torch.randn(2, 3, 8, 8))
    assert "the conv2d before it has other users: hardtanh" in action


@pytest.mark.parametrize("affine", [False, True])
def test_executorch_merge_one_of_two(affine, randomized):
    def forward(m, x):
        y = m.conv1(x)
        return m.conv2(F.relu6(m.bn(y))), m.bn(m.conv3(y))

    layers = {f"conv{i}": nn.Conv2d(3, 3, 3) for i in (1, 2, 3)}
    model = randomized(Layers(forward, **layers, bn=nn.BatchNorm2d(3, affine=affine)))
    actions = folded_and_checked(model, torch.randn(1, 3, 16, 16))
    assert [(module, action.partition(":")[0]) for module, action in actions] == [
        ("bn", "replaced by a scale and a shift per channel"),
        ("bn", "folded into the conv2d conv3"),
    ]


def test_executorch_merge_none_of_two(randomized):
    def forward(m, x):
        y = m.conv1(x)
        return m.conv2(F.relu6(m.bn(y))), m.bn(m.conv2(y))

    layers = {f"conv{i}": nn.Conv2d(3, 3, 3) for i in (1, 2)}
    actions = folded_and_checked(randomized(Layers(forward, **layers, bn=nn.BatchNorm2d(3))), torch.randn(1, 3, 16, 16))
    assert "has other users" in actions[0][1]
    assert "shares its weight" in actions[1][1]
