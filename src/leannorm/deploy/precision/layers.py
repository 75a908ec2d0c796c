"""The layers of an ONNX file that a number format is chosen for, the batch normalization behind them, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper
from torch import Tensor, nn

from leannorm.deploy.layers import LAYER
from leannorm.deploy.precision.formats import FLOATS, LADDER

OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

ONNX_TYPES = {
    "fp32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    **{kind: number.onnx for kind, number in FLOATS.items()},
}

# What may take the format of the layers around it; exponentials, roots, divisions and reductions stay in fp32.
FOLLOWERS = frozenset(
    {
        "Add",
        "AveragePool",
        "Clip",
        "Concat",
        "Flatten",
        "Identity",
        "LeakyRelu",
        "MaxPool",
        "Mul",
        "Relu",
        "Reshape",
        "Transpose",
    }
)


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with constant weights; ``name`` is that of the layer in the original model."""

    node: str
    name: str
    operator: str
    input: str
    weight: str
    output: str
    rank: int
    out_channels: int
    weight_axis: int
    """Dimension of the weight that belongs to the output's channels."""

    @property
    def channel_axis(self) -> int:
        """Dimension of the output that holds its channels."""
        return -1 if self.operator == "MatMul" else 1


def require_plannable(model: onnx.ModelProto) -> None:
    """Refuse a file that a plan cannot name or cannot follow.

    Raises:
        ValueError: if nodes have no names or one twice, or run graphs of their own (``If``, ``Loop``, ``Scan``), or the
            file has not one input.
    """
    graph = model.graph
    if len(graph.input) != 1:
        inputs = ", ".join(value.name for value in graph.input) or "none"
        raise ValueError(f"a precision plan takes files with one input, got {inputs}")
    names = [node.name for node in graph.node]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError("the file's nodes need names, each its own: a plan names them")
    inner = [
        n.op_type for n in graph.node for a in n.attribute if a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    ]
    if inner:
        raise ValueError(f"the file holds control flow ({inner[0]}), which a precision plan does not enter")


def layers_of(model: onnx.ModelProto, *, any_type: bool = False) -> tuple[Layer, ...]:
    """Find the layers of a file, in the order of its graph.

    Args:
        model: the file.
        any_type: take layers whose weights are 16-bit or dequantised too, not those in fp32 alone.
    """
    graph = model.graph
    weights = _weights(graph, any_type=any_type)
    found = []
    for node in graph.node:
        if node.op_type in OPERATORS and node.domain in ("", "ai.onnx") and node.input[1] in weights:
            weight = weights[node.input[1]]
            if node.op_type == "MatMul" and len(weight.dims) != 2:
                continue
            axis = _weight_axis(node)
            groups = _attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
            found.append(
                Layer(
                    node=node.name,
                    name=_layer_name(node, weight.name),
                    operator=node.op_type,
                    input=node.input[0],
                    weight=weight.name,
                    output=node.output[0],
                    rank=len(weight.dims),
                    out_channels=weight.dims[axis] * groups,
                    weight_axis=axis,
                )
            )
    return tuple(found)


def type_of(model: onnx.ModelProto, layer: Layer) -> str:
    """The number format of a layer's weights in a file."""
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == layer.weight)
    return next(kind for kind in LADDER if ONNX_TYPES[kind] == weight.data_type)


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    """The values of an initializer."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(tensor)


def batch_norms(model: nn.Module) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gamma and beta in float64 of each batch normalization of a model, by its qualified name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            ones = np.ones(module.num_features)
            gamma, beta = _values(module.weight, ones), _values(module.bias, 0 * ones)
            if gamma.shape == beta.shape == ones.shape:
                found[name] = (gamma, beta)
    return found


def predicted_range(gamma: np.ndarray, beta: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Give the range of a batch normalization's output per channel.

    .. math:: \beta - k |\gamma| \dots \beta + k |\gamma|

    Its input normalised has mean 0 and variance 1 where the running statistics are those of the data. A normal variable
    lies outside with probability :math:`\mathrm{erfc}(k / \sqrt 2)`: 2.0e-09 at k = 6.

    Returns:
        Lowest and highest values, (C,) in float64.
    """
    gamma, beta = np.asarray(gamma, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    return beta - k * np.abs(gamma), beta + k * np.abs(gamma)


def spread(model: onnx.ModelProto, types: Mapping[str, str], largest: Mapping[str, float]) -> dict[str, str]:
    """Give the nodes between layers of one format that format too, so that nothing is cast there.

    Args:
        model: the fp32 file.
        types: number format of each layer, by its node.
        largest: the largest magnitude measured of each value; what is too large for a format, or unknown, stays fp32.

    Returns:
        Number format of every node, by name.
    """
    nodes = list(model.graph.node)
    before: dict[str, set[str]] = {}
    after: dict[str, set[str]] = {value.name: {"fp32"} for value in model.graph.output}
    for node in nodes:
        sources = {types[node.name]} if node.name in types else _union(before, node.input)
        before |= dict.fromkeys(node.output, sources)
    for node in reversed(nodes):
        readers = {types[node.name]} if node.name in types else _union(after, node.output)
        for name in node.input:
            after[name] = after.get(name, set()) | readers
    spreading = {}
    for node in nodes:
        around = _union(before, node.input) | _union(after, node.output)
        kind = around.pop() if node.op_type in FOLLOWERS and len(around) == 1 else "fp32"
        limit = FLOATS[kind].largest if kind in FLOATS else np.inf
        fits = all(largest.get(name, np.inf) <= limit for name in node.output)
        spreading[node.name] = types.get(node.name, kind if fits else "fp32")
    return spreading


def _union(sets: Mapping[str, set[str]], names: object) -> set[str]:
    return set().union(*(sets.get(name, set()) for name in names))  # pyright: ignore[reportGeneralTypeIssues]


def _values(parameter: Tensor | None, default: np.ndarray) -> np.ndarray:
    return default if parameter is None else parameter.detach().double().cpu().numpy()


def _weights(graph: onnx.GraphProto, *, any_type: bool) -> dict[str, TensorProto]:
    """Constants that can be weights, by the names under which layers read them."""
    kinds = set(ONNX_TYPES.values()) if any_type else {TensorProto.FLOAT}
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type in kinds}
    dequantized = {
        node.output[0]: constants[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    return {**constants, **dequantized}


def _weight_axis(node: onnx.NodeProto) -> int:
    match node.op_type:
        case "Conv":
            return 0
        case "Gemm":
            return 0 if _attribute(node, "transB", 0) else 1
        case _:
            return 1


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _layer_name(node: onnx.NodeProto, weight: str) -> str:
    marked = next((entry.value for entry in node.metadata_props if entry.key == LAYER), None)
    return marked or weight.removesuffix(".weight")
