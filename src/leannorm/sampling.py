"""Sources that sample some of the elements: whole samples of the batch, or places in the maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Literal

from leannorm.statistics import Statistics, sampled_dimensions, whole


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

    def boxes(self, shape, place, by_rows=False):
        """Give one region: the first samples."""
        sizes = sampled_dimensions(shape)
        count = _samples(self, sizes)
        return (((0, 1, count, 1, *whole(sizes[1:])), 1.0),)

    def __str__(self) -> str:
        return self._spell("ns")


@dataclass(frozen=True)
class BatchSampling(_Sampling):
    """Adjacent samples at a place along the batch that each layer draws anew in each step (BS)."""

    def boxes(self, shape, place, by_rows=False):
        """Give one region: some adjacent samples."""
        sizes = sampled_dimensions(shape)
        count = _samples(self, sizes)
        return (((0, sizes[0] - count + 1, count, 1, *whole(sizes[1:])), 1.0),)

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

    def _taken(self, size: int, count: int) -> tuple[int, int]:
        """Give how many places a dimension has at the step that ``count`` of them ask for, and that step."""
        step = self._step(size, count)
        return min(count, (size - 1) // step + 1), step

    def _counts(self, sizes: Sequence[int], target: float, by_rows: bool) -> list[int]:
        return _spread(sizes, target)

    def boxes(self, shape, place, by_rows=False):
        """Give one region: a patch or a grid; along the samples where there is no spatial dimension."""
        sizes = sampled_dimensions(shape)
        samples_alone = len(sizes) == 1  # of an (N, C) tensor
        sampled = sizes if samples_alone else sizes[1:]
        repeats = 1 if samples_alone else sizes[0]
        target = self.fraction * math.prod(sampled)
        if target * repeats < self.minimum:
            target = min(self.minimum / repeats, math.prod(sampled))
        least = min(self.minimum, repeats * math.prod(sampled))
        counts = self._counts(sampled, target, by_rows)
        taken = [self._taken(size, count) for size, count in zip(sampled, counts, strict=True)]
        while repeats * math.prod([count for count, _ in taken]) < least:  # counts are rounded, down too
            shares = [count / size for (count, _), size in zip(taken, sampled, strict=True)]
            d = shares.index(min(shares))
            counts[d] += 1
            taken[d] = self._taken(sampled[d], counts[d])
        box: tuple[int, ...] = () if samples_alone else (0, 1, repeats, 1)
        for d, (size, (count, step)) in enumerate(zip(sampled, taken, strict=True)):
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
    """Every k-th row and column, the same ones in every feature map of every sample.

    Of a contiguous tensor whole rows, where two or more are asked for: a cache line holds neighbours of a row.
    """

    def _step(self, size: int, count: int) -> int:
        return round(size / count)

    def _counts(self, sizes: Sequence[int], target: float, by_rows: bool) -> list[int]:
        rows = target / sizes[-1]
        if not by_rows or len(sizes) == 1 or round(rows) < 2:
            return _spread(sizes, target)
        return [*_spread(sizes[:-1], rows), sizes[-1]]

    def __str__(self) -> str:
        return self._spell("grid")


DEFAULT_SOURCE = GridSampling(1 / 8)  # docs/default-source.md says why


def _spread(sizes: Sequence[int], target: float) -> list[int]:
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
