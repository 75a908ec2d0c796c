"""Channels through one operation: where they are in its result, which of them meet, and which stay constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from leannorm.graph.capture import arguments, aten_name, module_name, operator_name, value_of
from leannorm.graph.channels import Vector, onwards, passes

if TYPE_CHECKING:
    from collections.abc import Mapping

_AVERAGES = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3}
_POINTWISE = {"relu6", "hardswish", "threshold"}  # the others say it of themselves


@dataclass(frozen=True)
class Channels:
    """The channels of a value, along dimension ``dim``: their numbers, and what they always are (NaN: various)."""

    dim: int
    members: Tensor
    constants: Tensor


@dataclass(frozen=True)
class Meeting:
    """Channels of several values become one: which are tied together, and which are constant no more."""

    result: Channels
    ties: tuple[tuple[Tensor, Tensor], ...]
    lost: Tensor


def called(node: Node) -> str:
    """A call in words: its operator, and the module that calls it."""
    if node.op == "placeholder":
        return node.name
    module = module_name(node)
    return operator_name(node) if module == node.name else f"{operator_name(node)} ({module})"


def is_pointwise(node: Node) -> bool:
    """Whether a call computes each element from those in the same place of its arguments, always alike."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return torch.Tag.pointwise in node.target.tags or aten_name(node).rstrip("_") in _POINTWISE


def pointwise(node: Node, followed: Mapping[Node, Channels]) -> Meeting | str | None:
    """Channels through an operation that computes each element from those in the same place; None for others."""
    value = value_of(node)
    if not is_pointwise(node) or value is None:
        return None
    aligned = {source: channels.dim + value.ndim - _rank(source) for source, channels in followed.items()}
    dims = set(aligned.values())
    if len(dims) > 1:
        return f"{called(node)} lays them over channels in another dimension"
    (dim,) = dims
    sizes = {source: _size(source, dim - value.ndim) for source in node.all_input_nodes}
    followed = {source: channels for source, channels in followed.items() if sizes[source] == value.shape[dim]}
    for source, size in sizes.items():
        if source not in followed and size != 1:
            return f"{called(node)} joins them with {called(source)}, whose channels cannot be removed"
    first, *others = followed.values()
    constants = _computed(node, followed)
    before = torch.stack([channels.constants for channels in followed.values()])
    lost = constants.isnan() & ~before.isnan().all(0)
    ties = tuple((first.members, other.members) for other in others)
    return Meeting(Channels(dim, first.members, constants), ties, first.members[lost])


def _computed(node: Node, followed: Mapping[Node, Channels]) -> Tensor:
    """The operation on constants; a product with 0 is 0, whatever the other factor."""
    before = [channels.constants for channels in followed.values()]
    unknown = torch.stack(before).isnan().any(0)
    value = value_of(node)
    if len(followed) < len(node.all_input_nodes) or value is None or not value.dtype.is_floating_point:
        constants = torch.full_like(before[0], math.nan)
    elif unknown.all():
        constants = before[0]
    else:
        args, kwargs = torch.fx.map_arg(
            (node.args, node.kwargs), lambda source: torch.nan_to_num(followed[source].constants)
        )
        assert callable(node.target)
        constants = node.target(*args, **kwargs).double()
    constants = constants.masked_fill(unknown, math.nan)
    if aten_name(node) in ("mul", "mul_"):
        constants = constants.masked_fill((torch.stack(before) == 0).any(0), 0.0)
    return constants


def bordered(node: Node, followed: Mapping[Node, Channels]) -> Channels | str | None:
    """Channels through an operation that may lay a border around each: only zeros stay constant; None for others."""
    name, bound = aten_name(node), arguments(node)
    if name in _AVERAGES:
        spatial, outside = _AVERAGES[name], 0
    elif name in ("pad", "constant_pad_nd") and bound.get("mode", "constant") == "constant":
        spatial, outside = len(bound["pad"]) // 2, bound["value"] or 0
    else:
        return None
    if name in _AVERAGES and passes(node) is not None:
        return None
    ((source, channels),) = followed.items()
    if channels.dim >= _rank(source) - spatial:
        return f"{called(node)} goes over their dimension"
    zero = (channels.constants == 0) & (outside == 0)
    return Channels(channels.dim, channels.members, torch.where(zero, 0.0, math.nan))


def moved(node: Node, followed: Mapping[Node, Channels], trusted: bool) -> Channels | str:
    """Channels through an operation that moves elements about, or pools within a channel."""
    source = passes(node)
    if source is None or source not in followed or len(followed) > 1:
        return f"{called(node)} reads them in a way that is not followed"
    channels = followed[source]
    # Numbers and constants ride as an affine map's scale, which must be positive for a maximum, and shift.
    through = onwards(node, Vector(channels.dim, channels.members.double() + 1, channels.constants))
    if through is None or node.target is torch.ops.aten.squeeze.default:
        return f"{called(node)} mixes or selects channels"
    if not trusted and _is_written_out(node, through.dim):
        return f"{called(node)} writes out how many there are"
    return Channels(through.dim, (through.scale - 1).long(), through.shift)


def _is_written_out(node: Node, dim: int) -> bool:
    """Whether a reshape names the size of a dimension of its result, rather than to compute it (-1)."""
    name, bound = aten_name(node), arguments(node)
    if name in ("view", "reshape", "_unsafe_view"):
        sizes: Any = node.args[1]
        return sizes[dim] != -1
    if name == "unflatten":
        begin, sizes = bound["dim"] % _rank(bound["self"]), bound["sizes"]
        return begin <= dim < begin + len(sizes) and sizes[dim - begin] != -1
    return False


def concatenated(node: Node, parts: Mapping[Node, Channels | None]) -> Channels | Meeting | str:
    """Channels of a concatenation: one after the other along their own dimension, together along others."""
    along = arguments(node)["dim"] % _rank(node)
    every = [parts[part] for part in arguments(node)["tensors"]]
    known = [channels for channels in every if channels is not None]
    dims = {channels.dim for channels in known}
    if len(known) < len(every) or len(dims) > 1:
        return f"{called(node)} joins them with values whose channels are not followed"
    if dims == {along}:
        members, constants = (torch.cat([getattr(c, field) for c in known]) for field in ("members", "constants"))
        return Channels(along, members, constants)
    first, *others = known
    constants = first.constants
    for other in others:
        constants = torch.where(constants == other.constants, constants, math.nan)
    ties = tuple((first.members, other.members) for other in others)
    return Meeting(Channels(first.dim, first.members, constants), ties, first.members[:0])


def _rank(node: Node) -> int:
    value = value_of(node)
    assert value is not None
    return value.ndim


def _size(node: Node, dim: int) -> Any:
    """Size of a value along a dimension counted from the end; 1 where it is broadcast, or no tensor."""
    value = value_of(node)
    return 1 if value is None or -dim > value.ndim else value.shape[dim]
