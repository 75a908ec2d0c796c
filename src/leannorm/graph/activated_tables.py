"""A table of a folded module, with the addition and the activation that follow it, as one call.

``act(scale x + shift + residual)`` per channel. The call is `leannorm.functional.scale_shift`: one native operator in
eager mode, PyTorch's own operators where the module is exported, compiled or traced. So programs, and files made from
them, hold no operator of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from leannorm.functional import scale_shift
from leannorm.graph.capture import Capture, arguments, aten_name, value_of

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Activated:
    """A table, and the addition of a residual, the activation, or both behind it."""

    table: Node
    addition: Node | None
    activation: Node | None

    @property
    def residual(self) -> Node | None:
        """The other operand of the addition."""
        if self.addition is None:
            return None
        return next((other for other in self.addition.args[:2] if other is not self.table), self.table)  # pyright: ignore


def fuse(module: GraphModule) -> None:
    """Make each table of a folded module one call with what follows it, where that computes the same; in place."""
    for node in list(module.graph.nodes):
        found = match(node)
        if found is not None and check(found) is None:
            rewrite(found)
    module.graph.lint()
    module.recompile()


def match(node: Node) -> Activated | None:
    """A multiply-add of held constants that an activation or an addition reads."""
    if node.target is not torch.ops.aten.addcmul.default or arguments(node)["value"] != 1:
        return None
    if not all(isinstance(constant, Node) and constant.op == "get_attr" for constant in node.args[:2]):
        return None
    for user in node.users:
        if _activation(user) is not None:
            return Activated(node, None, user)
        if user.target in _ADDITIONS and all(isinstance(operand, Node) for operand in user.args[:2]):
            follower = next(iter(user.users)) if len(user.users) == 1 else None
            return Activated(node, user, follower if follower and _activation(follower) else None)
    return None


def check(found: Activated) -> str | None:
    """Say why one call would not compute the same, or None."""
    table = found.table
    others = [user.name for user in table.users if user not in (found.addition, found.activation)]
    if others:
        return f"its result is read by {', '.join(others)} too"
    shift, scale, x = table.args[:3]
    assert isinstance(x, Node)
    value, result = value_of(x), value_of(table)
    if value is None or result is None:
        return "the shape of its input is not known"
    expected = (value.shape[1], *[1] * (value.ndim - 2)) if value.ndim > 1 else None
    for constant in (shift, scale):
        held = value_of(constant)  # pyright: ignore[reportArgumentType] - nodes, as `match` has seen
        if held is None or tuple(held.shape) != expected or held.dtype != value.dtype:
            return "its constants are not one value a channel in the dtype of its input"
    return None if found.addition is None else _objection(found, x)


def _objection(found: Activated, x: Node) -> str | None:
    """What stands against taking up the addition."""
    addition, residual = found.addition, found.residual
    assert addition is not None
    assert residual is not None
    if residual is found.table:
        return "it is added to itself"
    if arguments(addition)["alpha"] != 1:
        return f"the addition weighs its operand by {arguments(addition)['alpha']}"
    if addition.target is torch.ops.aten.add_.Tensor and addition.args[0] is residual:
        return f"the addition writes into {residual.name}"
    value, other = value_of(x), value_of(residual)
    assert value is not None
    if other is None or str(tuple(other.shape)) != str(tuple(value.shape)) or other.dtype != value.dtype:
        return f"what is added, {residual.name}, has another shape or dtype"
    writer = Capture.written_after(x, found.table)
    return None if writer is None else f"{writer.name} writes to its input in place"


def rewrite(found: Activated) -> None:
    """Replace the nodes by the call: where the table stands, or, with a residual, where the addition does."""
    table, last = found.table, found.activation or found.addition
    assert last is not None
    shift, scale, x = table.args[:3]
    kind, parameters = _activation(last) or ("", ())
    with table.graph.inserting_before(found.addition or table):
        call = table.graph.call_function(scale_shift, (x, scale, shift, found.residual, kind, parameters))
    call.meta = last.meta.copy()
    last.replace_all_uses_with(call)
    for node in (found.activation, found.addition, table):
        if node is not None:
            table.graph.erase_node(node)


def _activation(node: Node) -> tuple[str, tuple[float, ...]] | None:
    """The activation (`leannorm.activation`) that a node computes, in place or not; None for everything else."""
    bound = arguments(node)
    match aten_name(node).removesuffix("_"):
        case "relu" | "silu" | "hardswish" as kind:
            return kind, ()
        case "gelu":
            return ("gelu_tanh" if bound["approximate"] == "tanh" else "gelu"), ()
        case "leaky_relu" if bound["negative_slope"] > 0:
            return "leaky_relu", (bound["negative_slope"],)
        case "relu6":
            return "clamp", (0.0, 6.0)
        case "hardtanh":
            bounds = bound["min_val"], bound["max_val"]
        case "clamp":
            bounds = bound["min"], bound["max"]
        case _:
            return None
    numbers = all(isinstance(value, int | float) for value in bounds)
    return ("clamp", bounds) if numbers and bounds[0] < bounds[1] else None
