"""fuse(convolution=True): the convolution is computed with its batch norm, and everything stays what it was."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_fusion import FORMS, Block, assert_same_training, block, residual_network, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

import leannorm
from leannorm import GridSampling, parse_statistics

GRID = GridSampling(1 / 4, minimum=4)
IMAGES = torch.randn(4, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def operators(model, *args):
    """Count the calls of leannorm's forward operators in a copy of the model."""

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = {"conv_batch_norm": 0, "batch_norm": 0}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func).removeprefix("leannorm.").removesuffix(".default")
            self.found[name] = self.found.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count() as count:
        copy.deepcopy(model)(*args)
    return count.found["conv_batch_norm"], count.found["batch_norm"]


def folded(model, source=GRID, **options):
    """Give a copy that is converted and folded, one that is converted alone, and the report."""
    reference, _ = leannorm.convert(model, source)
    model, report = leannorm.fuse(copy.deepcopy(reference), convolution=True, **options)
    return model, reference, report


@pytest.mark.parametrize(
    ("form", "words"),
    [pytest.param(form, words, id=f"{words}: {n}") for words, d in FORMS.items() for n, form in d.items()],
)
def test_every_form(form, words):
    model, reference, report = folded(block(form), example_inputs=torch.randn(2, 4, 6, 6))
    assert report.refusals == ()
    assert [(c.module, c.action) for c in report.changes] == [("bn", f"convolution + batch norm + {words}")]
    assert operators(model, torch.randn(2, 4, 6, 6)) == (1, 0)
    assert_same_training(model, reference)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


MODULES = {
    "1x1": (nn.Conv2d(4, 6, 1, bias=False), (4, 4, 7, 7)),
    "stride": (nn.Conv2d(4, 6, 3, 2, 1), (4, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (4, 4, 8, 8)),
    "same of an even kernel": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (4, 4, 8, 8)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (4, 4, 8, 8)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (4, 4, 8, 8)),
    "replicate": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 8, 8)),
    "circular, same": (nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"), (4, 4, 8, 8)),
    "depth-wise": (nn.Conv2d(4, 8, 5, padding=2, groups=4), (4, 4, 8, 8)),
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 4, 16)),
    "3d": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 5, 5)),
    "linear": (nn.Linear(4, 6), (32, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), (32, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("module", "shape"), MODULES.values(), ids=MODULES)
def test_every_module(module, shape, affine):
    layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer = layers[len(shape)](module.weight.shape[0], affine=affine)
    plain = nn.Sequential(nn.Identity(), copy.deepcopy(module), layer, nn.ReLU())
    model, reference, report = folded(plain)
    assert [(c.module, c.action) for c in report.changes] == [("2", "convolution + batch norm + relu")]
    assert operators(model, torch.randn(shape)) == (1, 0)
    assert_same_training(model, reference, torch.randn(shape, dtype=torch.float64))
    if module.bias is not None:
        model(torch.randn(shape, dtype=torch.float64)).sum().backward()
        assert not model[1].bias.grad.any()
        assert model[2].running_mean.any()


@pytest.mark.parametrize("spelling", ["grid:1/4@minimum=4", "fs:1/4@minimum=4", "ns:1/2", "fs:1/4@minimum=4+vdn:1"])
def test_a_residual_network(spelling):
    model, reference, report = folded(residual_network(), parse_statistics(spelling))
    assert len(report.changes) == 9
    assert all(change.action.startswith("convolution + batch norm") for change in report.changes)
    assert operators(model, IMAGES.float()) == (9, 0)
    assert_same_training(model, reference, IMAGES)


@pytest.mark.parametrize("spelling", ["bs:1/2", "grid:1/4@step,minimum=4"])
def test_places_that_are_drawn_are_those_of_the_fused_layer(spelling):
    model, reference, _ = folded(residual_network(), parse_statistics(spelling))
    leannorm.fuse(reference)
    assert_same_training(model, reference, IMAGES)


def test_statistics_that_come_later_and_go_again():
    model, report = leannorm.fuse(residual_network(), convolution=True)
    assert len(report.changes) == len(report.refusals) == 9
    assert all("stays apart: exact statistics need" in refusal.reason for refusal in report.refusals)
    assert operators(model, IMAGES.float()) == (0, 9)
    leannorm.convert(model, GRID)
    assert operators(model, IMAGES.float()) == (9, 0)
    assert_same_training(model, leannorm.convert(residual_network(), GRID)[0], IMAGES)
    leannorm.convert(model, leannorm.FullBatch())
    assert operators(model, IMAGES) == (0, 9)


def test_maps_that_are_sampled_whole_are_not_folded():
    model, reference, _ = folded(residual_network(), GridSampling(1 / 4))  # at least 64 elements
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    found = operators(model.double(), x)
    assert sum(found) == 9
    assert found[1] > 0
    assert_same_training(model, reference, x)


def test_eval_mode_and_frozen_layers_compute_as_before():
    model, reference, _ = folded(residual_network())
    for network in (model, reference):
        network.double()
        network(IMAGES)
    torch.testing.assert_close(model.eval()(IMAGES), reference.eval()(IMAGES))
    for network in (model, reference):
        leannorm.freeze(network.train())
    assert operators(model, IMAGES) == (0, 0)
    assert_same_training(model, reference, IMAGES)
    assert reference[0][0].bias is not None
    for network in (model, reference):
        leannorm.unfreeze(network)
    assert operators(model, IMAGES) == (9, 0)
    assert_same_training(model, reference, IMAGES)


def test_revert_restores_classes_attributes_and_outputs():
    plain = residual_network()
    model, _, _ = folded(copy.deepcopy(plain))
    leannorm.revert(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert {n: set(vars(m)) for n, m in model.named_modules()} == {n: set(vars(m)) for n, m in plain.named_modules()}
    torch.testing.assert_close(train_step(model, IMAGES.float()), train_step(plain, IMAGES.float()), rtol=0, atol=0)


def test_fusing_again_without_the_convolution_takes_it_out():
    model, _, first = folded(residual_network())
    assert leannorm.fuse(model, convolution=True)[1] == first
    leannorm.fuse(model, convolution=False)
    assert operators(model, IMAGES.float()) == (0, 9)
    assert not any("folds_convolution" in vars(module) for module in model.modules())


def test_copies_and_pickles():
    model, _, _ = folded(residual_network())
    assert list(model.state_dict()) == list(residual_network().state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert operators(twin, IMAGES.float()) == (9, 0)
        leannorm.revert(twin)
        assert type(twin[1]) is BasicBlock


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant):
    model, reference, _ = folded(residual_network(), GridSampling(1 / 4, "step", minimum=4))
    leannorm.fuse(reference)
    wrapped = copy.deepcopy(model.double())
    wrapped.forward = lambda x: checkpoint(lambda x: type(wrapped).forward(wrapped, x), x, use_reentrant=reentrant)
    torch.testing.assert_close(train_step(wrapped, IMAGES), train_step(reference.double(), IMAGES))


def test_gradients_add_up_over_batches():
    model, reference, _ = folded(residual_network())
    for network in (model.double(), reference.double()):
        for x in IMAGES.split(2):
            network(x).square().sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_first_steps_of_a_training_follow_the_unfused_layers():
    from leannorm.train.models import build

    torch.manual_seed(0)
    images, labels = torch.randn(8, 16, 3, 16, 16), torch.randint(10, (8, 16))
    losses = []
    for network in folded(build("resnet8", classes=10, channels=3), GridSampling(1 / 8))[:2]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        losses.append([])
        for x, y in zip(images, labels, strict=True):
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]  # rounding alone


@pytest.mark.parametrize("residual", [False, True])
def test_autocast(residual):
    model, reference, _ = folded(block(lambda self, y, x: F.relu(y + x.to(y.dtype)) if residual else F.relu(y)))
    x = torch.randn(4, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(x), reference(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        assert operators(model, x) == (1, 0)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert not model.conv.bias.grad.any()
    model.conv.bias.grad = reference.conv.bias.grad  # which is zero but for the rounding of bfloat16
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.05 * q.grad.abs().max().item() + 0.05)


@pytest.mark.parametrize("source", ["grid:1/4@minimum=4", "grid:1/4@step,minimum=4"])
def test_compiled_without_graph_breaks_and_without_recompilation(source):
    torch._dynamo.reset()
    model, reference, _ = folded(residual_network(), parse_statistics(source))
    leannorm.fuse(reference)
    compiled = torch.compile(model.double(), fullgraph=True, backend="aot_eager")
    reference.double()
    for seed in range(3):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found, expected = train_step(compiled, IMAGES, leaf=True), train_step(reference, IMAGES, leaf=True)
        if "step" not in source:
            torch.testing.assert_close(found[:2], expected[:2])
            torch.testing.assert_close(list(found[2].values()), list(expected[2].values()))


def test_parametrized_weights_are_read_through_the_attribute():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), nn.BatchNorm2d(8), nn.ReLU())
    model, reference, _ = folded(model)
    assert operators(model, IMAGES.float()) == (1, 0)
    assert_same_training(model, reference, IMAGES)


def test_a_convolution_that_several_layers_follow():
    class Shared(Block):
        def __init__(self):
            super().__init__()
            self.other = nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x))) + self.other(self.conv(F.relu(x)))

    model, reference, _ = folded(Shared())
    assert operators(model, torch.randn(3, 4, 5, 5)) == (2, 0)
    assert_same_training(model, reference)


def test_timms_norm_act_layer_keeps_its_activation():
    norm_act = pytest.importorskip("timm.layers.norm_act")
    model = block(lambda self, y, x: y * 2)
    model.bn = norm_act.BatchNormAct2d(4)
    model, reference, report = folded(model)
    assert [change.action for change in report.changes] == ["convolution + batch norm + relu"]
    assert operators(model, torch.randn(3, 4, 5, 5)) == (1, 0)
    assert_same_training(model, reference)
