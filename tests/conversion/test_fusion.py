"""fuse: every form is found, and outputs, gradients, buffers, classes and names stay what they were."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import leannorm
from leannorm.train.models import build, import_torchvision

import_torchvision()

from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402 - after its missing operators are defined


class Block(nn.Module):
    """conv -> bn -> whatever a test does with it."""

    after = staticmethod(lambda self, y, x: y)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.skip = nn.Identity()
        self.act = nn.SiLU(inplace=True)
        self.register_buffer("position", torch.randn(1, 4, 1, 1))

    def forward(self, x):
        return type(self).after(self, self.bn(self.conv(x)), x)


def block(after) -> nn.Module:
    return type("Block", (Block,), {"after": staticmethod(after), "__module__": __name__})()


def train_step(model, x, *, leaf=False):
    """Give everything that a training step computes."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = model(x if leaf else x * 1)  # blocks may work in place
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return y, x.grad, gradients, dict(model.named_buffers())


def assert_same_training(model, reference, x=None):
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64) if x is None else x
    model.double(), reference.double()
    torch.testing.assert_close(train_step(model, x), train_step(reference, x))
    assert list(model.state_dict()) == list(reference.state_dict())


def _statement(self, y, x):
    y += x
    return F.relu(y)


def _aliases(self, y, x):
    z = x * 2
    alias = z
    z *= 3
    z -= 1
    return F.relu(y) + z + alias


FORMS = {
    "relu": {
        "functional": lambda self, y, x: F.relu(y),
        "functional in place": lambda self, y, x: F.relu(y, inplace=True),
        "functional in place, by position": lambda self, y, x: F.relu(y, True),
        "torch": lambda self, y, x: torch.relu(y),
        "torch in place": lambda self, y, x: torch.relu_(y),
        "method": lambda self, y, x: y.relu(),
        "method in place": lambda self, y, x: y.relu_(),
        "beside augmented assignments": _aliases,
        "through an identity": lambda self, y, x: F.relu(self.skip(y)),
    },
    "silu": {
        "module": lambda self, y, x: self.act(y),
        "functional": lambda self, y, x: F.silu(y),
        "module used twice": lambda self, y, x: self.act(F.max_pool2d(self.act(y), 1)),
    },
    "clamp(0.0, 6.0)": {
        "relu6": lambda self, y, x: F.relu6(y),
        "hardtanh": lambda self, y, x: F.hardtanh(y, 0, 6),
        "clamp": lambda self, y, x: torch.clamp(y, min=0, max=6),
        "method": lambda self, y, x: y.clamp_(0.0, 6.0),
    },
    "hardswish": {"functional": lambda self, y, x: F.hardswish(y)},
    "gelu": {"functional": lambda self, y, x: F.gelu(y)},
    "gelu_tanh": {"functional": lambda self, y, x: F.gelu(y, approximate="tanh")},
    "leaky_relu(0.01)": {"functional": lambda self, y, x: F.leaky_relu(y)},
    "leaky_relu(0.2)": {"slope": lambda self, y, x: F.leaky_relu_(y, 0.2)},
    "add": {
        "plus": lambda self, y, x: y + x,
        "radd": lambda self, y, x: x + y,
        "torch": lambda self, y, x: torch.add(x, y),
        "alpha": lambda self, y, x: torch.add(y, x, alpha=1),
        "method": lambda self, y, x: y.add(x),
    },
    "add + relu": {
        "statement": _statement,
        "method in place": lambda self, y, x: F.relu(y.add_(x)),
        "through identities": lambda self, y, x: F.relu(self.skip(self.skip(y) + x)),
        "plus": lambda self, y, x: torch.relu(x + y),
    },
    "add + silu": {"module": lambda self, y, x: self.act(x + y)},
}
CASES = [pytest.param(form, words, id=f"{words}: {name}") for words, d in FORMS.items() for name, form in d.items()]


@pytest.mark.parametrize(("form", "words"), CASES)
def test_every_form(form, words):
    model = block(form)
    reference = copy.deepcopy(model)
    fused, report = leannorm.fuse(model, torch.randn(2, 4, 6, 6))
    assert fused is model
    assert report.refusals == ()
    assert [(change.module, change.action) for change in report.changes] == [("bn", f"batch norm + {words}")]
    assert isinstance(model, type(reference))
    calls = operator_calls(model, torch.randn(2, 4, 6, 6))
    assert len(calls) == 1
    assert (calls[0]["residual"], calls[0]["activation"]) == (
        "add" in words,
        words.split("(")[0].split(" ")[-1] != "add",
    )
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(model.eval()(x.clone()), reference.eval()(x.clone()))
    assert_same_training(model.train(), reference.train())


def operator_calls(model, *args, **kwargs):
    """Give with what the operator is called in a copy of the model."""

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.leannorm.batch_norm.default:
                self.calls.append({"residual": args[3] is not None, "activation": args[8] != ""})
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Record() as record:
        copy.deepcopy(model)(*args, **kwargs)
    return record.calls


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2, 0.5), nn.LeakyReLU(0.3), nn.SiLU(), nn.Hardswish(), nn.GELU("tanh")],
    ids=str,
)
def test_sequential(module):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Identity(), module, nn.BatchNorm2d(4))
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert [change.module for change in report.changes] == ["1", "4"]
    assert report.changes[0].action.startswith("batch norm + ")
    assert report.changes[1].action == "batch norm"
    assert isinstance(model, nn.Sequential)
    assert [call["activation"] for call in operator_calls(model.train(), torch.randn(2, 4, 6, 6))] == [True, False]
    assert_same_training(model, reference)


def residual_network():
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    stem = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return nn.Sequential(stem, BasicBlock(8, 8), BasicBlock(8, 16, 2, down), Bottleneck(16, 4))


def test_residual_blocks_whose_relu_is_used_again():
    model = residual_network()
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, (torch.randn(2, 4, 16, 16),))
    assert [(c.module, c.action.removeprefix("batch norm")) for c in report.changes] == [
        ("0.1", " + relu"),
        ("1.bn1", " + relu"),
        ("1.bn2", " + add + relu"),
        ("2.bn1", " + relu"),
        ("2.bn2", " + add + relu"),
        ("2.downsample.1", ""),
        ("3.bn1", " + relu"),
        ("3.bn2", " + relu"),
        ("3.bn3", " + add + relu"),
    ]
    assert isinstance(model[1], BasicBlock)
    assert type(model[1]) is type(model[2]) or model[2]._fused_rewrite != model[1]._fused_rewrite
    assert_same_training(model, reference, torch.randn(2, 4, 16, 16, dtype=torch.float64))


def test_blocks_whose_shortcut_is_an_empty_sequential():
    model = build("resnet8", classes=3, channels=4)
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    images = torch.randn(2, 4, 16, 16)
    actions = [change.action.removeprefix("batch norm") for change in report.changes]
    calls = [" + add" * call["residual"] + " + relu" * call["activation"] for call in operator_calls(model, images)]
    assert sorted(calls) == sorted(actions)
    assert_same_training(model, reference, images.double())


class Branches(nn.Module):
    """As RegNet's: the batch norm before the addition is the last layer of a branch."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
        self.inner = block(lambda self, y, x: y)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.inner(self.act(x + self.f(x))) + x)


def test_the_last_layer_of_a_branch_takes_the_steps_after_it():
    model = Branches()
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, torch.randn(2, 4, 6, 6))
    assert [(c.module, c.action) for c in report.changes] == [
        ("f.1.1", "batch norm + add + relu"),
        ("inner.bn", "batch norm + add + relu"),
    ]
    assert operator_calls(model, torch.randn(2, 4, 6, 6)) == [{"residual": True, "activation": True}] * 2
    assert_same_training(model, reference)
    model.f.eval()
    reference.f.eval()
    assert_same_training(model, reference)
    model.inner.bn.eval()
    reference.inner.bn.eval()
    assert_same_training(model, reference)
    seen = []
    for twin in (model, reference):
        twin.f.register_forward_hook(lambda m, i, y: seen.append(y.detach().clone()))
        twin.inner.bn.register_forward_hook(lambda m, i, y: seen.append(y.detach().clone()))
    assert_same_training(model, reference)
    torch.testing.assert_close(seen[:2], seen[2:])


class Crossing(Block):
    """Adds what another layer's activation gives, computed in between."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.act(self.other(self.conv(x)))
        return self.act(y + z)


def test_branches_and_activations_in_a_sequential():
    convolution = block(lambda self, y, x: y)  # as timm's ConvNorm: ends in its batch norm
    nested = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = nn.Sequential(convolution, nn.GELU(), nested, nn.Identity(), nn.ReLU(), nn.Conv2d(4, 4, 1))
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, torch.randn(2, 4, 6, 6))
    assert [change.action for change in report.changes] == ["batch norm + gelu", "batch norm + relu"]
    assert operator_calls(model, torch.randn(2, 4, 6, 6)) == [{"residual": False, "activation": True}] * 2
    assert_same_training(model, reference)


def test_activations_of_timms_own():
    activations = pytest.importorskip("timm.layers.activations")
    for module in (activations.GELU(), activations.GELUTanh(), activations.Swish(), activations.Mish()):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), module)
        reference = copy.deepcopy(model)
        _, report = leannorm.fuse(model)
        assert (report.changes[0].action == "batch norm") is isinstance(module, activations.Mish)
        assert_same_training(model, reference)


class Named(nn.Module):
    """Has children of names that a fused class might use."""

    def __init__(self):
        super().__init__()
        self.tail = nn.Conv2d(4, 4, 1)
        self.original = nn.BatchNorm2d(4)
        self.steps = self.rewrite = self.activation = nn.ReLU()

    def forward(self, steps, fused=None):
        return self.compute(self.steps(self.original(self.tail(steps)) + steps))

    def compute(self, x):
        return x * 2


def test_no_name_of_the_block_is_hidden():
    model = nn.Sequential(Named(), nn.Conv2d(4, 4, 1))
    reference = copy.deepcopy(model)
    leannorm.fuse(model, torch.randn(2, 4, 6, 6))
    assert len(operator_calls(model, torch.randn(2, 4, 6, 6))) == 1
    names = {name for cls in type(model[0]).__mro__[:2] for name in vars(cls) if not name.startswith("__")}
    assert {name for name in names if not name.startswith("_fused_")} <= {"forward"}
    assert_same_training(model, reference)


def test_a_residual_that_is_fused_itself():
    model = Crossing()
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, torch.randn(2, 4, 6, 6))
    assert [change.action for change in report.changes] == ["batch norm + add + silu", "batch norm + silu"]
    assert_same_training(model, reference)


def test_one_activation_in_several_places_of_a_sequential():
    act = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert [change.action for change in report.changes] == ["batch norm + relu"] * 2
    assert len(operator_calls(model, torch.randn(2, 4, 6, 6))) == 2
    assert_same_training(model, reference)


class Concatenating(nn.Module):
    """As DenseNet's layer: takes a tensor or a list."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        xs = [x] if isinstance(x, torch.Tensor) else x
        return F.relu(self.bn(torch.cat(xs, 1)))


def test_a_block_that_takes_a_tensor_or_a_list():
    model = Concatenating()
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert report.changes[0].action == "batch norm + relu"
    x = torch.randn(3, 4, 5, 5)
    for given in (x, list(x.split(2, 1))):
        torch.testing.assert_close(model(given), reference(given))
        assert operator_calls(model, given) == [{"residual": False, "activation": True}]


class Optional(Block):
    def forward(self, x, scale=None, *more, offset=None):
        y = F.relu(self.bn(self.conv(x)))
        if scale is not None:
            y = y * scale
        return y if offset is None else y - offset


def test_calls_that_the_trace_does_not_hold_for_compute_as_before():
    model = Optional()
    reference = copy.deepcopy(model)
    leannorm.fuse(model)
    x = torch.randn(3, 4, 5, 5)
    for args, kwargs in (((x,), {}), ((x, 2), {}), ((x,), {"offset": 1}), ((), {"x": x}), ((x, None, 3), {})):
        torch.testing.assert_close(model(*args, **kwargs), reference(*args, **kwargs))
    for args, kwargs in (((x,), {}), ((x, x), {}), ((), {"x": x}), ((x,), {"scale": x}), ((x, None), {})):
        torch.testing.assert_close(model(*args, **kwargs), reference(*args, **kwargs))
        assert len(operator_calls(model, *args, **kwargs)) == 1
        assert operator_calls(model, *args, **kwargs)[0]["activation"]
    assert model.forward.__doc__ == reference.forward.__doc__


class Dropping(Block):
    def forward(self, x):
        if self.training:
            x = x * 2
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


def test_the_mode_is_not_baked_in():
    model = Dropping()
    reference = copy.deepcopy(model)
    leannorm.fuse(model.eval())
    model.train()
    assert len(operator_calls(model, torch.randn(2, 4, 6, 6))) == 1
    assert_same_training(model, reference)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_a_residual_of_another_shape_or_dtype_is_added_apart():
    model = block(lambda self, y, x: F.relu(y + x.mean([2, 3], keepdim=True)))
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, torch.randn(2, 4, 6, 6))
    assert len(report.changes) == 1
    assert_same_training(model, reference)
    model.float(), reference.float()
    mixed = block(lambda self, y, x: F.relu(y + x.float()))
    leannorm.fuse(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(torch.randn(2, 4, 6, 6)).dtype == torch.float32


def test_timms_norm_act_layer_counts_as_fused_and_takes_a_residual_only_without_activation():
    norm_act = pytest.importorskip("timm.layers.norm_act")
    model = block(lambda self, y, x: F.relu(y + x))
    model.bn = norm_act.BatchNormAct2d(4)
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert report.changes[0].action == "batch norm + relu"
    assert_same_training(model, reference)
    model.bn = norm_act.BatchNormAct2d(4, apply_act=False)
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert report.changes[0].action == "batch norm + add + relu"
    assert_same_training(model, reference)
