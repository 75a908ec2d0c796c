"""Convolutions of one input whose results are added become one convolution, as do batch normalizations among them.

    W x + a + V x + b  =  (W + V) x + (a + b)

with the smaller kernel laid into the larger one, where both read the same places: ``padding - dilation begin`` of the
larger kernel is the padding of the smaller, which begins at ``begin`` in it. A batch normalization is the convolution
with a kernel of size 1 that is ``scale`` on its diagonal. So the branches of RepVGG and MobileOne merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from leannorm.graph import algebra
from leannorm.graph.absorption import Folding, Table
from leannorm.graph.affine import Affine
from leannorm.graph.capture import arguments, aten_name, mark_layer, value_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node


@dataclass(frozen=True)
class Branches:
    """The convolution with the larger kernel, what is added to it, and where that begins in the kernel."""

    node: Node
    kept: Affine
    merged: Affine | Table
    begin: tuple[int, ...]
    obstacle: str | None = None


def sum_of_kernels(
    weight: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None, begin: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution, in float64.

    Args:
        weight: ``(C, C_in / groups, *kernel)``.
        bias: ``(C,)``, or None for no bias.
        other: the smaller kernel, of the same channels.
        other_bias: like ``bias``.
        begin: where the smaller kernel begins in the larger one.
    """
    merged = weight.double() + algebra.embed(other, tuple(weight.shape[2:]), begin)
    offset = weight.new_zeros(weight.shape[0], dtype=torch.float64)
    for term in (bias, other_bias):
        offset = offset if term is None else offset + term.double()
    return merged, offset


def match(folding: Folding, node: Node) -> Branches | None:
    """An addition of two branches from one tensor: two convolutions, or one and a batch normalization."""
    bound = arguments(node)
    if aten_name(node) not in ("add", "add_") or bound.get("alpha", 1) != 1:
        return None
    pair = (bound["self"], bound["other"])
    if pair[0] is pair[1] or not all(isinstance(branch, torch.fx.Node) for branch in pair):
        return None
    targets = [folding.target(branch) for branch in pair]
    targets.sort(key=lambda target: -_size(folding, target))
    kept, merged = targets
    if not isinstance(kept, Affine) or merged is None or kept.inputs_first or _geometry(kept.node) is None:
        return None
    if merged.input is not kept.input:
        return None
    begin = _begin(folding, kept, merged)
    return None if begin is None else Branches(node, kept, merged, begin)


def check(folding: Folding, found: Branches) -> str | None:
    """Refuse where a branch has other users or shared weights, or shapes broadcast."""
    capture, kept, merged = folding.capture, found.kept, found.merged
    branches = (kept.node, merged.node)
    if any(len(branch.users) > 1 for branch in branches):
        return "a branch has other users"
    values = [value_of(node) for node in (found.node, *branches)]
    # In words, because sizes may be symbols.
    if len({None if value is None else f"{tuple(value.shape)} {value.dtype}" for value in values}) > 1:
        return "the branches have other shapes or dtypes than their sum"
    for branch in (kept, merged):
        reason = branch.refusal(capture, "before") if isinstance(branch, Affine) else None
        if reason is not None:
            return reason
    if capture.written_after(kept.input, min(branches)):
        return "its input is written to between the branches"
    return None


def rewrite(folding: Folding, node: Node, found: Branches) -> str:
    """Add the smaller kernel to the larger one and let its result stand for the sum."""
    kept, merged = found.kept, found.merged
    weight, bias = kept.values(folding.capture)
    if isinstance(merged, Table):
        ones = (1,) * len(found.begin)
        identity = algebra.identity_kernel(weight.shape[0], kept.groups, ones, (0,) * len(ones)).to(weight.device)
        other, other_bias = algebra.scale_outputs(identity, None, merged.scale, merged.shift, groups=kept.groups)
        del folding.tables[merged.node]
    else:
        other, other_bias = merged.values(folding.capture)
    total, offset = sum_of_kernels(weight, bias, other, other_bias, found.begin)
    kept.set_values(folding.capture, total.to(weight.dtype), offset.to(weight.dtype))
    mark_layer(kept.node, None)
    folding.capture.replace(node, kept.node)
    folding.capture.graph.erase_node(merged.node)
    done = "folded into" if isinstance(merged, Table) else "merged with"
    return f"{done} the parallel {kept.name} {kept.module}"


def _size(folding: Folding, target: Any) -> int:
    return target.values(folding.capture)[0][0, 0].numel() if _readable(folding, target) else 0


def _readable(folding: Folding, target: Any) -> bool:
    return isinstance(target, Affine) and folding.capture.constant(target.weight) is not None


def _geometry(node: Node) -> tuple[tuple[int, ...], ...] | None:
    """Stride, padding and dilation of a convolution with padding in numbers."""
    bound = arguments(node)
    if any(not isinstance(bound.get(name), list | tuple) for name in ("stride", "padding", "dilation")):
        return None
    return tuple(tuple(bound[name]) for name in ("stride", "padding", "dilation"))


def _begin(folding: Folding, kept: Affine, merged: Affine | Table) -> tuple[int, ...] | None:
    """Where in the larger kernel the smaller one begins, or None where they do not fit together."""
    if not _readable(folding, kept):
        return None
    geometry = _geometry(kept.node)
    assert geometry is not None
    weight, _ = kept.values(folding.capture)
    kernel, dims = tuple(weight.shape[2:]), weight.ndim - 2
    stride, padding, dilation = (_spread(values, dims) for values in geometry)
    if isinstance(merged, Table):
        if len(merged.scale) != weight.shape[0] or weight.shape[1] * kept.groups != weight.shape[0]:
            return None
        other_kernel, other_geometry = (1,) * dims, ((1,) * dims, (0,) * dims, dilation)
    else:
        if not _readable(folding, merged) or merged.inputs_first or merged.groups != kept.groups:
            return None
        other = merged.values(folding.capture)[0]
        found = _geometry(merged.node)
        if found is None or other.shape[:2] != weight.shape[:2] or other.ndim != weight.ndim:
            return None
        other_kernel, other_geometry = tuple(other.shape[2:]), tuple(_spread(values, dims) for values in found)
    begin = []
    for d in range(dims):
        gap = padding[d] - other_geometry[1][d]
        same_steps = other_kernel[d] == 1 or other_geometry[2][d] == dilation[d]
        if stride[d] != other_geometry[0][d] or not same_steps or gap % dilation[d]:
            return None
        begin.append(gap // dilation[d])
        if not 0 <= begin[d] <= kernel[d] - other_kernel[d]:
            return None
    return tuple(begin)


def _spread(values: tuple[int, ...], dims: int) -> tuple[int, ...]:
    return values * dims if len(values) == 1 else values
