"""Batch normalization goes into what computes its input.

With ``scale`` and ``shift`` the affine map per channel that batch normalization is in eval mode,

    scale (W x + b) + shift  =  (scale W) x + (scale b + shift)

for a convolution or linear layer ``W x + b``, or another batch normalization (``W`` diagonal). Pooling by averages,
reshapes and their like hand the map on (`leannorm.graph.channels`), a concatenation splits it, an addition scales both
of its operands and shifts one: exact where all of them take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leannorm.graph.absorption import Folding, Plan, before
from leannorm.graph.capture import layer_of, mark_layer
from leannorm.graph.channels import Vector

if TYPE_CHECKING:
    from torch.fx import Node


def match(folding: Folding, node: Node) -> Plan:
    """The layers that give the input of the batch normalization."""
    table = folding.tables[node]
    return before(folding, table.input, node, Vector(1, table.scale, table.shift))


def check(folding: Folding, found: Plan) -> str | None:
    """Refuse where something else reads one of the layers or its weights, or channels are in another dimension."""
    return found.check(folding)


def rewrite(folding: Folding, node: Node, found: Plan) -> str:
    """Move the scale and the shift into the layers."""
    changed, source = found.apply(folding), folding.tables.pop(node).input
    mark_layer(source, layer_of(node))
    folding.capture.replace(node, source)
    return f"folded into {changed}"
