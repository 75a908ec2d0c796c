"""Nodes that compute ``W x + b`` with constant ``W`` and ``b``: convolutions of any kind and linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from leannorm.graph.capture import arguments, module_name, operator_name, set_arguments, value_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from leannorm.graph.capture import Capture

aten = torch.ops.aten

_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
}
_TRANSPOSES = {aten.t.default, aten.permute.default, aten.transpose.int, aten.numpy_T.default}


@dataclass(frozen=True)
class Affine:
    """A convolution or linear layer: the call, its input, and the inputs of the graph that hold its weight and bias.

    ``inputs_first`` says that the weight is stored (inputs, outputs / groups, ...), as transposed convolutions and
    bare matrix products have it; ``transposed`` is the node between the weight and the call where a decomposed linear
    layer transposes its weight.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    groups: int = 1
    inputs_first: bool = False
    transposed: Node | None = None

    @property
    def name(self) -> str:
        """What the graph calls it."""
        return operator_name(self.node)

    @property
    def module(self) -> str:
        """Qualified name of the module that calls it."""
        return module_name(self.node)

    def values(self, capture: Capture) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        weight = capture.constant(self.weight)
        assert weight is not None
        return weight, capture.constant(self.bias)

    def is_channel(self, capture: Capture, end: Node, dim: int) -> bool:
        """Whether ``dim`` of its input or result ``end`` counts channels (features of a linear layer)."""
        value, (weight, _) = value_of(end), self.values(capture)
        return value is not None and dim == value.ndim - weight.ndim + 1

    def refusal(self, capture: Capture, where: str) -> str | None:
        """Why its weight and bias must stay as they are, or None; ``where`` it is seen from: "before" or "after"."""
        for field, held in (("weight", self.weight), ("bias", self.bias)):
            if held is None:
                continue
            if capture.constant(held) is None:
                return f"the {field} of the {self.name} {where} it is not a constant that only the graph reads"
            readers = {
                *held.users,
                *(self.transposed.users if self.transposed and held is self.weight else ()),
            }
            others = readers - {self.node, self.transposed}
            if others:
                names = ", ".join(sorted(node.name for node in others))
                return f"the {self.name} {where} it shares its {field} with {names}"
        weight, bias = self.values(capture)
        outputs = weight.shape[1] * self.groups if self.inputs_first else weight.shape[0]
        if bias is not None and bias.shape != (outputs,):
            return f"the {self.name} {where} it adds shape {tuple(bias.shape)}, not one bias a channel"
        return None

    def set_values(self, capture: Capture, weight: Tensor, bias: Tensor) -> None:
        """Give the call another weight and bias; a bias is added where it had none and needs one."""
        capture.set_constant(self.weight, weight)
        if self.bias is not None:
            capture.set_constant(self.bias, bias)
            return
        if not bias.any():
            return
        owner, _, _ = capture.target(self.weight).rpartition(".")
        added = capture.add_parameter(f"{owner}.bias" if owner else "bias", bias, like=self.weight)
        if self.node.target is aten.mm.default:
            self.node.target, self.node.args = aten.addmm.default, (added, *self.node.args)
        else:
            set_arguments(self.node, bias=added)


def read(node: Node) -> Affine | None:
    """Read a convolution or a linear layer, whole or as a matrix product; None where the node is something else."""
    bound = arguments(node)
    if node.target in _CONVOLUTIONS:
        transposed = bound.get("transposed", "transpose" in operator_name(node))
        return Affine(node, bound["input"], bound["weight"], bound["bias"], bound["groups"], inputs_first=transposed)
    if node.target is aten.linear.default:
        return Affine(node, bound["input"], bound["weight"], bound["bias"])
    if node.target is aten.addmm.default:
        return (
            _product(node, bound["mat1"], bound["mat2"], bound["self"])
            if bound["alpha"] == bound["beta"] == 1
            else None
        )
    if node.target is aten.mm.default:
        return _product(node, bound["self"], bound["mat2"], None)
    return None


def _product(node: Node, left: Node, matrix: Node, bias: Node | None) -> Affine:
    if matrix.target in _TRANSPOSES and arguments(matrix).get("dims") != [0, 1]:
        source = matrix.args[0]
        assert isinstance(source, torch.fx.Node)
        return Affine(node, left, source, bias, transposed=matrix)
    return Affine(node, left, matrix, bias, inputs_first=True)
