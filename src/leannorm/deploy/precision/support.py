"""What the runtime really computes: one-layer models, and the graphs that onnxruntime makes of them."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue]

from leannorm.deploy.precision.formats import LADDER, stored
from leannorm.deploy.precision.layers import ONNX_TYPES, OPERATORS, layers_of, type_of
from leannorm.records import RuntimeSupport

PROVIDER = "CPUExecutionProvider"
RUNTIME = f"onnxruntime {onnxruntime.__version__}, {PROVIDER}"

_CHANNELS = 8
_CONVERSIONS = ("Cast", "DequantizeLinear", "QuantizeLinear")


@functools.cache
def support(operator: str, kind: str, *, rank: int = 4, opset: int = 20) -> RuntimeSupport:
    """Find out how onnxruntime computes a layer in a number format, by a model of one such layer.

    The model's optimised graph is read: a layer that multiplies weights of that type is native; one in front of which
    the runtime casts them to fp32, or leaves them to be dequantised, is emulated; a model that is refused is
    unsupported. The answer is kept for the process.

    Args:
        operator: "Conv", "ConvTranspose", "Gemm" or "MatMul".
        kind: "fp32", "fp16", "bf16" or "int8".
        rank: dimensions of a convolution's weight; matrix products have 2.
        opset: version of the operators.

    Raises:
        ValueError: if operator or number format is another.
    """
    if operator not in OPERATORS or kind not in LADDER:
        raise ValueError(
            f"operator and type must be one of {', '.join(OPERATORS)} and of {', '.join(LADDER)}, got {operator!r} "
            f"and {kind!r}"
        )
    try:
        graph = optimized(_one_layer(operator, kind, rank if operator.startswith("Conv") else 2, opset)).graph
    except (state.NotImplemented, state.InvalidGraph, state.Fail) as refused:
        reason = str(refused).partition(" : ")[2].partition(" : ")[2] or str(refused)
        return RuntimeSupport(operator, kind, "unsupported", f"refused: {reason.splitlines()[0]}")
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    steps = [node for node in graph.node if node.op_type not in _CONVERSIONS]
    # A bias, a scale and a zero point have no more elements than there are channels: what has is the weight.
    weights = {kinds[name] for node in steps for name in node.input if sizes.get(name, 0) > _CHANNELS}
    native = weights and weights <= ({TensorProto.INT8, TensorProto.UINT8} if kind == "int8" else {ONNX_TYPES[kind]})
    ran = ", ".join(dict.fromkeys(node.op_type for node in graph.node))
    return RuntimeSupport(operator, kind, "native" if native else "emulated", f"runs as {ran}")


def emulated_types(model: onnx.ModelProto) -> tuple[str, ...]:
    """Name the number formats of a file's layers that the runtime computes in fp32, the smallest first."""
    opset = opset_of(model)
    found = {
        kind
        for layer in layers_of(model, any_type=True)
        if support(layer.operator, kind := type_of(model, layer), rank=layer.rank, opset=opset).computed == "emulated"
    }
    return tuple(kind for kind in LADDER if kind in found)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model uses."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that onnxruntime runs for a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that such a file is for this machine only
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
        return onnx.load(path)


def _one_layer(operator: str, kind: str, rank: int, opset: int) -> onnx.ModelProto:
    """A layer with casts to its type and back, or with quantisation around it, as files by a plan have it."""
    weight = np.random.default_rng(0).standard_normal((_CHANNELS, _CHANNELS, *[3] * (rank - 2)), dtype=np.float32)
    shape = [2, _CHANNELS, *[8] * (rank - 2)]
    node = helper.make_node
    if kind == "int8":
        scale, zero = helper.make_tensor("s", 1, [], [0.05]), helper.make_tensor("z", TensorProto.UINT8, [], [128])
        scales = helper.make_tensor("ws", 1, [_CHANNELS], [0.05] * _CHANNELS)
        zeros = helper.make_tensor("wz", TensorProto.INT8, [_CHANNELS], [0] * _CHANNELS)
        whole = np.clip(np.rint(20 * weight), -127, 127).astype(np.int8)
        constants = [scale, zero, scales, zeros, numpy_helper.from_array(whole, "w")]
        nodes = [
            node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            node("DequantizeLinear", ["xq", "s", "z"], ["xl"]),
            node("DequantizeLinear", ["w", "ws", "wz"], ["wl"], axis=0 if operator == "Conv" else 1),
            node(operator, ["xl", "wl"], ["yl" if rank > 2 else "y"], name="layer"),
        ]
        if rank > 2:  # as `quantize_int8` leaves it: the results of matrix products stay float
            nodes += [
                node("QuantizeLinear", ["yl", "s", "z"], ["yq"]),
                node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
            ]
    elif kind == "fp32":
        constants, nodes = [numpy_helper.from_array(weight, "w")], [node(operator, ["x", "w"], ["y"], name="layer")]
    else:
        onnx_type = ONNX_TYPES[kind]
        constants = [helper.make_tensor("w", onnx_type, weight.shape, stored(weight, kind), raw=True)]
        nodes = [
            node("Cast", ["x"], ["xl"], to=onnx_type),
            node(operator, ["xl", "w"], ["yl"], name="layer"),
            node("Cast", ["yl"], ["y"], to=TensorProto.FLOAT),
        ]
    x, y = helper.make_tensor_value_info("x", 1, shape), helper.make_tensor_value_info("y", 1, None)
    graph = helper.make_graph(nodes, "layer", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
