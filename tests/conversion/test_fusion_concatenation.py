"""fuse: a concatenation before a batch norm is read from where its parts lie, and nothing else changes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_steps import assert_same_training, images, small_densenet

import leannorm
from leannorm.backends import cpu
from leannorm.bench.training import saved_bytes
from leannorm.nn.concatenation import Concatenation

needs_kernels = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
SOURCE = "grid:1/4"


class Block(nn.Module):
    """Two convolutions of the input, joined as a test says, then batch norm."""

    join = staticmethod(lambda self, one, other: self.bn(torch.cat([one, other], 1)))

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        self.more = nn.BatchNorm2d(12)

    def forward(self, x):
        return type(self).join(self, self.one(x), self.other(x))


def block(join) -> nn.Module:
    torch.manual_seed(0)
    return type("Block", (Block,), {"join": staticmethod(join), "__module__": __name__})()


@pytest.fixture
def joined(monkeypatch):
    """Collect the shapes of the concatenations that are not written."""
    found, right = [], Concatenation.compute

    def compute(self, *args):
        found.append(self.shape)
        return right(self, *args)

    monkeypatch.setattr(Concatenation, "compute", compute)
    return found


def fused(model, source=SOURCE, **options):
    model = model.to(memory_format=torch.channels_last)
    leannorm.convert(model, leannorm.parse_target(source))
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, **options)
    return model, reference, report


def _function(self, one, other):
    return self.act(self.bn(torch.concat((one, other), dim=1)))


def _keyword(self, one, other):
    return F.silu(self.bn(torch.concatenate(tensors=[other, one], dim=1)))


def _position(self, one, other):
    return self.bn(torch.cat([one, other], 1)) * 2


def _three(self, one, other):
    return F.relu(self.bn(torch.cat([one[:, :4].contiguous(memory_format=torch.channels_last), other, other], 1)))


@needs_kernels
@pytest.mark.parametrize("join", [_function, _position, _three])
@pytest.mark.parametrize("convolution", [False, True], ids=["", "convolution"])
def test_forms(joined, join, convolution):
    x = images(4, 3, 10, 10)
    model, reference, report = fused(block(join), example_inputs=x, convolution=convolution)
    assert next(c.action for c in report.changes if c.module == "bn").startswith("concatenation + batch norm")
    joined.clear()
    assert_same_training(model, reference, x)
    assert joined == [(4, 12, 10, 10)]
    assert_same_training(model.eval(), reference.eval(), x)
    assert len(joined) == 1


def _used_twice(self, one, other):
    both = torch.cat([one, other], 1)
    return self.act(self.bn(both)) + both


def _two_layers(self, one, other):
    both = torch.cat([one, other], 1)
    return self.bn(both) + self.more(both)


def _changed_in_between(self, one, other):
    y = self.bn(torch.cat([one, other], 1))
    one.mul_(2)
    return F.relu(y)


@pytest.mark.parametrize("join", [_keyword, _used_twice, _two_layers, _changed_in_between])
def test_forms_that_stay(joined, join):
    x = images(4, 3, 10, 10)
    model, reference, report = fused(block(join), example_inputs=x)
    assert not any("concatenation" in change.action for change in report.changes)
    assert_same_training(model, reference, x)
    assert joined == []


def test_along_another_dimension(joined):
    class Rows(Block):
        def __init__(self):
            super().__init__()
            self.other, self.bn = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)

    Rows.join = staticmethod(lambda self, one, other: F.relu(self.bn(torch.cat([one, other], 2))))
    x = images(4, 3, 10, 10)
    model, reference, report = fused(Rows(), example_inputs=x)
    assert next(c.action for c in report.changes if c.module == "bn") == "batch norm + relu"
    assert_same_training(model, reference, x)
    assert joined == []


@needs_kernels
def test_what_comes_later_computes_as_unfused(joined):
    x = images(4, 3, 10, 10)
    model, reference, _ = fused(block(_function))
    for twin in (model, reference):
        leannorm.convert(twin, leannorm.FullBatch())
    assert_same_training(model, reference, x)
    for twin in (model, reference):
        leannorm.convert(twin, leannorm.parse_target("gn:2"))
    assert_same_training(model, reference, x)
    assert joined == []
    for twin in (model, reference):
        leannorm.convert(twin, leannorm.parse_target(SOURCE))
    assert_same_training(model, reference, x)
    assert len(joined) == 1
    seen = []
    for twin in (model, reference):
        twin.bn.register_forward_hook(lambda m, given, y: seen.append(given[0].shape))
    assert_same_training(model, reference, x)
    assert seen == [(4, 12, 10, 10)] * 2
    assert len(joined) == 1


@needs_kernels
def test_inputs_that_the_kernels_do_not_take(joined):
    model, reference, _ = fused(block(_function))
    x = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    model.double(), reference.double()
    torch.testing.assert_close(model(x), reference(x))
    contiguous = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format)
    contiguous(torch.randn(4, 3, 10, 10))
    assert joined == []


@needs_kernels
@pytest.mark.parametrize("source", ["grid:1/8", "fs:1/4@step", "bs:1/2", "grid:1/4+vdn:1"])
def test_densenet(joined, source):
    x = images(4, 3, 64, 64)
    model, reference, report = fused(small_densenet(), source)
    actions = {change.module: change.action for change in report.changes}
    assert actions["features.denseblock1.denselayer2.norm1"] == "concatenation + batch norm + relu"
    assert actions["features.denseblock1.denselayer2.norm2"] == "convolution + batch norm + relu"
    assert actions["features.transition1.norm"] == "concatenation + batch norm + relu"
    assert_same_training(model, reference, x)
    assert [shape[1] for shape in joined] == [16, 24, 32, 40, 20, 28, 36]
    explained = {layer.module: layer for layer in leannorm.explain(model, x).layers}
    for name, action in actions.items():
        assert (explained[name].operator, "does not fit" in str(explained[name])) == (action, False)
    contiguous = leannorm.explain(model.to(memory_format=torch.contiguous_format), x.contiguous()).layers
    assert any(
        "computes concatenation + batch norm + relu in one operator, which this" in str(one) for one in contiguous
    )
    alone = leannorm.explain(model.eval(), x).layers
    assert not any("concatenation" in layer.operator for layer in alone)


@needs_kernels
def test_densenet_of_timm(joined):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made = timm.models.densenet.DenseNet(growth_rate=8, block_config=(3, 2), num_classes=5)
    x = images(4, 3, 64, 64)
    model, reference, report = fused(made)
    assert sum(change.action == "concatenation + batch norm + relu" for change in report.changes) == 7
    assert_same_training(model, reference, x)
    assert len(joined) == 7


def ends(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Conv2d(12, 3, 1))


class Half(Block):
    """A block with batch norm of its own whose output is a concatenation."""

    join = staticmethod(lambda self, one, other: torch.cat([self.act(self.bn(one)), other], 1))

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)


SEQUENCES = {
    "layer": lambda: ends(Half(), nn.BatchNorm2d(12)),
    "layer and activation": lambda: ends(Half(), nn.BatchNorm2d(12), nn.SiLU(inplace=True)),
    "in a Sequential": lambda: ends(Half(), nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout2d(0.5))),
    "in two": lambda: ends(Half(), nn.Sequential(nn.Sequential(nn.BatchNorm2d(12)), nn.Hardswish())),
}


@needs_kernels
@pytest.mark.parametrize("convolution", [False, True], ids=["", "convolution"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_block_hands_its_parts_to_the_layer_behind_it(joined, name, convolution):
    torch.manual_seed(0)
    x = images(4, 3, 10, 10)
    model, reference, report = fused(SEQUENCES[name](), example_inputs=x, convolution=convolution)
    joins = [change for change in report.changes if change.action.startswith("concatenation + batch norm")]
    assert len(joins) == 1
    joined.clear()
    assert_same_training(model, reference, x)
    assert joined == [(4, 12, 10, 10)]
    assert_same_training(pickle.loads(pickle.dumps(model)), copy.deepcopy(reference), x)
    assert len(joined) == 2
    assert_same_training(model.eval(), reference.eval(), x)
    assert isinstance(model[0](x), torch.Tensor)
    assert isinstance(model.train()[0](x), torch.Tensor)
    assert len(joined) == 2


def _watch_block(model, seen):
    model[0].register_forward_hook(lambda m, given, y: seen.append(y.shape))


def _watch_sequential(model, seen):
    model[1].register_forward_pre_hook(lambda m, given: seen.append(given[0].shape))


def _watch_layer(model, seen):
    model[1][0].register_forward_pre_hook(lambda m, given: seen.append(given[0].shape))


def _freeze(model, seen):
    model[1].eval()


def _freeze_layer(model, seen):
    model[1][0].eval()


def _freeze_block(model, seen):
    model[0].eval()


def _replace(model, seen):
    model[1] = nn.InstanceNorm2d(12)


def _exact(model, seen):
    leannorm.convert(model, leannorm.FullBatch())


def _insert(model, seen):
    model.insert(1, nn.Identity())


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [_watch_block, _watch_sequential, _watch_layer, _freeze, _freeze_layer, _freeze_block, _replace, _exact, _insert],
)
@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after"])
def test_what_hinders_a_block_s_parts_from_being_handed_on(joined, change, before):
    torch.manual_seed(0)
    x, seen = images(4, 3, 10, 10), []
    model = SEQUENCES["in a Sequential"]()
    if before:
        change(model, seen)
    model, reference, _ = fused(model)
    if change is _exact:
        leannorm.convert(reference, leannorm.FullBatch())
    if not before or change is _exact:
        for twin in (model, reference):
            change(twin, seen)
    assert_same_training(model, reference, x)
    assert joined == []
    assert set(seen) <= {(4, 12, 10, 10)}
    assert len(seen) == (2 if change.__name__.startswith("_watch") else 0)


def _changed_behind(self, one, other):
    both = torch.cat([self.act(self.bn(one)), other], 1)
    other.mul_(2)
    return both


def _rows(self, one, other):
    return torch.cat([self.act(self.bn(one)), torch.cat([other, other], 1)], 2)


@needs_kernels
@pytest.mark.parametrize("form", [_changed_behind, _rows])
def test_outputs_of_blocks_that_stay(joined, form):
    torch.manual_seed(0)
    x = images(4, 3, 10, 10)
    half = type("Other", (Half,), {"join": staticmethod(form), "__module__": __name__})()
    model, reference, _ = fused(nn.Sequential(half, nn.BatchNorm2d(8 if form is _rows else 12)))
    assert_same_training(model, reference, x)
    assert joined == []


@needs_kernels
def test_a_dense_network_keeps_less_for_backward():
    model, reference, _ = fused(small_densenet(16))
    ours, theirs = (saved_bytes(each, images(4, 3, 64, 64)) for each in (model, reference))
    assert ours < 0.75 * theirs


@needs_kernels
def test_tune_records_the_concatenation_for_compiled_calls(tmp_path):
    model, _, _ = fused(small_densenet())
    _, report = leannorm.tune(model, images(4, 3, 64, 64), plan=tmp_path / "plan.json")
    assert any(change.action.startswith("concatenation") for change in report.changes)
