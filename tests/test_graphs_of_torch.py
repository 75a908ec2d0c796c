"""Converted and fused models under torch.fx, torchvision's feature extraction, torch.jit.trace and torch.jit.script."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import fx, nn

import leannorm
from leannorm.train.models import import_torchvision

import_torchvision()
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402

TARGETS = ["grid:1/8", "bs:1/4", "full", "ghost:2", "renorm:3", "mabn:2", "bnet:3", "none", "gn:4"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


def network(target="grid:1/8", *, fused=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block())
    leannorm.convert(model, leannorm.parse_target(target))
    return leannorm.fuse(model)[0] if fused else model


def images(seed=1):
    return torch.randn(4, 3, 18, 18, generator=torch.Generator().manual_seed(seed))


def trained(model, steps=2):
    """Outputs, gradients and buffers of some steps."""
    torch.manual_seed(2)
    for step in range(steps):
        y = model(images(step))
        y.square().mean().backward()
    return y, {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_traced_model_trains_as_the_model_does(target, fused):
    model = network(target, fused=fused)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert {"1", "3.bn"} <= called
    torch.testing.assert_close(trained(traced), trained(model))
    torch.testing.assert_close(traced.eval()(images()), model.eval()(images()))
    traced.graph.lint()


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_is_that_of_torchs_layers(training):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block()).train(training)
    ours, theirs = (fx.symbolic_trace(model) for model in (network().train(training), plain))
    assert ours.code == theirs.code
    again = pickle.loads(pickle.dumps(ours))  # made here
    torch.testing.assert_close(again(images()), ours(images()))


def test_a_traced_model_is_converted_and_reverted():
    traced = fx.symbolic_trace(network())
    assert len(leannorm.convert(traced, leannorm.FullBatch())[1].changes) == 2
    plain, _ = leannorm.revert(traced)
    assert type(plain.get_submodule("1")) is nn.BatchNorm2d
    assert torch.isfinite(plain(images())).all()


@pytest.mark.parametrize("fused", [False, True])
def test_features_are_extracted_in_both_modes(fused):
    model = network(fused=fused)
    assert "3.bn" in get_graph_node_names(model)[0]
    extractor = create_feature_extractor(model, {"1": "early", "3.bn": "normalized", "3": "last"})
    for training in (True, False):
        torch.testing.assert_close(
            extractor.train(training)(images())["last"], copy.deepcopy(model).train(training)(images())
        )
    assert extractor(images())["normalized"].shape == (4, 8, 16, 16)
    assert (extractor(images())["early"] < 0).any()


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_are_traced_and_not_called_twice(kind):
    model = network()
    if kind == "forward":
        model[1].register_forward_hook(lambda module, args, output: 2 * output)
    else:
        model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    traced = fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(traced(images()), model(images()))


def test_a_residual_and_an_activation_are_recorded():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = leannorm.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.bn(x, residual=x)

    traced = fx.symbolic_trace(Added())
    torch.testing.assert_close(traced(images()), Added()(images()))


def test_lengths_are_recorded():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            layers, _ = leannorm.convert(nn.Sequential(nn.BatchNorm1d(3)), leannorm.MaskedSequences())
            self.bn = layers[0]

        def forward(self, x, lengths):
            return self.bn(x, lengths=lengths)

    x, lengths = images().flatten(2), torch.tensor([5, 9, 300, 2])
    torch.testing.assert_close(fx.symbolic_trace(Masked())(x, lengths), Masked()(x, lengths))


def test_instance_normalization_of_sequences_is_recorded():
    model, _ = leannorm.convert(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), leannorm.InstanceNormalization())
    torch.testing.assert_close(fx.symbolic_trace(model)(images().flatten(2)), model(images().flatten(2)))


def test_virtual_samples_are_missed_with_the_way_out():
    traced = fx.symbolic_trace(network("vdn:1"))
    with pytest.raises(RuntimeError, match="appended at the entry of the converted model"):
        traced(images())
    assert traced.eval()(images()).shape == (4, 8, 16, 16)
    leannorm.convert(traced.train(), leannorm.VirtualDataset(1))
    assert traced(images()).shape == (4, 8, 16, 16)


def test_a_forward_on_the_instance_is_refused():
    model = network()
    layer = model[1]
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)
    with pytest.raises(TypeError, match="whose forward was set on the instance"):
        fx.symbolic_trace(model)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", r"ignore:.torch\.jit\.trace.*deprecated:DeprecationWarning"
)
def test_jit_trace_in_eval_mode():
    model = network("grid:1/8").eval()
    torch.testing.assert_close(torch.jit.trace(model, images())(images(5)[:2]), model(images(5)[:2]))


def training_trace(model):
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.trace(model, images(), check_trace=False)


@pytest.mark.parametrize("target", ["grid:1/8", "bs:1/4", "fs:1/8@step+vdn:1", "vdn:1", "ghost:2", "range:4"])
def test_jit_trace_of_what_the_shape_decides_is_refused_in_training_mode(target):
    model = network(target)
    for fused in (False, True):
        if fused:
            leannorm.fuse(model, convolution=True)
        with pytest.raises(
            TypeError, match=r"jit\.trace cannot record .* in training mode.* call model\.eval\(\) first"
        ):
            training_trace(model)
    reverted, _ = leannorm.revert(model.eval())
    torch.testing.assert_close(training_trace(reverted)(images(5)), reverted(images(5)))


@pytest.mark.parametrize("target", ["full", "gn:2", "l1", "renorm:3"])
def test_jit_trace_in_training_mode_follows_the_batch(target):
    model = network(target)
    traced = training_trace(copy.deepcopy(model))
    model(images())
    for batch in (images(5), images(6)[:3, :, :9]):
        torch.testing.assert_close(traced(batch), model(batch))
    torch.testing.assert_close(dict(traced.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("target", ["grid:1/8", "ghost:2", "mabn:2"])
@pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
def test_jit_script_is_refused_with_the_way_out(target):
    model = network(target)
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile .* call leannorm\.revert\(model\) first"):
        torch.jit.script(model)
    assert torch.jit.script(leannorm.revert(model)[0])(images()).shape == (4, 8, 16, 16)
