"""What is left of normalization in an ONNX graph: its operators, and the pieces that a half-done fold leaves."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

NORMALIZATIONS = frozenset(
    {
        "BatchNormalization",
        "GroupNorm",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LpNormalization",
        "LRN",
        "MeanVarianceNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
    }
)
_AFFINE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_PIECES = frozenset({"Add", "Div", "Mul", "Sub"})
_ROOTS = frozenset({"Pow", "Reciprocal", "Sqrt"})
# These hand on the tensor that they are given, quantised or not.
_TRANSPARENT = frozenset({"Cast", "DequantizeLinear", "Identity", "QuantizeLinear"})


def normalization_nodes(model: onnx.ModelProto) -> tuple[str, ...]:
    """Name every node that normalises, or that is a piece of a normalization.

    Found are the normalization operators; ``Add``, ``Sub``, ``Mul`` and ``Div`` by a constant per channel that follow
    a convolution or matrix product, at any distance through each other and through quantisation; and ``Sqrt``,
    ``Reciprocal`` and ``Pow`` of constants. The first addition after a ``MatMul`` is its bias, since that operator
    has none.

    Returns:
        ``"operator name"`` of each, in the order of the graph; subgraphs included.
    """
    return tuple(f"{node.op_type} {node.name or node.output[0]}" for node in _find(model.graph))


def _find(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = {tensor.name for tensor in graph.initializer}
    # Per tensor that a matrix product gives (through pieces only): the axis of its channels from the right, and whether
    # it still may get a bias.
    products: dict[str, tuple[int, bool]] = {}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _find(attribute.g)
        given = [name for name in node.input if name]
        if all(name in constants for name in given):
            constants.update(node.output)
            if node.op_type == "Constant":
                shapes[node.output[0]] = _constant_shape(node)
            elif node.op_type in _TRANSPARENT:
                shapes[node.output[0]] = shapes.get(node.input[0])
            if node.op_type in _ROOTS:
                yield node
        elif node.op_type in NORMALIZATIONS:
            yield node
        elif node.op_type in _AFFINE:
            weight = shapes.get(node.input[1])
            convolution = node.op_type.startswith("Conv")
            products[node.output[0]] = (len(weight) - 1 if convolution and weight else 1, node.op_type == "MatMul")
        elif node.op_type in _TRANSPARENT and node.input[0] in products:
            products[node.output[0]] = products[node.input[0]]
        elif node.op_type in _PIECES:
            product = next((name for name in given if name in products), None)
            constant = next((name for name in given if name in constants), None)
            if product is None or constant is None:
                continue
            axis, takes_bias = products[product]
            if not _per_channel(shapes.get(constant), axis):
                continue
            products[node.output[0]] = (axis, False)
            if not (node.op_type == "Add" and takes_bias):
                yield node


def _per_channel(shape: tuple[int, ...] | None, axis: int) -> bool:
    """Whether a constant of this shape varies along the channels and nothing else; unknown shapes count as such."""
    if shape is None:
        return True
    varying = [len(shape) - i for i, size in enumerate(shape) if size != 1]
    return varying == [axis]


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or any(not dimension.HasField("dim_value") for dimension in tensor.shape.dim):
        return None
    return tuple(dimension.dim_value for dimension in tensor.shape.dim)


def _constant_shape(node: onnx.NodeProto) -> tuple[int, ...]:
    (attribute,) = node.attribute
    if attribute.name == "value":
        return tuple(attribute.t.dims)
    value = onnx.helper.get_attribute_value(attribute)
    return (len(value),) if isinstance(value, list) else ()
