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
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

import torch


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

    def boxes(self, shape: Sequence[int], place: int) -> tuple[tuple[tuple[int, ...], float], ...]:
        """Give (box, weight) for each region of an (N, C, *spatial) shape; its last ``virtual`` samples are virtual."""
        raise NotImplementedError

    def regions(self, shape: Sequence[int], place: int = 0) -> Regions:
        """Give the regions of a tensor of this shape.

        Args:
            shape: (N, C, *spatial), with the virtual samples counted in N.
            place: a number that tells layers apart, so that each has fixed places of its own.
        """
        if torch.compiler.is_compiling():  # shapes may be symbolic, which no cache can hold
            return _regions(self, shape, place)
        return _cached_regions(self, tuple(shape), place)

    def __add__(self, other: Statistics) -> WeightedSum:
        if not isinstance(other, Statistics):
            return NotImplemented
        sources = (*_summands(self), *_summands(other))
        return WeightedSum(sources)


def _regions(source: Statistics, shape: Sequence[int], place: int) -> Regions:
    if 0 in shape:
        return Regions((), (), 0, 1.0)
    pairs = source.boxes(shape, place)
    inverse_count = sum(weight * weight / _count(box) for box, weight in pairs)
    if len(pairs) == 1 and _count(pairs[0][0]) == math.prod(_sampled_dimensions(shape)):
        return Regions((), (), 0, inverse_count)
    flat = tuple(number for box, _ in pairs for number in box)
    draws = len(flat) // 4 if any(span != 1 for span in flat[1::4]) else 0
    return Regions(flat, tuple(weight for _, weight in pairs), draws, inverse_count)


_cached_regions = lru_cache(maxsize=4096)(_regions)


def _sampled_dimensions(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], *shape[2:])


def _count(box: tuple[int, ...]) -> int:
    return math.prod(box[2::4])


def _whole(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(number for size in sizes for number in (0, 1, size, 1))


@dataclass(frozen=True)
class FullBatch(Statistics):
    """All elements: ordinary batch normalization."""

    def boxes(self, shape, place):
        """Give one region: the whole tensor."""
        return ((_whole(_sampled_dimensions(shape)), 1.0),)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class _Sampling(Statistics):
    """What the sampled sources share.

    Args:
        fraction: the share of the elements that is sampled, in (0, 1].
        minimum: the least number of elements a channel; where the fraction gives fewer, more are taken, up to all.
            Measured (`experiments/minimum.py`): training fails at 16, and does not at 32.
        between_steps: add the variance of the sampled mean between steps, m (1 - m) (mean_S - running_mean)^2 with m
            the momentum, to the moving variance, which otherwise estimates the variance within a sample alone.
    """

    fraction: float
    _: KW_ONLY
    minimum: int = 64
    between_steps: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, float | int | Fraction) or not 0 < self.fraction <= 1:
            raise ValueError(f"{type(self).__name__}: fraction must lie in (0, 1], got {self.fraction!r}")
        object.__setattr__(self, "fraction", float(self.fraction))
        if not isinstance(self.minimum, int) or self.minimum < 1:
            raise ValueError(f"{type(self).__name__}: minimum must be a positive integer, got {self.minimum!r}")

    def _spell(self, name: str, *options: str) -> str:
        fraction = Fraction(self.fraction).limit_denominator(100_000)
        spelled = str(fraction) if float(fraction) == self.fraction else repr(self.fraction)
        if self.minimum != type(self).minimum:
            options += (f"minimum={self.minimum}",)
        if self.between_steps:
            options += ("between_steps",)
        return f"{name}:{spelled}" + ("@" + ",".join(options) if options else "")


@dataclass(frozen=True)
class NaiveSampling(_Sampling):
    """The first samples of the batch, the same ones in every layer and step: the baseline to beat (NS)."""

    def boxes(self, shape, place):
        """Give one region: the first samples."""
        sizes = _sampled_dimensions(shape)
        count = _samples(self, sizes)
        return (((0, 1, count, 1, *_whole(sizes[1:])), 1.0),)

    def __str__(self) -> str:
        return self._spell("ns")


@dataclass(frozen=True)
class BatchSampling(_Sampling):
    """Adjacent samples at a place along the batch that each layer draws anew in each step (BS)."""

    def boxes(self, shape, place):
        """Give one region: some adjacent samples."""
        sizes = _sampled_dimensions(shape)
        count = _samples(self, sizes)
        return (((0, sizes[0] - count + 1, count, 1, *_whole(sizes[1:])), 1.0),)

    def __str__(self) -> str:
        return self._spell("bs")


def _samples(source: _Sampling, sizes: Sequence[int]) -> int:
    per_sample = max(1, math.prod(sizes[1:]))
    return min(sizes[0], max(1, round(sizes[0] * source.fraction), math.ceil(source.minimum / per_sample)))


@dataclass(frozen=True)
class _SpatialSampling(_Sampling):
    """What patch and grid share: the same positions in every feature map of every sample.

    Args:
        position: "fixed" keeps each layer's place for the whole training; it is a pure function of ``seed``, the
            layer's name and the map's size. "step" draws a new place in each step.
        seed: moves all fixed places.
    """

    position: Literal["fixed", "step"] = "fixed"
    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position not in ("fixed", "step"):
            raise ValueError(f"{type(self).__name__}: position must be 'fixed' or 'step', got {self.position!r}")

    def _step(self, size: int, count: int) -> int:
        raise NotImplementedError

    def boxes(self, shape, place):
        """Give one region: a patch or a grid; along the samples where there is no spatial dimension."""
        sizes = _sampled_dimensions(shape)
        samples_alone = len(sizes) == 1  # of an (N, C) tensor
        sampled = sizes if samples_alone else sizes[1:]
        repeats = 1 if samples_alone else sizes[0]
        target = self.fraction * math.prod(sampled)
        if target * repeats < self.minimum:
            target = min(self.minimum / repeats, math.prod(sampled))
        box: tuple[int, ...] = () if samples_alone else (0, 1, repeats, 1)
        for d, (size, count) in enumerate(zip(sampled, _counts(sampled, target), strict=True)):
            step = self._step(size, count)
            count = min(count, (size - 1) // step + 1)
            span = size - (count - 1) * step
            start = 0
            if self.position == "fixed":
                start, span = _mix(self.seed, place, d, *sampled) % span, 1
            box += (start, span, count, step)
        return ((box, 1.0),)

    def _spell(self, name: str, *options: str) -> str:
        if self.position == "step":
            options = ("step", *options)
        if self.seed:
            options += (f"seed={self.seed}",)
        return super()._spell(name, *options)


@dataclass(frozen=True)
class FeatureSampling(_SpatialSampling):
    """A nearly square patch, at the same place in every feature map of every sample (FS)."""

    def _step(self, size: int, count: int) -> int:
        return 1

    def __str__(self) -> str:
        return self._spell("fs")


@dataclass(frozen=True)
class GridSampling(_SpatialSampling):
    """Every k-th row and column, the same ones in every feature map of every sample."""

    def _step(self, size: int, count: int) -> int:
        return round(size / count)

    def __str__(self) -> str:
        return self._spell("grid")


def _counts(sizes: Sequence[int], target: float) -> list[int]:
    """Spread about ``target`` elements over the dimensions, the same share of each."""
    counts = []
    for d, size in enumerate(sizes):
        share = (target / max(1, math.prod(sizes[d:]))) ** (1 / (len(sizes) - d))
        counts.append(min(size, max(1, round(size * share))))
        target = target / counts[-1]
    return counts


def _mix(*numbers: int) -> int:
    """Hash integers to 31 bits (splitmix64's finaliser), the same on every machine and in every process."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ number) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return state >> 33


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

    def boxes(self, shape, place):
        """Give one region: the virtual samples, which are the last of the batch."""
        sizes = _sampled_dimensions(shape)
        return (((sizes[0] - self.samples, 1, self.samples, 1, *_whole(sizes[1:])), 1.0),)

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

    def boxes(self, shape, place):
        """Give the regions of all sources; none but the virtual one sees the virtual samples."""
        real = (shape[0] - self.virtual, *shape[1:])
        return tuple(
            (box, weight * share)
            for source, weight in zip(self.sources, self.weights, strict=True)
            for box, share in source.boxes(shape if source.virtual else real, place)
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
