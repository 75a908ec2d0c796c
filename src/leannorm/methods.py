"""Methods of normalization: frozen values that say how a BN layer normalizes, where that is more than a choice of the
elements that tell mean and variance (`leannorm.statistics`). Each is a target of `leannorm.convert`; its layer, with
formula and source, is in `leannorm.nn`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Method:
    """A way to normalize.

    ``name`` spells it. A field that can be given by position follows the name (``ghost:32``); the others follow where
    they are not as by default.

    >>> str(GhostBatch(16)), str(BatchRenormalization(3, d_max=4)), str(LayerNormalization())
    ('ghost:16', 'renorm:3@d_max=4', 'ln')
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Refuse fields of another type than they say, and numbers that are negative or not finite."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = field.type == "float" and isinstance(value, int) and not isinstance(value, bool)
            if type(value).__name__ != field.type and not number:
                self._refuse(field.name, f"of type {field.type}")
            if not (math.isfinite(value) and value >= 0):
                self._refuse(field.name, "finite and not negative")
            if number:
                object.__setattr__(self, field.name, float(value))

    def _refuse(self, name: str, what: str) -> None:
        raise ValueError(f"{type(self).__name__}: {name} must be {what}, got {getattr(self, name)!r}")

    def _at_least(self, **least: float) -> None:
        for name, value in least.items():
            if getattr(self, name) < value:
                self._refuse(name, f"at least {value:g}")

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        amount = "".join(f":{_number(getattr(self, f.name))}" for f in fields if not f.kw_only)
        options = [(f.name, getattr(self, f.name)) for f in fields if f.kw_only and getattr(self, f.name) != f.default]
        return f"{self.name}{amount}" + ("@" + ",".join(f"{n}={_number(v)}" for n, v in options) if options else "")


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


@dataclass(frozen=True)
class GroupNormalization(Method):
    """`torch.nn.GroupNorm` with gcd(groups, C) groups of channels."""

    groups: int = 32
    name: ClassVar[str] = "gn"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(groups=1)


@dataclass(frozen=True)
class InstanceNormalization(Method):
    """`torch.nn.InstanceNorm1d`, 2d or 3d: each channel of each sample by itself."""

    name: ClassVar[str] = "in"


@dataclass(frozen=True)
class LayerNormalization(Method):
    """All channels and positions of a sample together: `torch.nn.GroupNorm` with one group."""

    name: ClassVar[str] = "ln"


@dataclass(frozen=True)
class BatchRenormalization(Method):
    """Batch statistics, corrected towards the running ones by a scale r and a shift d (arXiv 1702.03275).

    Args:
        r_max: r is kept in [1 / r_max, r_max] at the end of the schedule.
        d_max: d is kept in [-d_max, d_max] at the end of the schedule.
        start: steps of plain BN, r = 1 and d = 0.
        r_end: step at which the limit of r, which grows linearly from ``start`` on, has come to ``r_max``.
        d_end: the same for d.
    """

    r_max: float = 3.0
    _: KW_ONLY
    d_max: float = 5.0
    start: int = 5000
    r_end: int = 40000
    d_end: int = 25000
    name: ClassVar[str] = "renorm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(r_max=1, r_end=self.start, d_end=self.start)


@dataclass(frozen=True)
class MovingAverageNormalization(Method):
    """Second moments, and the statistic of the backward pass, averaged over the last batches (MABN, ICLR 2020).

    Args:
        batches: over how many.
        warmup: steps of statistics of each batch alone; never fewer than ``batches``.
        r_max: the correction towards the exponential average is kept in [1 / r_max, r_max].
        r_start: steps without that correction.
    """

    batches: int = 16
    _: KW_ONLY
    warmup: int = 100
    r_max: float = 5.0
    r_start: int = 1000
    name: ClassVar[str] = "mabn"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(batches=1, r_max=1)


@dataclass(frozen=True)
class GhostBatch(Method):
    """Statistics of each chunk of at most so many samples by itself (ghost BN, arXiv 1705.08741)."""

    samples: int = 32
    name: ClassVar[str] = "ghost"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(samples=1)


@dataclass(frozen=True)
class AccumulatedBatch(Method):
    """Moments pooled over the micro-batches of one optimiser step, of which there are ``steps``."""

    steps: int
    name: ClassVar[str] = "accumulated"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(steps=1)


@dataclass(frozen=True)
class AdaptiveMomentum(Method):
    """BN whose running statistics move by a momentum in (0.1, 1) that the input's content tells.

    Args:
        learning_rate: of the momentum's estimator; 0 leaves it as it is.
    """

    _: KW_ONLY
    learning_rate: float = 0.01
    name: ClassVar[str] = "adaptive"


@dataclass(frozen=True)
class DiminishingAverage(Method):
    """Statistics that are a moving average with the weight 1 / t^exponent in step t (arXiv 1705.08011); 0 is BN."""

    exponent: float = 1.0
    name: ClassVar[str] = "diminishing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponent > 1:
            self._refuse("exponent", "at most 1: weights that fall faster than 1 / t never forget the first batches")


@dataclass(frozen=True)
class L1Deviation(Method):
    """The mean absolute deviation times sqrt(pi / 2) in place of the standard deviation (arXiv 1802.09769)."""

    name: ClassVar[str] = "l1"


@dataclass(frozen=True)
class RangeDeviation(Method):
    """The range of the values over sqrt(2 ln n), averaged over chunks, in place of the standard deviation (range BN).

    Args:
        chunks: gcd(chunks, n) chunks of equal size are taken of the n elements a channel, all as one where each would
            hold a single element.
    """

    chunks: int = 16
    name: ClassVar[str] = "range"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(chunks=1)


@dataclass(frozen=True)
class EnhancedTransform(Method):
    """A depth-wise convolution in place of gamma and beta (BNET, arXiv 2011.14150).

    Args:
        kernel: its size, 3, 5 or 7.
    """

    kernel: int = 3
    name: ClassVar[str] = "bnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel not in (3, 5, 7):
            self._refuse("kernel", "3, 5 or 7")


@dataclass(frozen=True)
class MixtureNormalization(Method):
    """Soft assignment of each position to the components of a Gaussian mixture (arXiv 1806.02892)."""

    components: int = 2
    name: ClassVar[str] = "mixture"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(components=1)


@dataclass(frozen=True)
class EightBitNormalization(Method):
    """BN in fixed-point numbers (WAGEUBN, arXiv 1909.02384).

    Args:
        bits: of gamma, beta and the normalized values.
        statistics_bits: of mean and standard deviation.
        gradient_bits: of the gradients of gamma and beta.
    """

    bits: int = 8
    _: KW_ONLY
    statistics_bits: int = 16
    gradient_bits: int = 15
    name: ClassVar[str] = "wageubn"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(bits=2, statistics_bits=2, gradient_bits=2)


@dataclass(frozen=True)
class MaskedSequences(Method):
    """Statistics of the valid positions of padded sequences, (N, C, L) with a length for each sample."""

    name: ClassVar[str] = "masked"


@dataclass(frozen=True)
class NoNormalization(Method):
    """Scale and shift alone: what a network is without normalization."""

    name: ClassVar[str] = "none"


METHODS: dict[str, type[Method]] = {method.name: method for method in Method.__subclasses__()}
