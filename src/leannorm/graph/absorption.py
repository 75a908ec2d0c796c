"""What takes up a scale and a shift per channel: searched backwards and forwards from a batch normalization.

The search changes nothing. It ends in a plan of steps, each for one convolution, linear layer or other batch
normalization, or in the obstacle that makes the whole plan wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from leannorm.graph import affine, algebra
from leannorm.graph.affine import Affine
from leannorm.graph.batch_norm import BatchNorm
from leannorm.graph.capture import Capture, arguments, aten_name, mark_layer, module_name, operator_name, value_of
from leannorm.graph.channels import Vector, backwards, onwards, passes

_ADDITIONS = {"add", "add_", "sub", "sub_"}


@dataclass
class Table:
    """A call of batch normalization in eval mode, seen as ``scale x + shift`` per channel, in float64."""

    norm: BatchNorm
    scale: Tensor
    shift: Tensor

    @property
    def node(self) -> Node:
        """The call."""
        return self.norm.node

    @property
    def input(self) -> Node:
        """What it reads now: rewrites replace that."""
        return arguments(self.norm.node)["input"]

    @property
    def name(self) -> str:
        """What it is, in words."""
        return "batch normalization"

    @property
    def module(self) -> str:
        """Qualified name of the module that calls it."""
        return self.norm.module


@dataclass
class Folding:
    """A captured graph and its batch normalizations that are still there, by their calls."""

    capture: Capture
    tables: dict[Node, Table]

    def target(self, node: Node) -> Affine | Table | None:
        """What a scale and a shift can be put into, or None where the node is something else."""
        return self.tables.get(node) or affine.read(node)


@dataclass(frozen=True)
class Step:
    """``scale`` and ``shift`` per channel, put into what ``node`` computes: at its results, or at its inputs."""

    node: Node
    at_inputs: bool
    scale: Tensor
    shift: Tensor

    def constants(self, folding: Folding) -> tuple[Tensor, Tensor]:
        """The target's new weight and bias in its weight's dtype; scale and shift in float64 for a table."""
        target = folding.target(self.node)
        combine = algebra.scale_inputs if self.at_inputs else algebra.scale_outputs
        if isinstance(target, Table):  # one depth-wise linear map per channel
            channels = len(target.scale)
            scale, shift = combine(target.scale[:, None], target.shift, self.scale, self.shift, groups=channels)
            return scale[:, 0], shift
        assert target is not None
        weight, bias = target.values(folding.capture)
        options: Any = {"groups": target.groups, "inputs_first": target.inputs_first}
        changed = combine(weight, bias, self.scale.to(weight.device), self.shift.to(weight.device), **options)
        return changed[0].to(weight.dtype), changed[1].to(weight.dtype)

    def apply(self, folding: Folding, weight: Tensor, bias: Tensor) -> None:
        """Give the target its new constants, those of `constants`."""
        target = folding.target(self.node)
        if isinstance(target, Table):
            target.scale, target.shift = weight, bias
        else:
            assert target is not None
            target.set_values(folding.capture, weight, bias)


@dataclass
class Plan:
    """Steps that together take up a batch normalization, or the obstacle that stands in their way.

    ``changed`` are the nodes whose values become others; `check` leaves the constants of the steps for `apply`.
    """

    steps: tuple[Step, ...] = ()
    obstacle: str | None = None
    changed: tuple[Node, ...] = ()
    constants: tuple[tuple[Tensor, Tensor], ...] = ()

    def check(self, folding: Folding) -> str | None:
        """The obstacle, or a step whose constants do not fit into their dtype."""
        if self.obstacle is not None:
            return self.obstacle
        self.constants = tuple(step.constants(folding) for step in self.steps)
        for step, constants in zip(self.steps, self.constants, strict=True):
            value = value_of(step.node)
            if isinstance(folding.target(step.node), Table) and value is not None:
                constants = tuple(constant.to(value.dtype) for constant in constants)  # as the table will hold them
            if not all(torch.isfinite(tensor.sum(dtype=torch.float64)) for tensor in constants):
                return f"the folded weights do not fit into {constants[0].dtype}"
        return None

    def apply(self, folding: Folding) -> str:
        """Take all steps of a plan that `check` passed; returns the names of what was changed."""
        targets = [folding.target(step.node) for step in self.steps]
        names = [f"the {target.name} {target.module}" for target in targets if target is not None]
        taken: set[Node] = set()
        for step, constants in zip(self.steps, self.constants, strict=True):
            step.apply(folding, *(step.constants(folding) if step.node in taken else constants))
            taken.add(step.node)
        for node in self.changed:
            mark_layer(node, None)
        return " and ".join(names)


def _together(plans: Iterable[Plan], through: Node | None = None) -> Plan:
    """All of these plans; ``through`` is the node where they meet, whose value changes too."""
    steps: tuple[Step, ...] = ()
    changed = () if through is None else (through,)
    for plan in plans:
        if plan.obstacle is not None:
            return plan
        steps += plan.steps
        changed += plan.changed
    return Plan(steps, changed=changed)


def before(folding: Folding, node: Node, reader: Node, vector: Vector) -> Plan:
    """What computes ``node`` takes up a scale and a shift at its results.

    Args:
        folding: the state.
        node: whose value becomes ``scale value + shift``.
        reader: the one call that shall read the new value.
        vector: scale and shift, along the dimension of ``node`` that they belong to.
    """
    target, source = folding.target(node), passes(node)
    parts = list(_parts(node, vector)) if target is None else []
    if target is None and source is None and not parts:
        return Plan(obstacle=f"it follows {operator_name(node)} ({module_name(node)}), which cannot absorb it")
    name = operator_name(node) if target is None else target.name
    others = ", ".join(sorted(user.name for user in node.users if user is not reader))
    if others:
        return Plan(obstacle=f"the {name} before it has other users: {others}")
    if target is not None:
        return _at_results(folding, node, target, vector)
    if source is not None:
        inner = backwards(node, vector)
        if inner is None:
            return Plan(obstacle=f"the {name} before it mixes channels with other dimensions")
        return _together([before(folding, source, node, inner)], through=node)
    if len({part for part, _ in parts}) < len(parts):
        return Plan(obstacle=f"the {name} before it reads one tensor twice")
    plan = _together((before(folding, part, node, inner) for part, inner in parts), through=node)
    if plan.obstacle is not None:
        return Plan(obstacle=f"it follows {name} ({module_name(node)}), where {plan.obstacle}")
    return plan


def _at_results(folding: Folding, node: Node, target: Affine | Table, vector: Vector) -> Plan:
    if isinstance(target, Affine):
        if reason := target.refusal(folding.capture, "before"):
            return Plan(obstacle=reason)
        if not target.is_channel(folding.capture, node, vector.dim):
            value = value_of(node)
            shape = None if value is None else tuple(value.shape)
            return Plan(
                obstacle=f"the {target.name} before it gives shape {shape}: dimension {vector.dim} is not its channels"
            )
    elif vector.dim != 1:
        return Plan(obstacle=f"the {target.name} before it has its channels in another dimension")
    return Plan((Step(node, False, vector.scale, vector.shift),), changed=(node,))


def _parts(node: Node, vector: Vector) -> Iterator[tuple[Node, Vector]]:
    """The inputs of a concatenation or an addition with what each of them takes of a vector at the result.

    ``scale (a + k b) + shift = (scale a + shift) + k (scale b)``.
    """
    name, bound, dim = aten_name(node), arguments(node), vector.dim
    if name == "cat" and all(value_of(part) is not None for part in bound["tensors"]):
        nodes: list[Node] = bound["tensors"]
        if bound["dim"] % _value(node).ndim != dim:
            yield from ((part, vector) for part in nodes)
            return
        sizes = [_value(part).shape[dim] for part in nodes]
        if all(isinstance(size, int) for size in sizes):
            pieces = zip(vector.scale.split(sizes), vector.shift.split(sizes), strict=True)
            yield from ((part, Vector(dim, *piece)) for part, piece in zip(nodes, pieces, strict=True))
    elif name in _ADDITIONS:
        pair = (bound["self"], bound["other"])
        whole = value_of(node)
        if whole is None or not all(isinstance(part, Node) and value_of(part) is not None for part in pair):
            return
        # A smaller operand is broadcast: fine as long as it has the channels.
        if any((v := _value(part)).ndim != whole.ndim or v.shape[dim] != whole.shape[dim] for part in pair):
            return
        yield pair[0], vector
        yield pair[1], Vector(dim, vector.scale, torch.zeros_like(vector.shift))


def after(folding: Folding, node: Node, vector: Vector) -> Plan:
    """All that reads ``node`` takes up a scale and a shift at its inputs.

    Args:
        folding: the state.
        node: whose value was ``scale value + shift`` and becomes ``value``.
        vector: scale and shift, along the dimension of ``node`` that they belong to.
    """
    return _together(_at_reader(folding, node, user, vector) for user in node.users)


def _at_reader(folding: Folding, node: Node, user: Node, vector: Vector) -> Plan:
    target = folding.target(user)
    if isinstance(target, Affine):
        return _at_inputs(folding, node, user, target, vector)
    if isinstance(target, Table):
        return Plan((Step(user, True, vector.scale, vector.shift),))
    name = operator_name(user)
    if user.op == "output":
        return Plan(obstacle="its result is an output of the model")
    if passes(user) is node:
        outer = onwards(user, vector)
        if outer is None:
            return Plan(obstacle=f"the {name} after it mixes channels with other dimensions")
        return _together([after(folding, user, outer)], through=user)
    bound = arguments(user)
    if aten_name(user) == "cat" and bound["dim"] % _value(node).ndim == vector.dim:
        sizes = [_value(part).shape[vector.dim] for part in bound["tensors"]]
        if all(isinstance(size, int) for size in sizes):
            ones, zeros = (vector.scale.new_full((sum(sizes),), value) for value in (1.0, 0.0))
            for i, part in enumerate(bound["tensors"]):
                if part is node:
                    begin = sum(sizes[:i])
                    ones[begin : begin + sizes[i]], zeros[begin : begin + sizes[i]] = vector.scale, vector.shift
            return _together([after(folding, user, Vector(vector.dim, ones, zeros))], through=user)
    return Plan(obstacle=f"{name} ({module_name(user)}) after it cannot absorb it")


def _at_inputs(folding: Folding, node: Node, user: Node, target: Affine, vector: Vector) -> Plan:
    if target.input is not node:
        return Plan(obstacle=f"the {target.name} after it reads it as a weight or bias")
    if reason := target.refusal(folding.capture, "after"):
        return Plan(obstacle=reason)
    if not target.is_channel(folding.capture, node, vector.dim):
        return Plan(obstacle=f"the {target.name} after it takes channels from another dimension")
    weight, _ = target.values(folding.capture)
    if (vector.shift != 0).any() and weight.ndim > 2:
        bound = arguments(user)
        spread = target.inputs_first and any(step != 1 for step in bound["stride"])
        if spread or (target.inputs_first and (math.prod(weight.shape[2:]) > 1 or any(bound["output_padding"]))):
            where = "between the positions" if spread else "at the borders"
            return Plan(obstacle=f"the shift would differ {where} of the {target.name} after it")
        padding = bound["padding"]
        if padding != "valid" and (isinstance(padding, str) or any(padding)):
            return Plan(obstacle=f"the zeros at the border of the {target.name} after it would get no shift")
    return Plan((Step(user, True, vector.scale, vector.shift),))


def _value(node: Node) -> Tensor:
    value = value_of(node)
    assert value is not None
    return value
