"""Sources of statistics: frozen values that turn a tensor's shape into the regions that feed mean and variance.

A region is a strided box: for the samples and for each spatial dimension a start, a span of possible starts, a count
and a step; it always holds all channels. The element at index i of the box along a dimension lies at

    start + draw % span + i * step

where ``draw`` is a random integer that the kernels read (no draw: the place is fixed, every span is 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Boxes = tuple[tuple[tuple[int, ...], float], ...]


class Regions(NamedTuple):
    """Weighted regions of an (N, C, *spatial) tensor; no region at all stands for the whole tensor.

    ``boxes`` is flat: for each region, for each of N and the spatial dimensions, (start, span, count, step).
    ``weights`` are the regions' shares of the statistics and add up to 1.
    """

    boxes: tuple[int, ...]
    weights: tuple[float, ...]
    draws: int
    inverse_count: float

    @property
    def unbiased(self) -> float:
        """The factor from the biased to the unbiased variance, 1 / (1 - sum_i w_i^2), w_i each element's weight.

        m / (m - 1) for one region of m elements. Regions that overlap count as independent.
        """
        return 1 / (1 - self.inverse_count)


class Statistics:
    """A source of statistics: which elements of a tensor tell a BN layer its mean and variance.

    ``between_steps`` says whether the moving variance adds the variance of the sampled mean between steps.
    """

    between_steps: bool = False

    @property
    def virtual(self) -> int:
        """How many virtual samples this source wants appended to the batch."""
        return 0

    def boxes(self, shape: Sequence[int], place: int, by_rows: bool = False) -> Boxes:
        """Give (box, weight) for each region of an (N, C, *spatial) shape; its last ``virtual`` samples are virtual."""
        raise NotImplementedError

    def regions(self, shape: Sequence[int], place: int = 0, by_rows: bool = False) -> Regions:
        """Give the regions of a tensor of this shape.

        Args:
            shape: (N, C, *spatial), with the virtual samples counted in N.
            place: a number that tells layers apart, so that each has fixed places of its own.
            by_rows: whether the tensor is contiguous, so that neighbours in a row of a map share cache lines.
        """
        if torch.compiler.is_compiling():  # shapes may be symbolic, which no cache can hold
            return _regions(self, shape, place, by_rows)
        return _cached_regions(self, tuple(shape), place, by_rows)

    def regions_of(self, x: Tensor, place: int = 0) -> Regions:
        """Give the regions of a tensor, by its shape and its memory order."""
        return self.regions(x.shape, place, by_rows=x.is_contiguous())

    def __add__(self, other: Statistics) -> WeightedSum:
        if not isinstance(other, Statistics):
            return NotImplemented
        sources = (*_summands(self), *_summands(other))
        return WeightedSum(sources)


def _regions(source: Statistics, shape: Sequence[int], place: int, by_rows: bool) -> Regions:
    if not isinstance(source, FullBatch):
        refuse_jit_trace(source)
    if 0 in shape:
        return Regions((), (), 0, 1.0)
    pairs = source.boxes(shape, place, by_rows)
    inverse_count = sum(weight * weight / _count(box) for box, weight in pairs)
    if len(pairs) == 1 and _count(pairs[0][0]) == math.prod(sampled_dimensions(shape)):
        return Regions((), (), 0, inverse_count)
    flat = tuple(number for box, _ in pairs for number in box)
    draws = len(flat) // 4 if any(span != 1 for span in flat[1::4]) else 0
    return Regions(flat, tuple(weight for _, weight in pairs), draws, inverse_count)


_cached_regions = lru_cache(maxsize=4096)(_regions)


def refuse_jit_trace(what: object) -> None:
    """Refuse `torch.jit.trace` for what Python code decides by an input's sizes, which a trace takes for tensors.

    Raises:
        TypeError: while tracing.
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise TypeError(
            f"torch.jit.trace cannot record {what} in training mode, where the input's shape decides what is computed: "
            "call model.eval() first, take torch.export or torch.compile, or leannorm.revert(model)"
        )


def sampled_dimensions(shape: Sequence[int]) -> tuple[int, ...]:
    """Give N and the spatial sizes of an (N, C, *spatial) shape."""
    return (shape[0], *shape[2:])


def _count(box: tuple[int, ...]) -> int:
    return math.prod(box[2::4])


def whole(sizes: Sequence[int]) -> tuple[int, ...]:
    """Give the box that takes all of these sizes."""
    return tuple(number for size in sizes for number in (0, 1, size, 1))


@dataclass(frozen=True)
class FullBatch(Statistics):
    """All elements: ordinary batch normalization."""

    def boxes(self, shape, place, by_rows=False):
        """Give one region: the whole tensor."""
        return ((whole(sampled_dimensions(shape)), 1.0),)

    def __str__(self) -> str:
        return "full"


DISTRIBUTIONS = ("normal", "uniform", "matched")


@dataclass(frozen=True)
class VirtualDataset(Statistics):
    """Random samples appended to the batch at the model's entry; only they feed the statistics (VDN).

    Args:
        samples: how many.
        distribution: of the virtual inputs: "normal" (mean 0, variance 1), "uniform" (the same mean and variance),
            "matched" (normal with the mean and variance of the batch, per channel).
        between_steps: as in the sampled sources.
    """

    samples: int = 1
    distribution: Literal["normal", "uniform", "matched"] = "normal"
    _: KW_ONLY
    between_steps: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 1:
            raise ValueError(f"VirtualDataset: samples must be a positive integer, got {self.samples!r}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"VirtualDataset: distribution must be one of {DISTRIBUTIONS}, got {self.distribution!r}")

    @property
    def virtual(self) -> int:
        """How many virtual samples this source wants appended to the batch."""
        return self.samples

    def boxes(self, shape, place, by_rows=False):
        """Give one region: the virtual samples, which are the last of the batch."""
        sizes = sampled_dimensions(shape)
        return (((sizes[0] - self.samples, 1, self.samples, 1, *whole(sizes[1:])), 1.0),)

    def __str__(self) -> str:
        options = [self.distribution] * (self.distribution != "normal") + ["between_steps"] * self.between_steps
        return f"vdn:{self.samples}" + ("@" + ",".join(options) if options else "")


@dataclass(frozen=True)
class WeightedSum(Statistics):
    """The regions of several sources together, by default weighted equally: the statistics of their mixture.

    mean = sum_r w_r mean_r,  var = sum_r w_r (var_r + (mean_r - mean)^2)

    Args:
        sources: two or more, at most one of them a VirtualDataset.
        weights: positive shares, scaled to add up to 1.
    """

    sources: tuple[Statistics, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sources) < 2 or not all(isinstance(source, Statistics) for source in self.sources):
            raise ValueError(f"WeightedSum needs two or more sources, got {self.sources!r}")
        if any(isinstance(source, WeightedSum) for source in self.sources):
            raise ValueError("WeightedSum takes plain sources; give all of them, with their weights, in one sum")
        if sum(source.virtual > 0 for source in self.sources) > 1:
            raise ValueError("WeightedSum takes one VirtualDataset at most; add up their samples instead")
        weights = tuple(self.weights) or (1.0,) * len(self.sources)
        if len(weights) != len(self.sources) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"WeightedSum needs one positive weight for each source, got {self.weights!r}")
        total = math.fsum(weights)
        object.__setattr__(self, "weights", tuple(weight / total for weight in weights))
        object.__setattr__(self, "between_steps", any(source.between_steps for source in self.sources))

    @property
    def virtual(self) -> int:
        """How many virtual samples this source wants appended to the batch."""
        return sum(source.virtual for source in self.sources)

    def boxes(self, shape, place, by_rows=False):
        """Give the regions of all sources; none but the virtual one sees the virtual samples."""
        real = (shape[0] - self.virtual, *shape[1:])
        return tuple(
            (box, weight * share)
            for source, weight in zip(self.sources, self.weights, strict=True)
            for box, share in source.boxes(shape if source.virtual else real, place, by_rows)
        )

    def __str__(self) -> str:
        if all(weight == self.weights[0] for weight in self.weights):
            return "+".join(map(str, self.sources))
        return "+".join(f"{weight!r}*{source}" for source, weight in zip(self.sources, self.weights, strict=True))


def _summands(source: Statistics) -> tuple[Statistics, ...]:
    if not isinstance(source, WeightedSum):
        return (source,)
    if any(weight != source.weights[0] for weight in source.weights):
        raise ValueError(f"cannot add to a sum with unequal weights, {source}; build one WeightedSum with all weights")
    return source.sources
