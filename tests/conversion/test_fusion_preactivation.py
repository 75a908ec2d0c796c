"""fuse with convolutions: batch norm before a pointwise convolution is computed with the one behind it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import training_steps
from torch import nn
from training_steps import images, small_densenet

import leannorm
from leannorm.backends import cpu
from leannorm.bench.training import saved_bytes
from leannorm.functional import preactivated

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
SOURCE = leannorm.parse_statistics("grid:1/4")


class Bottleneck(nn.Module):
    """As of a ResNet with preactivation: bn -> relu -> 1x1 -> bn -> relu -> 3x3."""

    join = staticmethod(lambda self, x: self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.bn1, self.relu = nn.BatchNorm2d(12), nn.ReLU()
        self.conv1 = nn.Conv2d(12, 12, **{"kernel_size": 1, "bias": False, **options})
        self.bn2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3, bias=False)

    def forward(self, x):
        return self.conv2(type(self).join(self, x))


def bottleneck(join=None, **options) -> nn.Module:
    if join is None:
        return Bottleneck(**options)
    return type("Bottleneck", (Bottleneck,), {"join": staticmethod(join), "__module__": __name__})(**options)


@pytest.fixture
def computed(monkeypatch):
    """Collect the shapes of the results of the one operator."""
    found, right = [], preactivated.preactivated.preactivated

    def call(*args):
        y, *others = right(*args)
        found.append(tuple(y.shape))
        return y, *others

    monkeypatch.setattr(preactivated.preactivated, "preactivated", call)
    return found


def fused(model, **options):
    model = model.to(memory_format=torch.channels_last)
    leannorm.convert(model, SOURCE)
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, convolution=True, **options)
    return model, reference, report


assert_same_training = partial(training_steps.assert_same_training, rtol=1e-3, atol=2e-4)


X = images(4, 12, 9, 9)


def test_a_bottleneck(computed):
    model, reference, report = fused(bottleneck(), example_inputs=X)
    assert [(c.module, c.action) for c in report.changes] == [
        ("bn1", "batch norm + relu"),
        ("bn2", "convolution + batch norm + relu"),
    ]
    computed.clear()
    assert_same_training(model, reference, X)
    assert computed == [(4, 12, 9, 9)]
    assert int(model.bn1.num_batches_tracked) == int(reference.bn1.num_batches_tracked) > 0
    assert_same_training(model.eval(), reference.eval(), X)
    assert len(computed) == 1


@pytest.mark.parametrize(
    "join",
    [
        lambda self, x: self.bn2(self.conv1(self.bn1(x))),
        lambda self, x: F.silu(self.bn2(self.conv1(F.gelu(self.bn1(x))))),
        lambda self, x: F.relu(self.bn2(self.conv1(self.relu(self.bn1(torch.cat([x[:, :5], x[:, 5:]], 1)))))),
    ],
    ids=["no activation", "smooth", "concatenation of views"],
)
def test_forms(computed, join):
    model, reference, _ = fused(bottleneck(join), example_inputs=X)
    computed.clear()
    assert_same_training(model, reference, X)
    assert len(computed) == (0 if "cat" in join.__code__.co_names else 1)


def _residual(self, x):
    return self.relu(self.bn2(self.conv1(self.relu(self.bn1(x)))) + x)


def _used_twice(self, x):
    z = self.relu(self.bn1(x))
    return self.relu(self.bn2(self.conv1(z))) + z


def _output_used_twice(self, x):
    u = self.conv1(self.relu(self.bn1(x)))
    return self.relu(self.bn2(u)) + u


def _changed_in_between(self, x):
    z = self.relu(self.bn1(x))
    x.mul_(2)
    return self.relu(self.bn2(self.conv1(z)))


def _pooled(self, x):
    return self.relu(self.bn2(self.conv1(F.avg_pool2d(self.relu(self.bn1(x)), 2))))


@pytest.mark.parametrize("join", [_residual, _used_twice, _output_used_twice, _pooled])
def test_forms_that_stay_apart(computed, join):
    model, reference, _ = fused(bottleneck(join), example_inputs=X)
    assert_same_training(model, reference, X)
    assert computed == []


def test_an_input_that_changes_in_between_is_read_before(computed):
    model, reference, _ = fused(bottleneck(_changed_in_between))
    with torch.no_grad():
        torch.testing.assert_close(model(X.clone()), reference(X.clone()), rtol=1e-4, atol=1e-5)
    assert computed == []


def test_norm_act_layers_of_timm(computed):
    norm_act = pytest.importorskip("timm.layers.norm_act")
    model = bottleneck(lambda self, x: self.bn2(self.conv1(self.bn1(x))))
    model.bn1, model.bn2 = norm_act.BatchNormAct2d(12), norm_act.BatchNormAct2d(12)
    model, reference, report = fused(model, example_inputs=X)
    assert [change.action for change in report.changes] == ["batch norm + relu", "convolution + batch norm + relu"]
    computed.clear()
    assert_same_training(model, reference, X)
    assert len(computed) == 1


@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"stride": 2}, {"groups": 2}, {"kernel_size": 3, "padding": 1}, {"padding": 1}],
    ids=str,
)
def test_other_convolutions_stay_apart(computed, options):
    model, reference, _ = fused(bottleneck(**options))
    for twin in (model, reference):
        if twin.conv1.bias is not None:
            twin.conv1.bias.requires_grad_(False)  # its gradient is nothing but rounding
    assert_same_training(model, reference, X)
    assert computed == []


def _hooked(model):
    model.bn1.register_forward_hook(lambda *_: None)


def _hooked_convolution(model):
    model.conv1.register_forward_hook(lambda *_: None)


def _exact_before(model):
    model.bn1.statistics = leannorm.FullBatch()


def _exact_behind(model):
    model.bn2.statistics = leannorm.FullBatch()


def _frozen(model):
    leannorm.freeze(model.bn1)


@pytest.mark.parametrize("change", [_hooked, _hooked_convolution, _exact_before, _exact_behind, _frozen])
def test_what_comes_later_is_computed_apart(computed, change):
    model, reference, _ = fused(bottleneck())
    for twin in (model, reference):
        twin(X).sum().backward()
        twin.zero_grad()
        change(twin)
    computed.clear()
    assert_same_training(model, reference, X)
    assert computed == []


def test_autocast_computes_apart(computed):
    model, reference, _ = fused(bottleneck())
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(X), reference(X)
    assert computed == []
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("join", [None, lambda self, x: self.bn2(self.conv1(F.relu(self.bn1(torch.cat([x, x], 1)))))])
def test_compiled_without_a_graph_break(computed, join):
    model = bottleneck(join)
    if join is not None:
        model.bn1, model.conv1 = nn.BatchNorm2d(24), nn.Conv2d(24, 12, 1, bias=False)
    model, reference, _ = fused(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), reference(X), rtol=1e-4, atol=1e-5)
    assert computed == []


def test_densenet(computed):
    model, reference, _ = fused(small_densenet())
    x = images(4, 3, 64, 64)
    assert_same_training(model, reference, x)
    assert len(computed) == 5


def test_densenet_of_timm(computed):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made = timm.models.densenet.DenseNet(growth_rate=8, block_config=(3, 2), num_classes=5)
    model, reference, _ = fused(made)
    assert_same_training(model, reference, images(4, 3, 64, 64))
    assert len(computed) == 5


def test_a_dense_network_keeps_little_for_backward():
    model, reference, _ = fused(small_densenet(16))
    ours, theirs = (saved_bytes(each, images(4, 3, 64, 64)) for each in (model, reference))
    assert ours < 0.5 * theirs


def test_tune_times_the_layers_one_by_one(computed, tmp_path):
    model, reference, _ = fused(small_densenet())
    x = images(4, 3, 64, 64)
    _, report = leannorm.tune(model, x, plan=tmp_path / "plan.json")
    folded = sum("folded" in change.action and change.action.startswith("convolution") for change in report.changes)
    layers = [module for name, module in model.named_modules() if name.endswith("norm2")]
    computed.clear()
    assert_same_training(model, reference, x)
    assert len(computed) == sum(layer.folds_convolution for layer in layers) <= folded
