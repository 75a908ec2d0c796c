"""Batch normalization goes into all that reads it.

With ``scale`` and ``shift`` the affine map per channel that batch normalization is in eval mode,

    W (scale x + shift) + b  =  (W scale) x + (W shift + b)

for a convolution without padding or a linear layer ``W x + b``, or another batch normalization. A convolution that pads
with zeros pads after the shift, so there the sum over its kernel would be wrong at the border: refused, unless there is
no shift. A concatenation hands the map on, with 1 and 0 for its other inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leannorm.graph.absorption import Folding, Plan, after
from leannorm.graph.channels import Vector

if TYPE_CHECKING:
    from torch.fx import Node


def match(folding: Folding, node: Node) -> Plan:
    """The layers that read the batch normalization."""
    table = folding.tables[node]
    written = folding.capture.written_after(table.input, node)
    if written is not None:
        return Plan(obstacle=f"{written} writes to its input")
    return after(folding, node, Vector(1, table.scale, table.shift))


def check(folding: Folding, found: Plan) -> str | None:
    """Refuse where a reader cannot take it, pads with zeros, or shares its weights."""
    return found.check(folding)


def rewrite(folding: Folding, node: Node, found: Plan) -> str:
    """Move the scale and the shift into the layers."""
    changed = found.apply(folding)
    folding.capture.replace(node, folding.tables.pop(node).input)
    return f"folded into {changed}"
