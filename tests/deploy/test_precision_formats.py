"""Values rounded to number formats, against numpy, ONNX's definition of quantisation and the file that is shipped."""

from __future__ import annotations

import math

import numpy as np
import onnx
import precision_networks as networks
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from leannorm.deploy.precision import formats
from leannorm.deploy.precision.layers import constant, layers_of
from leannorm.quantize.static import quantize_int8

FLOATS = arrays.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32))


@given(FLOATS)
def test_fp16_is_numpys(values):
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(formats.rounded(values, "fp16"), expected)
    assert (
        np.frombuffer(formats.stored(values, "fp16"), np.float16).astype(np.float32).tolist()
        == expected.ravel().tolist()
    )


@given(FLOATS)
def test_bf16_keeps_eight_bits_of_any_size(values):
    rounded = formats.rounded(values, "bf16")
    assert (np.abs(rounded - values) <= np.abs(values) * 2.0**-8 + 1e-38).all()
    assert ((rounded.view(np.uint32) & 0xFFFF) == 0).all()


def test_the_limits_are_those_of_ieee_and_of_truncated_fp32():
    assert formats.FLOATS["fp16"].largest == 65504
    assert formats.FLOATS["fp16"].smallest_normal == 2**-14
    assert formats.FLOATS["bf16"].largest == 2.0**127 * (2 - 2.0**-7)
    assert formats.FLOATS["bf16"].smallest_normal == 2.0**-126


@given(FLOATS, st.floats(-100, 100), st.floats(0, 100))
def test_activations_are_rounded_as_onnx_defines_it(values, low, width):
    scale, zero = formats.activation_scale(low, low + width)
    assume(np.abs(values).max() < 2.0**31 * scale)  # beyond that ONNX's reference overflows
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, 1, [3, 4]) for name in "xy")
    graph = helper.make_graph(
        nodes,
        "g",
        [x],
        [y],
        [numpy_helper.from_array(np.asarray(scale), "s"), numpy_helper.from_array(np.asarray(zero), "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": values})
    np.testing.assert_allclose(formats.rounded_activations(values, low, low + width), expected, rtol=1e-6, atol=0)


def test_weights_are_rounded_as_in_the_file_that_is_shipped(to_onnx, tmp_path):
    path = to_onnx(networks.network(), tmp_path / "fp32.onnx", networks.batches(1)[0])
    quantize_int8(path, tmp_path / "int8.onnx", networks.batches(1))
    fp32, int8 = onnx.load(path), onnx.load(tmp_path / "int8.onnx")
    shipped = layers_of(int8, any_type=True)
    assert len(shipped) == 4
    for layer, quantized in zip(layers_of(fp32), shipped, strict=True):
        (node,) = (node for node in int8.graph.node if node.input[0] == quantized.weight)
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        assert axis == layer.weight_axis
        scale = constant(int8, node.input[1])
        shape = [-1 if i == axis else 1 for i in range(layer.rank)]
        expected = constant(int8, quantized.weight).astype(np.float32) * scale.reshape(shape)
        got = formats.rounded_weights(constant(fp32, layer.weight), layer.weight_axis)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0)


def test_relative_error_is_in_the_2_norm_and_nan_where_it_cannot_be_told():
    x = np.asarray([3.0, 4.0], dtype=np.float32)
    assert formats.relative_error(x * np.float32(1.25), x) == pytest.approx(0.25, rel=1e-15)
    assert formats.relative_error(0 * x, 0 * x) == 0
    assert formats.relative_error(x, 0 * x) == math.inf
    assert math.isnan(formats.relative_error(x * np.inf, x))
    assert math.isnan(formats.relative_error(x * np.inf, x * np.inf))
