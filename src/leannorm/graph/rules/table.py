"""Batch normalization that nothing takes up becomes ``scale x + shift`` with precomputed constants per channel.

One multiply-add an element, in one operator (``addcmul``); in ONNX a ``Mul`` and an ``Add``. In a folded module it
becomes one call with what follows it (`leannorm.graph.activated_tables`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from leannorm.graph.capture import value_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from leannorm.graph.absorption import Folding, Table


def per_channel(constant: Tensor, ndim: int, dtype: torch.dtype) -> Tensor:
    """A constant ``(C,)`` as ``(C, 1, ...)``, to be multiplied by a tensor ``(N, C, ...)`` of ``ndim`` dimensions."""
    return constant.to(dtype).reshape(-1, *[1] * (ndim - 2))


def match(folding: Folding, node: Node) -> Table | None:
    """A batch normalization that is still there."""
    return folding.tables.get(node)


def check(folding: Folding, found: Table) -> str | None:
    """Refuse what overflows the dtype of its result."""
    value = value_of(found.input)
    if value is None:
        return "the shape of its input is not known"
    if not all(torch.isfinite(constant.to(value.dtype)).all() for constant in (found.scale, found.shift)):
        return f"its scale and shift do not fit into {value.dtype}"
    return None


def rewrite(folding: Folding, node: Node, found: Table) -> str:
    """Replace the call by the multiply-add."""
    capture, norm = folding.capture, found.norm
    value, like = value_of(found.input), norm.running_mean
    assert value is not None
    assert like is not None
    owner, _, _ = capture.target(like).rpartition(".")
    scale, shift = (
        capture.add_parameter(
            f"{owner}.{name}" if owner else name, per_channel(constant, value.ndim, value.dtype), like
        )
        for name, constant in (("scale", found.scale), ("shift", found.shift))
    )
    with capture.graph.inserting_before(node):
        # In this order the exporter to ONNX multiplies the constant, not the map, by addcmul's factor of 1.
        table = capture.graph.call_function(torch.ops.aten.addcmul.default, (shift, scale, found.input))
    table.meta = node.meta.copy()
    del folding.tables[node]
    capture.replace(node, table)
    return "replaced by a scale and a shift per channel"
