"""What the probe says of the runtime, against what the runtime does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import precision_networks as networks
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from leannorm.deploy.precision import emulated_types, support
from leannorm.deploy.precision.formats import FLOATS, stored
from leannorm.deploy.precision.layers import layers_of
from leannorm.deploy.precision.mixed import write_mixed
from leannorm.deploy.precision.support import optimized
from leannorm.quantize.static import quantize_int8

VALUE = 1 + 2.0**-12  # fp16 and bf16 round it to 1


def run(operator, kind):
    """A layer of weight one and an input that the format cannot hold."""
    shape = [1, 1, 1, 1] if operator.startswith("Conv") else [1, 1]
    number = FLOATS[kind].onnx
    weight = helper.make_tensor("w", number, shape, stored(np.ones(shape, np.float32), kind), raw=True)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=number),
        helper.make_node(operator, ["a", "w"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.full(shape, VALUE, np.float32)})[0].item()


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_sixteen_bits_are_native_if_and_only_if_values_are_rounded(operator, kind):
    told = support(operator, kind)
    if told.computed == "unsupported":
        with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|INVALID_GRAPH"):
            run(operator, kind)
        assert "refused" in told.detail
    else:
        assert (run(operator, kind) == 1) == (told.computed == "native")
        assert (run(operator, kind) == np.float32(VALUE)) == (told.computed == "emulated")


def test_fp32_is_native():
    for operator in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        assert support(operator, "fp32").computed == "native"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 8, 3), (2, 8, 6, 6)),
        (nn.Conv1d(8, 8, 3), (2, 8, 6)),
        (nn.ConvTranspose2d(8, 8, 3), (2, 8, 6, 6)),
        (nn.Linear(8, 8), (2, 8)),
    ],
)
def test_int8_is_native_if_and_only_if_the_real_file_multiplies_integers(to_onnx, tmp_path, layer, shape):
    torch.manual_seed(0)
    path = to_onnx(nn.Sequential(layer), tmp_path / "fp32.onnx", torch.randn(shape))
    quantize_int8(path, tmp_path / "int8.onnx", [torch.randn(shape)])
    (found,) = layers_of(onnx.load(path))
    steps = {node.op_type for node in optimized(onnx.load(tmp_path / "int8.onnx")).graph.node}
    integers = any(step.startswith("QLinear") or step in ("QGemm", "MatMulIntegerToFloat") for step in steps)
    assert (support(found.operator, "int8", rank=found.rank).computed == "native") == integers
    assert emulated_types(onnx.load(tmp_path / "int8.onnx")) == (() if integers else ("int8",))


def test_a_file_tells_which_of_its_formats_are_emulated(to_onnx, tmp_path):
    path = to_onnx(networks.network(), tmp_path / "fp32.onnx", networks.batches(1)[0])
    assert emulated_types(onnx.load(path)) == ()
    file = onnx.load(path)
    kinds = dict(zip((layer.node for layer in layers_of(file)), ("fp16", "int8", "fp32", "fp16"), strict=True))
    types = {node.name: kinds.get(node.name, "fp32") for node in file.graph.node}
    write_mixed(path, tmp_path / "mixed.onnx", types, networks.batches(1))
    native = support("Conv", "fp16").computed == support("Gemm", "fp16").computed == "native"
    assert emulated_types(onnx.load(tmp_path / "mixed.onnx")) == (() if native else ("fp16",))


def test_a_file_that_no_plan_could_name_is_told_of_too(to_onnx, tmp_path):
    file = onnx.load(to_onnx(networks.network(), tmp_path / "fp32.onnx", networks.batches(1)[0]))
    for node in file.graph.node:
        node.name = ""
    assert emulated_types(file) == ()


def test_the_probe_asks_once():
    assert support("Conv", "fp16") is support("Conv", "fp16")


@pytest.mark.parametrize(("operator", "kind"), [("Relu", "fp16"), ("Conv", "fp8"), ("", "")])
def test_other_operators_and_formats_are_refused(operator, kind):
    with pytest.raises(ValueError, match=r"operator and type must be one of Conv, .* got"):
        support(operator, kind)
