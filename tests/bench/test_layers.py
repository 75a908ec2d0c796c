import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm import functional
from leannorm.bench import layers
from leannorm.bench.conditions import conditions
from leannorm.bench.gate import RedGate
from leannorm.bench.layers import OPERATIONS, Case
from leannorm.bench.plan import LayerPlan, listed, quickly
from leannorm.bench.shapes import batch_norm_shapes
from leannorm.train.models import build

PLAN = quickly(LayerPlan(statistics=("full", "grid:1/8"), dtypes=("fp32",), layouts=("channels_last",)))


def test_shapes_of_resnet50():
    shapes = batch_norm_shapes("torchvision:resnet50", 224)
    assert len(shapes) == 53
    assert shapes[0] == (64, 112, 112)
    assert set(shapes) == {
        (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 56, 56), (128, 28, 28), (512, 28, 28), (256, 28, 28),
        (256, 14, 14), (1024, 14, 14), (512, 14, 14), (512, 7, 7), (2048, 7, 7),
    }  # fmt: skip


def test_shapes_are_those_of_the_calls():
    model = build("torchvision:resnet18", classes=10, channels=3)
    seen = []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[1:])))
    model(torch.zeros(2, 3, 64, 64))
    assert batch_norm_shapes("torchvision:resnet18", 64) == tuple(seen)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_torchs_layer_and_ours_compute_the_operation(operation):
    case = Case(operation, (4, 6, 5, 3), "channels_last", "fp32", "cpu", 0)
    x, residual, _ = case.inputs()
    weight, bias = case.parameters().values()
    shape = (1, -1, 1, 1)
    mean, var = x.mean((0, 2, 3)).view(shape), x.var((0, 2, 3), correction=0).view(shape)
    expected = (x - mean) / (var + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)
    assert (residual is not None) == ("add" in operation)
    expected = expected if residual is None else expected + residual
    expected = expected.relu() if "relu" in operation else expected
    for layer in layers.sides(case, PLAN).values():
        if getattr(layer, "statistics", None) in (None, "full"):
            torch.testing.assert_close(layer(x) if residual is None else layer(x, residual), expected)


def test_sides_share_parameters_and_statistics_are_the_asked_ones():
    case = Case("bn+relu", (4, 6, 5, 3), "contiguous", "bf16", "cpu", 0)
    sides = layers.sides(case, PLAN)
    assert list(sides) == ["torch", "full", "grid:1/8"]
    assert str(sides["grid:1/8"].statistics) == "grid:1/8"
    for side in sides.values():
        for found, expected in zip(side.parameters(), case.parameters().values(), strict=True):
            assert torch.equal(found, expected)


def test_run_checks_and_times_every_side_of_every_case():
    benchmark = list(layers.run(PLAN, conditions(PLAN)))[-1]
    assert {case.operation for case in benchmark.cases} == set(OPERATIONS)
    assert {case.shape for case in benchmark.cases} == {(4, 64, 32, 32), (4, 64, 16, 16)}
    for case in benchmark.cases:
        assert [timing.side for timing in case.timings] == ["torch", "full", "grid:1/8", "copy"]
        assert all(len(timing.seconds) == PLAN.repeats for timing in case.timings)
        assert all(second > 0 for timing in case.timings for second in timing.seconds)
        tensors = {"y", "dx", "dweight", "dbias"} | ({"dresidual"} if "add" in case.operation else set())
        assert {(check.side, check.tensor) for check in case.checks} == {
            (side, tensor) for side in ("full", "grid:1/8") for tensor in tensors
        }


def test_random_places_are_checked_at_the_same_places():
    case = Case("bn+add+relu", (8, 6, 12, 12), "channels_last", "fp32", "cpu", 0)
    plan = quickly(LayerPlan(statistics=("grid:1/8@step",)))
    assert layers.gate.failures("", layers.check(case, plan)) == []


@pytest.mark.parametrize("wrong", ["y", "gradient", "nan"])
def test_a_wrong_side_stops_everything(monkeypatch, wrong):
    right = functional.batch_norm

    class ScaledGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * (1 + 1e-4)

    def batch_norm(*arguments, **options):
        y, mean, var = right(*arguments, **options)
        if str(options["statistics"]) != "full" and not options["statistics"].boxes:
            return y, mean, var
        match wrong:
            case "y":
                y = y * (1 + 1e-4)
            case "gradient":
                y = ScaledGradient.apply(y)
            case "nan":
                y = y * float("nan")
        return y, mean, var

    monkeypatch.setattr("leannorm.functional.batch_norm", batch_norm)
    monkeypatch.setattr(layers, "measure", lambda *_: pytest.fail("timed behind a red gate"))
    with pytest.raises(RedGate, match=r"bn \(4, 64, 32, 32\) channels_last fp32: grid:1/8: .* relative error") as red:
        list(layers.run(PLAN, conditions(PLAN)))
    assert "full:" not in str(red.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layouts": ("nchw",)}, "unknown layout 'nchw'; expected one of channels_last, contiguous"),
        ({"dtypes": ("fp8",)}, "unknown dtype 'fp8'"),
        ({"statistics": ("gird:1/8",)}, "'gird' is not a source"),
        ({"statistics": ("fs:1/32+vdn:1",)}, "virtual samples make the batch larger"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_plans_validate_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan(**options)


def test_lists_of_sources_keep_their_options():
    assert listed("full,grid:1/8@step,minimum=4, fs:1/32,full") == (
        "full",
        "grid:1/8@step,minimum=4",
        "fs:1/32",
        "full",
    )
    assert listed("resnet50,densenet121") == ("resnet50", "densenet121")


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match="cpu or cuda"):
        conditions(LayerPlan(device=device))


@pytest.mark.slow
def test_both_forms_under_torch_compile_are_sides():
    plan = LayerPlan(statistics=("grid:1/8",), operations=("bn+relu",), decomposed=True, quick=True, repeats=2)
    case = layers.Case("bn+relu", (2, 8, 6, 6), "channels_last", "fp32", "cpu", 0)
    forms = layers.sides(case, plan)
    assert [side for side in forms if getattr(forms[side], "decomposes", False)] == ["grid:1/8, decomposed"]
    assert {check.side for check in layers.check(case, plan)} == {"grid:1/8"}
    timings = layers.measure(case, plan)
    wanted = ["torch", "grid:1/8", "grid:1/8, compiled", "grid:1/8, decomposed", "copy"]
    assert [timing.side for timing in timings] == wanted
