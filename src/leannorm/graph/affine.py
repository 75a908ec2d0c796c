"""Nodes that compute ``W x + b`` with constant ``W`` and ``b``: convolutions and linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from leannorm.graph.capture import arguments, operator_name, set_arguments

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
    aten.convolution.default,
}
_TRANSPOSES = {aten.t.default, aten.permute.default, aten.transpose.int, aten.numpy_T.default}


@dataclass(frozen=True)
class Affine:
    """A convolution or linear layer: the call, and the inputs of the graph that hold its weight and bias.

    ``transposed`` is the node between the weight and the call where a decomposed linear layer transposes
    its weight; ``output_dim`` is the dimension of the weight that counts output channels.
    """

    node: Node
    weight: Node
    bias: Node | None
    transposed: Node | None = None
    output_dim: int = 0

    @property
    def name(self) -> str:
        """What the graph calls it."""
        return operator_name(self.node)

    def values(self, capture: Capture) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        weight = capture.constant(self.weight)
        assert weight is not None
        return weight, capture.constant(self.bias)

    def refusal(self, capture: Capture) -> str | None:
        """Why its weight and bias must stay as they are, or None."""
        for field, held in (("weight", self.weight), ("bias", self.bias)):
            if held is None:
                continue
            if capture.constant(held) is None:
                return f"the {field} of the {self.name} before it is not a constant that only the graph reads"
            readers = {
                *held.users,
                *(self.transposed.users if self.transposed and held is self.weight else ()),
            }
            others = readers - {self.node, self.transposed}
            if others:
                names = ", ".join(sorted(node.name for node in others))
                return f"the {self.name} before it shares its {field} with {names}"
        weight, bias = self.values(capture)
        if bias is not None and bias.shape != (weight.shape[self.output_dim],):
            return f"the {self.name} before it adds shape {tuple(bias.shape)}, not one bias a channel"
        return None

    def set_values(self, capture: Capture, weight: Tensor, bias: Tensor) -> None:
        """Give the call another weight and bias; a bias is added where it had none."""
        capture.set_constant(self.weight, weight)
        if self.bias is not None:
            capture.set_constant(self.bias, bias)
            return
        owner, _, _ = capture.target(self.weight).rpartition(".")
        added = capture.add_parameter(f"{owner}.bias" if owner else "bias", bias, like=self.weight)
        if self.node.target is aten.mm.default:
            self.node.target, self.node.args = aten.addmm.default, (added, *self.node.args)
        else:
            set_arguments(self.node, bias=added)


def convolution(node: Node) -> Affine | None:
    """Read a convolution (1d, 2d, 3d; not transposed), or None where the node is something else."""
    bound = arguments(node)
    if node.target not in _CONVOLUTIONS or bound.get("transposed"):
        return None
    return Affine(node, bound["weight"], bound["bias"])


def linear(node: Node) -> Affine | None:
    """Read a linear layer, whole or as a matrix product, or None where the node is something else."""
    bound = arguments(node)
    if node.target is aten.linear.default:
        return Affine(node, bound["weight"], bound["bias"])
    if node.target is aten.addmm.default:
        return _product(node, bound["mat2"], bound["self"]) if bound["alpha"] == bound["beta"] == 1 else None
    if node.target is aten.mm.default:
        return _product(node, bound["mat2"], None)
    return None


def _product(node: Node, matrix: Node, bias: Node | None) -> Affine:
    if matrix.target in _TRANSPOSES:
        source = matrix.args[0]
        assert isinstance(source, torch.fx.Node)
        return Affine(node, source, bias, transposed=matrix)
    return Affine(node, matrix, bias, output_dim=1)
