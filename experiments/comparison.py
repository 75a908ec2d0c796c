"""Paired differences over seeds: their interval, what it resolves, and how many seeds would resolve more."""

import math
import statistics
from dataclasses import dataclass

from scipy.stats import t

CONFIDENCE = 0.95
RESOLUTION = 0.005  # half a point: the difference that the experiments are to resolve


@dataclass(frozen=True)
class Paired:
    """The mean difference over seeds, and half the width of its 95% interval (infinite with one seed)."""

    mean: float
    half_width: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Say "above" or "below" where the interval leaves 0 out, else that the seeds do not resolve it.

        "identical" is for trainings that gave the same in every seed, to the last digit.
        """
        if self.mean == self.half_width == 0:
            return "identical"
        if abs(self.mean) <= self.half_width:
            return "not resolved"
        return "above" if self.mean > 0 else "below"


def paired(differences: list[float]) -> Paired:
    """Compare two arms by their differences, one a seed (Student's t).

    >>> paired([0.01, 0.02, 0.03]).verdict
    'not resolved'
    """
    mean, seeds = statistics.fmean(differences), len(differences)
    if seeds < 2:
        return Paired(mean, math.inf, seeds)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1))
    return Paired(mean, quantile * statistics.stdev(differences) / math.sqrt(seeds), seeds)


def paired_over_seeds(mine: dict[int, float], others: dict[int, float]) -> Paired | None:
    """Compare two arms by their accuracies, one a seed, over the seeds that both have; None where they share none.

    >>> paired_over_seeds({0: 0.75, 1: 0.5}, {0: 0.5, 2: 0.5}).mean
    0.25
    """
    shared = sorted(mine.keys() & others.keys())
    return paired([mine[seed] - others[seed] for seed in shared]) if shared else None


def seeds_needed(differences: list[float], most: int, resolution: float = RESOLUTION) -> int:
    """Give the least number of seeds whose interval is at most ``resolution`` to each side at this spread; or ``most``.

    >>> seeds_needed([0.010, 0.011], 10)
    3
    """
    spread = statistics.stdev(differences)
    for seeds in range(len(differences), most):
        if float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * spread / math.sqrt(seeds) <= resolution:
            return seeds
    return most
