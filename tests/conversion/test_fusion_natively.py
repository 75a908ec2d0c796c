"""fuse: unless told otherwise, native kernels compute depthwise and pointwise convolutions with their batch norm."""

import copy

import pytest
import torch
from test_fold_training import operators
from torch import nn
from training_steps import assert_same_training as assert_same
from training_steps import images

import leannorm
from leannorm.backends import cpu
from leannorm.backends.cpu import extension

needs_kernels = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
GRID = leannorm.GridSampling(1 / 4, minimum=4)


def assert_same_training(model, twin, x) -> None:
    assert_same(model, twin, x, rtol=1e-3, atol=5e-4)  # the gradient of the convolution's bias is rounding alone


def around(middle: nn.Module) -> nn.Module:
    """Put a convolution of 8 channels between two of 3x3, with batch norm after each."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        nn.Sequential(middle, nn.BatchNorm2d(8), nn.Hardswish(inplace=True)),
        nn.Conv2d(8, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
    )


class Block(nn.Module):
    """The same in a block with an addition."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.layers = around(middle)
        self.more, self.bn = copy.deepcopy(middle), nn.BatchNorm2d(8)
        self.first = nn.Conv2d(3, 8, 1, bias=False)

    def forward(self, x):
        return self.layers(x) + self.bn(self.more(y := self.first(x))).add_(y)[:, :4]


def depthwise(**options) -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1, groups=8, **options)


def pointwise(**options) -> nn.Module:
    return nn.Conv2d(8, 8, 1, **options)


def fused(model, source=GRID, **options):
    model = model.to(memory_format=torch.channels_last)
    leannorm.convert(model, source)
    reference = copy.deepcopy(model)
    _, report = leannorm.fuse(model, **options)
    return model, reference, report


def convolved(report) -> list[str]:
    return [change.module for change in report.changes if change.action.startswith("convolution + ")]


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2}], ids=str)
@pytest.mark.parametrize("kind", [depthwise, pointwise])
def test_such_a_convolution_and_no_other_is_computed_with_its_batch_norm(kind, options):
    x = images(4, 3, 12, 12)
    model, reference, report = fused(around(kind(**options)), example_inputs=x)
    assert convolved(report) == ["1.1"]
    assert report.refusals == ()
    assert operators(model, x) == (1, 2)
    assert_same_training(model, reference, x)
    assert_same_training(model.eval(), reference.eval(), x)


@needs_kernels
@pytest.mark.parametrize("kind", [depthwise, pointwise])
def test_in_a_block(kind):
    x = images(4, 3, 12, 12)
    model, reference, report = fused(Block(kind(bias=False)), example_inputs=x)
    assert sorted(convolved(report)) == ["bn", "layers.1.1"]
    assert operators(model, x) == (2, 2)
    assert_same_training(model, reference, x)
    explained = {layer.module: layer for layer in leannorm.explain(model, x).layers}
    assert explained["bn"].operator == "convolution + batch norm + add"
    assert explained["layers.0.1"].operator == "batch norm + clamp(0.0, 6.0)"


@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.Conv2d(8, 8, 3, padding=1),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
        lambda: nn.Conv2d(8, 8, 1, groups=4),
        lambda: nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
    ],
    ids=["dense", "grouped", "pointwise in groups", "a row"],
)
def test_others_are_left_to_whom_asks_for_them(middle):
    model, reference, report = fused(around(middle()))
    assert convolved(report) == []
    assert operators(model, images(4, 3, 12, 12)) == (0, 3)
    assert_same_training(model, reference, images(4, 3, 12, 12))
    _, report = leannorm.fuse(model, convolution=True)
    assert convolved(report) == ["0.1", "1.1", "3"]


def test_who_wants_none_gets_none():
    model, _, report = fused(around(depthwise()), convolution=False)
    assert convolved(report) == []
    assert operators(model, images(4, 3, 12, 12)) == (0, 3)


@needs_kernels
def test_calls_that_the_kernels_do_not_take_compute_one_after_the_other(monkeypatch):
    model, reference, _ = fused(around(depthwise()))
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert operators(copy.deepcopy(model).double(), x) == (0, 3)
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    assert operators(contiguous, torch.randn(4, 3, 12, 12)) == (0, 3)
    said = leannorm.explain(contiguous, torch.randn(4, 3, 12, 12)).layers[1]
    assert said.operator == "batch norm + hardswish"
    assert "convolution + batch norm + hardswish in one operator, which this call does not fit" in str(said)
    reflected, _, report = fused(around(depthwise(padding_mode="reflect")))
    assert convolved(report) == []
    assert operators(reflected, x.float()) == (0, 3)
    for twin in (model, reference):
        leannorm.convert(twin, leannorm.FullBatch())
    assert operators(model, x.float()) == (0, 3)
    assert_same_training(model, reference, x.float())
    for twin in (model, reference):
        leannorm.convert(twin, GRID)
    assert operators(model, x.float()) == (1, 2)
    monkeypatch.setattr(extension, "kernels", None)
    assert operators(model, x.float()) == (0, 3)


@needs_kernels
def test_pointwise_calls_that_do_not_pay_compute_one_after_the_other():
    wide = nn.Sequential(nn.Conv2d(256, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
    model, reference, report = fused(wide)
    assert convolved(report) == ["1"]
    large, small = images(2, 256, 10, 10), images(2, 256, 9, 9)
    assert (operators(model, large), operators(model, small)) == ((1, 0), (0, 1))  # 200 and 162 rows
    assert_same_training(model, reference, small)
    said = leannorm.explain(model, small).layers[0]
    assert "convolution + batch norm + relu in one operator, which this call does not fit" in str(said)
    padded, reference, _ = fused(around(pointwise(padding=1)))
    x = images(4, 3, 12, 12)
    assert operators(padded, x) == (0, 3)
    assert_same_training(padded, reference, x)


@needs_kernels
def test_who_watches_the_convolution_sees_it():
    x, seen = images(4, 3, 12, 12), []
    model, reference, _ = fused(around(depthwise()))
    for twin in (model, reference):
        twin[1][0].register_forward_hook(lambda m, given, y: seen.append(y.shape))
    assert_same_training(model, reference, x)
    assert seen == [(4, 8, 12, 12)] * 2


@needs_kernels
def test_revert_and_another_fuse_forget_it():
    model, _, _ = fused(around(depthwise()))
    leannorm.fuse(model, convolution=False)
    assert operators(model, images(4, 3, 12, 12)) == (0, 3)
    leannorm.fuse(model)
    assert operators(model, images(4, 3, 12, 12)) == (1, 2)
    leannorm.revert(model)
    assert operators(model, images(4, 3, 12, 12)) == (0, 0)


@needs_kernels
@pytest.mark.parametrize(("kind", "convolutions"), [(depthwise, 1), (pointwise, 0)])
def test_autocast(kind, convolutions):
    model, reference, _ = fused(around(kind()))
    x = images(4, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert operators(model, x) == (convolutions, 3 - convolutions)
        found, wanted = model(x), reference(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_see_its_convolutions():
    layers = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, track_running_stats=False), nn.SiLU()]
    model, reference, _ = fused(nn.Sequential(*layers))
    x = torch.stack([images(4, 8, 12, 12), images(4, 8, 12, 12) * 2])
    found = torch.func.vmap(model)(x)
    for one, given in zip(found, x, strict=True):
        torch.testing.assert_close(one, reference(given), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_compiler_keeps_its_convolutions():
    model, reference, _ = fused(around(depthwise()))
    x = images(4, 3, 12, 12)
    torch.testing.assert_close(torch.compile(model)(x), reference(x), rtol=1e-4, atol=1e-4)
