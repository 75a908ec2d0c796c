"""fuse: what stands in the way is said, and what is refused computes as before."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fusion import Block, assert_same_training, block
from torch import nn
from torch.utils.checkpoint import checkpoint

import leannorm
from leannorm.nn.fused import Fused
from leannorm.train.models import import_torchvision

CONSTANT = torch.ones(())


def _overwrites_the_other(self, y, x):
    z = x * 1
    alias = z
    z += y
    return z * alias


def _discards(self, y, x):
    y.relu_()
    return y


def _if(self, y, x):
    return F.relu(y) if y.mean() > 0 else y


def _no_grad(self, y, x):
    with torch.no_grad():
        z = y * 2
    return F.relu(y) + z


def _autocast(self, y, x):
    with torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16):
        return F.relu(self.conv(x)) + F.relu(y)


def _checkpoint(self, y, x):
    return checkpoint(F.relu, y, use_reentrant=False)


def _reentrant(self, y, x):
    return checkpoint(F.relu, y, use_reentrant=True)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def _sets(self, y, x):
    self.kept = y
    return F.relu(y)


def _counts(self, y, x):
    self.calls = getattr(self, "calls", 0) + 1
    return F.relu(y)


def _childs_mode(self, y, x):
    return F.dropout(F.relu(y), 0.5, self.skip.training)


def _isinstance(self, y, x):
    z = F.relu(y)
    return self.bn(z) if isinstance(x, list) else z


UNTRACEABLE = {
    "control flow": (_if, "TraceError: symbolically traced variables cannot be used as inputs to control flow"),
    "no_grad": (_no_grad, "computes in a context"),
    "autocast": (_autocast, "computes in a context"),
    "checkpoint": (_checkpoint, "computes in a context"),
    "reentrant checkpoint": (_reentrant, "computes in a context"),
    "custom function": (lambda self, y, x: F.relu(y) + Double.apply(y), "computes in a context"),
    "attribute": (_sets, "sets attributes"),
    "counter": (_counts, "sets attributes"),
    "constant tensor": (lambda self, y, x: F.relu(y) * torch.ones(()), "makes a tensor"),
    "global tensor": (lambda self, y, x: F.relu(y) * CONSTANT, "makes a tensor"),
    "random tensor": (lambda self, y, x: F.relu(y) * float(torch.rand(())), "draws random numbers"),
    "random number": (lambda self, y, x: F.relu(y) * random.random(), "draws random numbers"),
    "numpy": (lambda self, y, x: F.relu(y) * np.random.rand(), "draws random numbers from NumPy"),  # noqa: NPY002
    "a child's mode": (_childs_mode, "reads the training mode of its children"),
}
NOT_FUSED = {
    "used twice": (lambda self, y, x: F.relu(y) + y, "its output is used 2 times"),
    "in place, result discarded": (_discards, "its output is used 2 times"),
}


@pytest.mark.parametrize(
    ("form", "reason"), [*UNTRACEABLE.values(), *NOT_FUSED.values()], ids=[*UNTRACEABLE, *NOT_FUSED]
)
def test_refused_with_the_reason_and_left_alone(form, reason):
    model = block(form)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2], dict(vars(model))  # noqa: NPY002
    _, report = leannorm.fuse(model)
    assert report.changes == ()
    assert report.refusals[0].module == "bn"
    assert reason in report.refusals[0].reason
    assert type(model).__name__ == "Block"
    assert type(model.bn) is nn.BatchNorm2d
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[2], vars(model)) == states[1:]  # noqa: NPY002
    assert model.training
    assert list(vars(model)["_buffers"]) == []


@pytest.mark.parametrize(
    ("form", "says"),
    [
        pytest.param(_overwrites_the_other, "", id="the sum is written into the other"),
        pytest.param(lambda self, y, x: torch.add(y, x, alpha=2), "", id="alpha"),
        pytest.param(lambda self, y, x: y + 1, "", id="a number"),
        pytest.param(lambda self, y, x: torch.clamp(y, min=0), "", id="one bound"),
        pytest.param(lambda self, y, x: F.leaky_relu(y, -0.1), "", id="a negative slope"),
        pytest.param(lambda self, y, x: F.softplus(y), "", id="another activation"),
        pytest.param(lambda self, y, x: F.relu(F.softplus(y)), "", id="something between"),
        pytest.param(lambda self, y, x: y, "", id="nothing"),
        pytest.param(lambda self, y, x: F.relu(y * x), "", id="a product"),
        pytest.param(lambda self, y, x: F.relu((y + x) + x), " + add", id="two additions"),
        pytest.param(lambda self, y, x: F.relu(y).relu(), " + relu", id="two activations"),
    ],
)
def test_what_one_operator_cannot_compute_stays(form, says):
    model = block(form)
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert [change.action for change in report.changes] == [f"batch norm{says}"]
    assert isinstance(model, Fused) is bool(says)
    assert_same_training(model, reference)


class InPlaceBetween(Block):
    def forward(self, x):
        z = x * 1
        y = self.bn(self.conv(x)) + z
        z.mul_(3)
        return F.silu(y) + z


def test_a_residual_that_changes_before_the_activation():
    model = InPlaceBetween()
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert report.changes[0].action == "batch norm + add"
    assert_same_training(model, reference)


def _hooked(which):
    model = block(lambda self, y, x: self.act(y))
    getattr(model, which).register_forward_hook(lambda m, i, y: None)
    return model


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (_hooked("bn"), "bn", "it has hooks"),
        (_hooked("act"), "bn", "act, the activation after it, has hooks"),
        (nn.Sequential(nn.BatchNorm2d(4), _hooked("act").act), "0", "the activation after it has hooks"),
        (nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU()), "0", "SyncBatchNorm shares statistics"),
        (nn.Sequential(type("Own", (nn.BatchNorm2d,), {})(4), nn.ReLU()), "0", "Own is a subclass"),
    ],
)
def test_layers_that_others_watch_or_that_are_not_understood(model, name, reason):
    model = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    _, report = leannorm.fuse(model)
    assert report.changes == ()
    assert report.refusals[0].module == name
    assert reason in report.refusals[0].reason
    assert [type(module) for module in model.modules()] == classes


def test_an_activation_of_a_subclass_is_not_taken_for_its_base():
    class Leaky(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + x

    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Leaky())
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert report.changes[0].action == "batch norm"
    assert_same_training(model, reference)


def test_a_forward_of_the_instances_own():
    model = block(lambda self, y, x: F.relu(y))
    model.forward = lambda x: model.bn(x)
    _, report = leannorm.fuse(model)
    assert report.refusals[0].reason == "Block: its forward was set on the instance"


class Tapping(nn.Module):
    """Reads between the layers of a Sequential."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return taps[1].sum() * x


def test_a_sequential_whose_layers_are_called_one_by_one():
    model = Tapping()
    model.features[2].inplace = False
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert [(r.module, r.reason) for r in report.refusals] == [("features.1", "its output is used 2 times")]
    assert [(c.module, c.action) for c in report.changes] == [("features.3", "batch norm + relu")]
    assert_same_training(model, reference, torch.randn(3, 4, 6, 6, dtype=torch.float64))
    model.features.append(nn.Softplus())
    reference.features.append(nn.Softplus())
    assert_same_training(model, reference, torch.randn(3, 4, 6, 6, dtype=torch.float64))


class Fickle(Block):
    def __init__(self, flag):
        super().__init__()
        self.flag = flag

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        return y * 2 if self.flag() else y


@pytest.mark.parametrize("raising", [False, True])
def test_outputs_that_differ_undo_everything(raising):
    calls = []

    def flag():
        calls.append(1)
        if raising and len(calls) > 5:
            raise ValueError("not again")
        return len(calls) == 1  # when the outputs are first computed, and not when the block is traced

    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Fickle(flag))
    before = [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    _, report = leannorm.fuse(model, torch.randn(2, 4, 8, 8))
    assert report.changes == ()
    assert [refusal.module for refusal in report.refusals] == ["1", "3.bn"]
    assert all("changed its training outputs: a relative error of 0.5" in r.reason for r in report.refusals)
    assert [type(module) for module in model.modules()] == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_the_check_leaves_modes_buffers_and_draws():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    leannorm.convert(model, leannorm.GridSampling(1 / 4, "step"))
    model.eval()
    model[3].train()
    state, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    _, report = leannorm.fuse(model, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert report.changes[0].action == "batch norm + relu"
    assert [module.training for module in model] == [False, False, False, True]
    assert model[1].statistics == leannorm.GridSampling(1 / 4, "step")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), draws)


def test_densenets_checkpoints():
    import_torchvision()
    from torchvision.models.densenet import _DenseLayer

    model = _DenseLayer(4, 2, 2, 0.0, memory_efficient=True)
    _, report = leannorm.fuse(model)
    assert report.changes == ()
    assert all("_DenseLayer: its forward cannot be traced" in refusal.reason for refusal in report.refusals)
    model.memory_efficient = False
    _, report = leannorm.fuse(model)
    assert [change.action for change in report.changes] == ["batch norm + relu"] * 2
    with pytest.warns(UserWarning, match="memory_efficient is set after"):
        model.memory_efficient = True
    assert type(model) is _DenseLayer


def test_a_fused_block_that_was_given_another_class_since():
    model = block(lambda self, y, x: F.relu(y))
    leannorm.fuse(model)
    fused = type(model)
    model.__class__ = type("Sharded", (fused,), {})
    with pytest.raises(RuntimeError, match=r"a fused Block became a Sharded after leannorm\.fuse; undo that before"):
        leannorm.revert(model)
    model.__class__ = fused
    leannorm.revert(model)


def test_every_layer_is_in_the_report_once():
    model = nn.ModuleDict(
        {
            "unused": nn.BatchNorm2d(4),
            "traced": block(lambda self, y, x: F.relu(y)),
            "not": block(_if),
            "nested": nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)), nn.ReLU()),
        }
    )
    _, report = leannorm.fuse(model)
    assert [(c.module, c.action) for c in report.changes] == [
        ("unused", "batch norm"),
        ("traced.bn", "batch norm + relu"),
        ("nested.0.0", "batch norm"),
    ]
    assert [r.module for r in report.refusals] == ["not.bn"]
