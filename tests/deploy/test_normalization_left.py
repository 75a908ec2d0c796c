"""The finder of normalization in ONNX graphs, on graphs that hold it and graphs that do not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from leannorm.deploy.normalization import normalization_nodes

C = 4


def graph(*nodes, rank=4, **constants):
    """A checked model over x and its constants; nodes are (operator, inputs, output)."""
    made = [helper.make_node(operator, inputs.split(), [output], name=output) for operator, inputs, output in nodes]
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in constants.items()]
    shape = ["batch", 3, 8, 8] if rank == 4 else ["batch", *[3] * (rank - 1)]
    model = helper.make_model(
        helper.make_graph(
            made,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, ["batch", *[None] * (rank - 1)])],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


CONV = ("Conv", "x w b", "conv")
WEIGHTS = {"w": (C, 3, 3, 3), "b": (C,)}

HELD = {
    "batch normalization": (
        graph(CONV, ("BatchNormalization", "conv b b b b", "bn"), **WEIGHTS),
        ("BatchNormalization bn",),
    ),
    "group and instance and layer normalization": (
        graph(
            CONV,
            ("InstanceNormalization", "conv b b", "in"),
            ("LayerNormalization", "in scale", "ln"),
            **WEIGHTS,
            scale=(6,),
        ),
        ("InstanceNormalization in", "LayerNormalization ln"),
    ),
    "all four pieces": (
        graph(
            CONV,
            ("Sub", "conv mean", "sub"),
            ("Div", "sub std", "div"),
            ("Mul", "gamma div", "mul"),
            ("Add", "mul beta", "add"),
            **WEIGHTS,
            mean=(C, 1, 1),
            std=(1, C, 1, 1),
            gamma=(C, 1, 1),
            beta=(C, 1, 1),
        ),
        ("Sub sub", "Div div", "Mul mul", "Add add"),
    ),
    "the scale alone after a transposed convolution": (
        graph(("ConvTranspose", "x w", "conv"), ("Mul", "conv gamma", "mul"), w=(3, C, 3, 3), gamma=(C, 1, 1)),
        ("Mul mul",),
    ),
    "a scale after a linear layer": (
        graph(("Gemm", "x w b", "fc"), ("Mul", "fc gamma", "mul"), rank=2, w=(3, C), b=(C,), gamma=(C,)),
        ("Mul mul",),
    ),
    "a shift after a linear layer that has its bias": (
        graph(("Gemm", "x w b", "fc"), ("Add", "fc beta", "add"), rank=2, w=(3, C), b=(C,), beta=(1, C)),
        ("Add add",),
    ),
    "a scale after a product and its bias": (
        graph(
            ("MatMul", "x w", "fc"),
            ("Add", "fc b", "bias"),
            ("Mul", "bias gamma", "mul"),
            ("Add", "mul b", "add"),
            rank=3,
            w=(3, C),
            b=(C,),
            gamma=(C,),
        ),
        ("Mul mul", "Add add"),
    ),
    "a root of constants, its result of unknown shape": (
        graph(
            CONV,
            ("Add", "var eps", "sum"),
            ("Sqrt", "sum", "std"),
            ("Div", "conv std", "div"),
            **WEIGHTS,
            var=(C, 1, 1),
            eps=(),
        ),
        ("Sqrt std", "Div div"),
    ),
    "a scale behind quantisation": (
        graph(
            CONV,
            ("QuantizeLinear", "conv s", "q"),
            ("DequantizeLinear", "q s", "dq"),
            ("Mul", "dq gamma", "mul"),
            **WEIGHTS,
            s=(),
            gamma=(C, 1, 1),
        ),
        ("Mul mul",),
    ),
    "a quantised scale": (
        graph(
            CONV,
            ("QuantizeLinear", "gamma s", "q"),
            ("DequantizeLinear", "q s", "dq"),
            ("Mul", "conv dq", "mul"),
            **WEIGHTS,
            s=(),
            gamma=(C, 1, 1),
        ),
        ("Mul mul",),
    ),
}

CLEAN = {
    "convolution and activation": graph(CONV, ("Relu", "conv", "relu"), **WEIGHTS),
    "a residual": graph(CONV, ("Conv", "x w", "skip"), ("Add", "conv skip", "add"), **WEIGHTS),
    "a scale by one number": graph(CONV, ("Mul", "conv half", "mul"), **WEIGHTS, half=()),
    "a map over positions": graph(CONV, ("Add", "conv map", "add"), **WEIGHTS, map=(1, 1, 6, 6)),
    "a column": graph(CONV, ("Mul", "conv column", "mul"), **WEIGHTS, column=(6,)),
    "input preprocessing": graph(("Sub", "x mean", "sub"), ("Conv", "sub w", "conv"), w=(C, 3, 3, 3), mean=(3, 1, 1)),
    "a scale behind the activation": graph(
        CONV, ("Relu", "conv", "relu"), ("Mul", "relu gamma", "mul"), **WEIGHTS, gamma=(C, 1, 1)
    ),
    "a product with its bias": graph(("MatMul", "x w", "fc"), ("Add", "fc b", "add"), rank=3, w=(3, C), b=(C,)),
    "a root of the data": graph(CONV, ("Sqrt", "conv", "sqrt"), **WEIGHTS),
    "squeeze and excitation": graph(
        CONV, ("GlobalAveragePool", "conv", "pool"), ("Sigmoid", "pool", "gate"), ("Mul", "conv gate", "mul"), **WEIGHTS
    ),
}


@pytest.mark.parametrize("case", HELD)
def test_what_is_held_is_named(case):
    model, expected = HELD[case]
    assert normalization_nodes(model) == expected


@pytest.mark.parametrize("case", CLEAN)
def test_what_is_clean_is_not(case):
    assert normalization_nodes(CLEAN[case]) == ()


def test_branches_are_searched():
    def branch(name):
        return helper.make_graph(
            [helper.make_node("LpNormalization", ["x"], [name], name=name)],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    model = helper.make_model(
        helper.make_graph(
            [node],
            "graph",
            [
                helper.make_tensor_value_info("c", TensorProto.BOOL, []),
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        )
    )
    assert sorted(normalization_nodes(model)) == ["LpNormalization a", "LpNormalization b"]


def test_constants_given_by_nodes_are_seen():
    gamma = helper.make_node(
        "Constant", [], ["gamma"], value=numpy_helper.from_array(np.ones((C, 1, 1), np.float32), "gamma")
    )
    model = graph(CONV, ("Relu", "conv", "mul"), **WEIGHTS)
    del model.graph.node[1]
    model.graph.node.insert(0, gamma)
    model.graph.node.append(helper.make_node("Mul", ["conv", "gamma"], ["mul"], name="mul"))
    assert normalization_nodes(model) == ("Mul mul",)
