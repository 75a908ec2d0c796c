"""Operations that an affine map per channel passes through unchanged, and where the channels are on the other side.

``f(scale x + shift) = scale f(x) + shift`` holds where ``f`` moves elements about, or replaces them by averages with
weights that sum to 1 over elements of one channel; for a maximum it holds where ``scale > 0``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from leannorm.graph.capture import arguments, aten_name, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.fx import Node

_IDENTITIES = {"alias", "clone", "contiguous", "detach", "to", "_to_copy"}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
_AVERAGES = {"avg_pool1d", "avg_pool2d", "avg_pool3d"}
_ADAPTIVE = {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"}
_MAXIMA = {"max_pool1d", "max_pool2d", "max_pool3d"}
_PADS = re.compile(r"(reflection|replication)_pad[123]d|pad")


@dataclass(frozen=True)
class Vector:
    """A scale and a shift, in float64, along dimension ``dim`` of a tensor."""

    dim: int
    scale: Tensor
    shift: Tensor


def passes(node: Node) -> Node | None:
    """The input of an operation that affine maps per channel may pass through, or None for other operations."""
    bound = arguments(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, torch.fx.Node):
        return None
    before, after = value_of(source), value_of(node)
    if before is None or after is None or before.dtype != after.dtype or before.device != after.device:
        return None
    name = aten_name(node)
    through = (
        name in _IDENTITIES | _RESHAPES | _ADAPTIVE | _MAXIMA | {"permute", "transpose", "slice"}
        or (name in _DROPOUTS and bound["train"] is False)
        or (name == "mean" and bound.get("dim"))
        or name.startswith("upsample_")
        or (name in _AVERAGES and _averages(bound))
        or (_PADS.fullmatch(name) and bound.get("mode", "reflect") != "constant")
    )
    return source if through else None


def onwards(node: Node, vector: Vector) -> Vector | None:
    """A vector along the input of an operation that `passes`, along its result; None where it cannot go through."""
    return _through(node, vector, node.args[0], node)


def backwards(node: Node, vector: Vector) -> Vector | None:
    """A vector along the result of an operation that `passes`, along its input; None where it cannot go through."""
    return _through(node, vector, node, node.args[0])


def _through(node: Node, vector: Vector, start: Any, end: Any) -> Vector | None:
    before, after = value_of(start), value_of(end)
    assert before is not None
    assert after is not None
    name, bound, dim = aten_name(node), arguments(node), vector.dim
    if name in _RESHAPES:
        return _covering(before.shape, after.shape, vector)
    moved: int | None = dim
    if name in ("permute", "transpose"):
        order = list(range(before.ndim))
        if name == "permute":
            order = [d % before.ndim for d in bound["dims"]]
        else:
            one, other = bound["dim0"] % before.ndim, bound["dim1"] % before.ndim
            order[one], order[other] = other, one
        moved = order.index(dim) if start is not node else order[dim]
    elif name == "mean":
        inner = before if start is not node else after
        gone = sorted(d % inner.ndim for d in bound["dim"])
        if bound["keepdim"]:
            moved = None if dim in gone else dim
        else:
            kept = [d for d in range(inner.ndim) if d not in gone]
            moved = kept[dim] if start is node else kept.index(dim) if dim in kept else None
    elif name == "slice":
        moved = None if bound["dim"] % before.ndim == dim else dim
    elif name not in _IDENTITIES | _DROPOUTS:
        spatial = len(bound["pad"]) // 2 if name == "pad" else int(re.findall(r"([123])d", name)[0])
        moved = dim if dim < before.ndim - spatial else None
        if name in _MAXIMA and not (vector.scale > 0).all():
            moved = None
    return None if moved is None else Vector(moved, vector.scale, vector.shift)


def _averages(bound: dict[str, Any]) -> bool:
    """Whether an average pool's weights sum to 1 at the border too."""
    padding = bound["padding"]
    padded = any(padding) if isinstance(padding, list | tuple) else padding
    return bound.get("divisor_override") is None and not (padded and bound["count_include_pad"])


def _covering(before: Sequence[Any], after: Sequence[Any], vector: Vector) -> Vector | None:
    """A vector along one dimension after a reshape; None where no dimension of the new shape covers the old one.

    In the flat order of elements dimension ``d`` counts steps of ``step = prod(shape[d + 1:])`` modulo ``step
    shape[d]``. A dimension of the new shape that counts smaller steps and wraps later covers it.
    """
    size, step = before[vector.dim], _product(before[vector.dim + 1 :])
    if not isinstance(size, int) or size < 2 or step is None:
        return None
    for dim, extent in enumerate(after):
        inner = _product(after[dim + 1 :])
        if inner is None or not isinstance(extent, int) or step % inner:
            continue
        if (inner * extent) % (step * size) == 0:
            repeats, tiles = step // inner, inner * extent // (step * size)
            scale, shift = (v.repeat_interleave(repeats).repeat(tiles) for v in (vector.scale, vector.shift))
            return Vector(dim, scale, shift)
    return None


def _product(sizes: Sequence[Any]) -> int | None:
    product = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        product *= size
    return product
