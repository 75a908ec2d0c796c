"""Files with a number format a node: where casts stand, what is stored, what is computed."""

from __future__ import annotations

import functools
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import precision_networks as networks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from leannorm.deploy.precision.formats import relative_error
from leannorm.deploy.precision.layers import layers_of, spread
from leannorm.deploy.precision.measure import Runner
from leannorm.deploy.precision.mixed import with_casts, write_mixed

IMAGES = networks.batches(1)[0].numpy()


@pytest.fixture(scope="module")
def fp32(to_onnx, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp32") / "model.fp32.onnx"
    return to_onnx(networks.network(), path, networks.batches(1)[0])


def types_of(file, *kinds):
    """Formats of all nodes, from those of the four layers."""
    values = {name: 1.0 for node in file.graph.node for name in node.output}
    return spread(file, dict(zip((layer.node for layer in layers_of(file)), kinds, strict=True)), values)


def run(model):
    return Runner(model, [model.graph.output[0].name])(IMAGES)[0]


def casts(model):
    return [node.input[0] for node in model.graph.node if node.op_type == "Cast"]


def test_all_of_one_format_is_cast_at_the_ends_alone(fp32):
    file = onnx.load(fp32)
    model = with_casts(file, types_of(file, *["fp16"] * 4))
    onnx.checker.check_model(model, full_check=True)
    assert casts(model) == ["images", "logits.fp16"]
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}


def test_a_value_is_cast_once_and_only_where_formats_meet(fp32):
    file = onnx.load(fp32)
    types = types_of(file, "fp32", "fp16", "fp16", "fp32")
    model = with_casts(file, types)
    onnx.checker.check_model(model, full_check=True)
    assert Counter(types.values())["fp16"] == 3  # two convolutions and what is between them
    assert len(casts(model)) == 2


def test_two_readers_of_one_format_share_a_cast():
    file = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] a = {1, 0, 0, 1}>
        { [one] u = MatMul (x, a)  [two] v = MatMul (x, a)  [sum] y = Add (u, v) }
        """
    )
    model = with_casts(file, {"one": "fp16", "two": "fp16", "sum": "fp32"})
    assert casts(model) == ["x", "u.fp16", "v.fp16"]
    assert [tensor.name for tensor in model.graph.initializer] == ["a.fp16"]
    onnx.checker.check_model(model, full_check=True)


def test_nothing_to_cast_changes_nothing(fp32):
    file = onnx.load(fp32)
    same = with_casts(file, types_of(file, *["fp32"] * 4))
    assert list(same.graph.node) == list(file.graph.node)
    assert list(same.graph.initializer) == list(file.graph.initializer)


def test_native_fp16_is_what_the_explicit_rounding_computes(fp32):
    # ONNX's own evaluator computes in 16 bits, where onnxruntime may not
    file = onnx.load(fp32)
    types = types_of(file, "fp16", "fp32", "fp16", "fp16")
    (native,) = ReferenceEvaluator(with_casts(file, types)).run(None, {"images": IMAGES})
    explicit, exact = run(with_casts(file, types, explicit=True)), run(file)
    assert 1e-4 < relative_error(explicit, exact) < 3e-3
    assert 1e-4 < relative_error(native, exact) < 3e-3
    assert relative_error(explicit, native) < 2e-3  # sums in 16 bits there, in 32 here


def test_bf16_stores_weights_that_numpy_reads_back(fp32):
    file = onnx.load(fp32)
    model = with_casts(file, types_of(file, "bf16", "fp32", "fp32", "bf16"))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for layer in (layers_of(file)[0], layers_of(file)[3]):
        weight = onnx.numpy_helper.to_array(next(t for t in file.graph.initializer if t.name == layer.weight))
        np.testing.assert_array_equal(
            stored[f"{layer.weight}.bf16"].astype(np.float32), weight.astype(ml_dtypes.bfloat16).astype(np.float32)
        )
    explicit = run(with_casts(file, types_of(file, "bf16", "fp32", "fp32", "bf16"), explicit=True))
    assert 1e-3 < relative_error(explicit, run(file)) < 2e-2


@functools.cache
def small_file(path):
    return onnx.load(path)


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["fp32", "fp16", "bf16"]), min_size=4, max_size=4))
def test_any_formats_give_a_valid_file_that_is_close(fp32, kinds):
    file = small_file(fp32)
    types = types_of(file, *kinds)
    model, explicit = with_casts(file, types), with_casts(file, types, explicit=True)
    if "bf16" not in kinds:  # ONNX has convolutions in bf16 from version 22 on, this file is of version 20
        onnx.checker.check_model(model, full_check=True)
        assert relative_error(run(model), run(file)) < 3e-3
    onnx.checker.check_model(explicit, full_check=True)
    assert relative_error(run(explicit), run(file)) < (3e-2 if "bf16" in kinds else 3e-3)
    # a cast to a format and one back at most for each stretch of layers that has it
    assert len(casts(model)) <= 2 * sum(kind != "fp32" for kind in kinds)
    for node in model.graph.node:
        if types.get(node.name, "fp32") != "fp32":
            assert all(name.endswith(types[node.name]) for name in node.output)


def test_int8_layers_are_quantised_and_the_others_are_not(fp32, tmp_path):
    file = onnx.load(fp32)
    write_mixed(fp32, tmp_path / "mixed.onnx", types_of(file, "int8", "fp16", "fp32", "int8"), networks.batches(2))
    model = onnx.load(tmp_path / "mixed.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    written = {layer.name: kinds[layer.weight] for layer in layers_of(model, any_type=True)}
    assert written == {
        "1": TensorProto.INT8,
        "4": TensorProto.FLOAT16,
        "7": TensorProto.FLOAT,
        "10": TensorProto.INT8,
    }
    assert {entry.key: entry.value for entry in model.metadata_props} == {"classes": "ten"}
    assert relative_error(run(model), run(file)) < 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["mixed.onnx"]


def test_int8_without_calibration_is_refused_and_leaves_nothing(fp32, tmp_path):
    with pytest.raises(ValueError, match="calibration batches, got none"):
        write_mixed(fp32, tmp_path / "mixed.onnx", types_of(onnx.load(fp32), *["int8"] * 4), [])
    assert list(tmp_path.iterdir()) == []
