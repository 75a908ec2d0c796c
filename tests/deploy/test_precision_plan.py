"""Which format a layer gets, and the reason, on networks made to overflow, underflow and be hostile to eight bits."""

from __future__ import annotations

import onnx
import precision_networks as networks
import pytest
import torch
from torch import nn

from leannorm import plan_precision
from leannorm.deploy.precision import support
from leannorm.deploy.precision.formats import LADDER
from leannorm.records import PrecisionPlan, from_json, to_json

SIXTEEN = ("fp16", "fp32")


@pytest.fixture
def plan(to_onnx, tmp_path):
    def make(model, batches=None, **options):
        path = to_onnx(model, tmp_path / "fp32.onnx", networks.batches(1)[0])
        return plan_precision(path, networks.batches(4) if batches is None else batches, model=model, **options)

    return make


def rejected(layer, kind):
    (candidate,) = (candidate for candidate in layer.candidates if candidate.type == kind)
    return candidate.rejected


def outputs(model, position):
    with torch.no_grad():
        return torch.cat([model[: position + 1](batch) for batch in networks.batches(4)]).double()


def test_ranges_are_those_of_the_batch_norm_and_of_the_data(plan):
    model = networks.network()
    made = plan(model)
    assert [layer.layer for layer in made.layers] == ["1", "4", "7", "10"]
    for layer, position in zip(made.layers, (1, 4, 7), strict=False):
        gamma, beta = model[position].weight.double(), model[position].bias.double()
        low, high = beta - 6 * gamma.abs(), beta + 6 * gamma.abs()
        assert layer.predicted == pytest.approx((low.min().item(), high.max().item()), rel=1e-12)
        values = outputs(model, position)
        assert layer.measured == pytest.approx((values.min().item(), values.max().item()), rel=1e-4)
        assert layer.outside == 0
        assert layer.underflow == pytest.approx((values.abs() < 2**-14).double().mean().item(), abs=2e-4)
    assert made.layers[3].predicted is made.layers[3].outside is None
    assert made.outside == pytest.approx(1.973e-9, rel=1e-3)


def test_a_narrow_range_has_values_outside(plan):
    model = networks.network()
    layer = plan(model, k=1.0).layers[0]
    values, gamma, beta = outputs(model, 1), model[1].weight, model[1].bias
    scaled = (values - beta[:, None, None].double()).abs() / gamma[:, None, None].double().abs()
    assert layer.outside == pytest.approx((scaled > 1).double().mean().item(), abs=1e-3)
    assert 0.25 < layer.outside < 0.4


def test_without_the_model_nothing_is_predicted(to_onnx, tmp_path):
    path = to_onnx(networks.network(), tmp_path / "fp32.onnx", networks.batches(1)[0])
    assert {layer.predicted for layer in plan_precision(path, networks.batches(1)).layers} == {None}


def test_large_gamma_overflows_fp16(plan):
    layers = plan(networks.scaled(4, torch.full((8,), 1e5)), types=SIXTEEN).layers
    assert [layer.type for layer in layers] == ["fp16", "fp32", "fp32", "fp16"]
    assert rejected(layers[2], "fp16").startswith("overflow: its inputs reach")
    assert layers[1].overflow > 0.2
    assert rejected(layers[1], "fp16").startswith("overflow: its outputs reach")
    assert layers[1].reason == "every smaller format is rejected"


def test_an_overflow_that_calibration_does_not_see_is_predicted(plan):
    model = networks.scaled(4, torch.full((8,), 1.5e4))
    layer = plan(model, types=SIXTEEN, batches=[torch.zeros(2, 3, 8, 8)]).layers[1]
    assert max(map(abs, layer.measured)) < 65504 < max(map(abs, layer.predicted))
    assert layer.overflow == 0
    assert rejected(layer, "fp16").startswith("overflow: its batch normalization gives values up to")
    assert layer.type == "fp32"


def test_tiny_gamma_underflows_fp16(plan):
    layers = plan(networks.scaled(4, torch.full((8,), 1e-9)), types=SIXTEEN).layers
    assert [layer.type for layer in layers] == ["fp16", "fp32", "fp32", "fp16"]
    assert rejected(layers[2], "fp16").startswith("underflow: 100.00% of its non-zero inputs")
    assert layers[1].underflow == 1
    assert rejected(layers[1], "fp16").startswith("underflow: 100.00% of its non-zero outputs")


def test_tiny_weights_whose_outputs_do_not_need_them_do_no_harm(plan):
    model = networks.network()
    with torch.no_grad():
        model[4].weight *= 1e-9
        model[4].bias.fill_(1.0)
    layer = plan(model, types=SIXTEEN).layers[1]
    assert layer.weight_underflow == 1
    assert layer.type == "fp16"


def test_channels_of_unlike_size_are_hostile_to_eight_bits(plan):
    model = networks.scaled(4, networks.hostile())
    layers = plan(model, types=("int8", "fp32"), max_error=0.05).layers
    assert [layer.type for layer in layers] == ["int8", "fp32", "fp32", "int8"]
    assert rejected(layers[1], "int8").startswith("measured error: alone it changes the model's outputs by")
    # at the layer itself the large channel hides what the others lose
    assert layers[1].candidates[0].layer_error < 0.05 < layers[1].candidates[0].model_error


def test_the_error_of_fp16_is_that_of_its_definition(plan):
    model = networks.network()
    made = plan(model, types=SIXTEEN)
    x = torch.cat(networks.batches(4))[:16]

    def half(tensor):
        return tensor.half().double()

    scale = (model[4].weight / (model[4].running_var + model[4].eps).sqrt()).double()
    weight = (model[3].weight.double() * scale[:, None, None, None]).float()
    bias = (model[4].bias.double() - scale * model[4].running_mean.double()).float()
    with torch.no_grad():
        inputs = model[:3](x)
        exact = nn.functional.conv2d(inputs.double(), weight.double(), bias.double(), padding=1)
        got = half(nn.functional.conv2d(half(inputs), half(weight), half(bias), padding=1))
    expected = ((got - exact).norm() / exact.norm()).item()
    assert made.layers[1].candidates[0].layer_error == pytest.approx(expected, rel=0.02)
    assert made.layers[1].candidates[0].weight_error == pytest.approx(
        ((half(weight) - weight).norm() / weight.norm()).item(), rel=1e-3
    )


def test_left_alone_the_plan_takes_what_is_native_only(plan):
    made = plan(networks.network(), max_error=1.0)
    assert made.types == LADDER
    for layer in made.layers:
        assert support(layer.operator, layer.type).computed == layer.computed == "native"
        for kind in ("fp16", "bf16"):
            computed = support(layer.operator, kind).computed
            word = {"emulated": "emulated:", "unsupported": "not supported:", "native": None}[computed]
            assert rejected(layer, kind) is None if word is None else rejected(layer, kind).startswith(word)


def test_every_layer_has_the_smallest_format_that_nothing_speaks_against(plan):
    made = plan(networks.scaled(4, networks.hostile()), types=LADDER)
    for layer in made.layers:
        assert [candidate.type for candidate in layer.candidates] == list(LADDER)
        assert layer.type == next(c.type for c in layer.candidates if c.rejected is None)
    assert made.layers == plan(networks.scaled(4, networks.hostile()), types=reversed_ladder()).layers
    assert from_json(PrecisionPlan, to_json(made)) == made


def reversed_ladder():
    return list(reversed(LADDER))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": "fp16"}, "types must be some of int8, fp16, bf16, fp32 in a list or tuple, got 'fp16'"),
        ({"types": ["fp8"]}, r"types must be some of .* got \['fp8'\]"),
        ({"types": []}, r"types must be some of .* got \[\]"),
        ({"k": 0.0}, "k must be a positive number of standard deviations, got 0.0"),
        ({"k": float("inf")}, "k must be a positive number"),
        ({"max_error": -1.0}, "max_error must be a finite number >= 0, got -1.0"),
        ({"max_error": float("nan")}, "max_error must be a finite number >= 0, got nan"),
        ({"batches": []}, "a precision plan needs calibration batches, got none"),
        ({"batches": [torch.full((2, 3, 8, 8), float("nan"))]}, "gives NaN or infinity at"),
    ],
)
def test_bad_input_is_refused(plan, options, message):
    with pytest.raises(ValueError, match=message):
        plan(networks.network(), **options)


def test_files_without_layers_in_fp32_are_refused(to_onnx, tmp_path):
    path = to_onnx(nn.Sequential(nn.ReLU()), tmp_path / "fp32.onnx", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="holds no convolution or matrix product with fp32 weights"):
        plan_precision(path, [torch.zeros(2, 3)])


def test_files_with_two_inputs_are_refused(to_onnx, tmp_path):
    path = to_onnx(networks.network(), tmp_path / "fp32.onnx", networks.batches(1)[0])
    file = onnx.load(path)
    file.graph.input.append(onnx.helper.make_tensor_value_info("mask", 1, [1]))
    onnx.save(file, path)
    with pytest.raises(ValueError, match="files with one input, got images, mask"):
        plan_precision(path, networks.batches(1))
