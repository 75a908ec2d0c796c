"""The layers of a file, the range that batch normalization predicts, and the nodes that follow their layers' format."""

from __future__ import annotations

import math

import numpy as np
import onnx
import precision_networks as networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, parser
from torch import nn

from leannorm.deploy.precision.layers import batch_norms, layers_of, predicted_range, require_plannable, spread

MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4] x) => (float[N, 4] y)
<float[4, 4] a = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4, 4] b = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1},
 float[4] c = {1, 1, 1, 1}>
{
  [first] u = MatMul (x, a)
  [bias] v = Add (u, c)
  [relu] w = Relu (v)
  [soft] s = Softmax (w)
  [second] z = Gemm (s, b)
  [last] y = Relu (z)
}
"""


def model(text=MODEL):
    return parser.parse_model(text)


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=5),
    st.floats(0.5, 20),
)
def test_the_range_is_what_batch_norm_gives_k_deviations_from_its_mean(parameters, k):
    gamma, beta = (torch.tensor(column, dtype=torch.float64) for column in zip(*parameters, strict=True))
    norm = nn.BatchNorm1d(len(gamma), eps=0.0, dtype=torch.float64).eval()
    with torch.no_grad():
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
        norm.running_var.fill_(4.0)
        ends = torch.stack(
            [norm(torch.full((1, len(gamma)), side * 2 * k, dtype=torch.float64))[0] for side in (-1, 1)]
        )
    low, high = predicted_range(gamma.numpy(), beta.numpy(), k)
    np.testing.assert_allclose(low, ends.amin(0).numpy(), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(high, ends.amax(0).numpy(), rtol=1e-12, atol=1e-9)


def test_a_normal_value_lies_outside_as_often_as_stated():
    gamma, beta = np.asarray([2.0, -0.5]), np.asarray([1.0, 3.0])
    low, high = predicted_range(gamma, beta, 1.5)
    values = beta + gamma * np.random.default_rng(0).standard_normal((400_000, 2))
    outside = ((values < low) | (values > high)).mean(0)
    np.testing.assert_allclose(outside, math.erfc(1.5 / math.sqrt(2)), rtol=0.02)


def test_batch_norms_are_found_by_name_and_without_parameters_too():
    found = batch_norms(
        nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm1d(3, affine=False)), nn.GroupNorm(1, 2))
    )
    assert sorted(found) == ["0", "1.0"]
    assert [x.tolist() for x in found["1.0"]] == [[1, 1, 1], [0, 0, 0]]


def test_layers_have_the_names_of_the_model(to_onnx, tmp_path):
    path = to_onnx(networks.network(), tmp_path / "fp32.onnx", networks.batches(1)[0])
    layers = layers_of(onnx.load(path))
    assert [(layer.name, layer.operator, layer.out_channels) for layer in layers] == [
        ("1", "Conv", 8),
        ("4", "Conv", 8),
        ("7", "Conv", 8),
        ("10", "Gemm", 10),
    ]


def test_a_grouped_transposed_convolution_has_the_channels_of_its_groups(to_onnx, tmp_path):
    layer = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6))
    (found,) = layers_of(onnx.load(to_onnx(layer, tmp_path / "fp32.onnx", torch.zeros(2, 4, 3, 3))))
    assert (found.operator, found.out_channels, found.weight_axis) == ("ConvTranspose", 6, 1)


def test_products_of_two_activations_are_no_layers():
    text = MODEL.replace("MatMul (x, a)", "MatMul (x, x)")
    assert [layer.node for layer in layers_of(model(text))] == ["second"]


def test_nodes_without_names_are_refused():
    with pytest.raises(ValueError, match="nodes need names"):
        require_plannable(model(MODEL.replace("[last] ", "")))


def test_one_name_twice_is_refused():
    with pytest.raises(ValueError, match="nodes need names, each its own"):
        require_plannable(model(MODEL.replace("[last]", "[first]")))


def test_control_flow_is_refused():
    file = model()
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)]
    )
    file.graph.node.append(helper.make_node("If", ["c"], ["p"], name="if", then_branch=branch, else_branch=branch))
    with pytest.raises(ValueError, match=r"control flow \(If\)"):
        require_plannable(file)


def test_nodes_between_layers_of_one_format_follow_them():
    between = MODEL.replace("Softmax", "Clip")
    small = dict.fromkeys("uvwsz", 1.0)
    got = spread(model(between), {"first": "fp16", "second": "fp16"}, small)
    assert got == {"first": "fp16", "bias": "fp16", "relu": "fp16", "soft": "fp16", "second": "fp16", "last": "fp32"}
    mixed = spread(model(between), {"first": "fp16", "second": "int8"}, small)
    assert {name: kind for name, kind in mixed.items() if kind != "fp32"} == {"first": "fp16", "second": "int8"}


def test_an_exponential_stays_in_fp32():
    got = spread(model(), {"first": "fp16", "second": "fp16"}, dict.fromkeys("uvwsz", 1.0))
    assert got["soft"] == "fp32"


@pytest.mark.parametrize("large", [1e5, None])
def test_a_value_beyond_the_format_or_unknown_stays_in_fp32(large):
    known = dict.fromkeys("uvsz", 1.0) | ({} if large is None else {"w": large})
    got = spread(model(MODEL.replace("Softmax", "Clip")), {"first": "fp16", "second": "fp16"}, known)
    assert (got["bias"], got["relu"]) == ("fp16", "fp32")
