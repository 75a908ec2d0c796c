"""The correctness gate: no speed is reported of a side whose error is more than twice torch's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from leannorm.bench.results import Check, LayerCase

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from leannorm.bench.results import TrainingCase

FACTOR = 2.0


class RedGate(Exception):  # noqa: N818 - a verdict about results
    """Some side is less accurate than it may be, so nothing is timed."""

    def __init__(self, failures: Iterable[str]) -> None:
        super().__init__("\n".join(("the correctness gate is red, so nothing was timed:", *failures)))


def check(
    side: str,
    found: Sequence[Mapping[str, Tensor]],
    exact: Mapping[str, Tensor],
    torchs: Sequence[Mapping[str, Tensor]],
    torchs_exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[Check, ...]:
    r"""Compare a side's tensors with float64, as `FlashAttention`'s tests do.

    .. math:: limit = 2 error_{torch} + eps \max|exact| / \|exact\|

    The second term is one rounding of the largest element in the whole tensor: where torch happens to be exact, nobody
    else has to be. Of several trials the side's least error counts, and torch's largest: what is wrong is wrong every
    time, while a rounding that decides on the sign before some ReLU happens to one or the other.

    Args:
        side: the name of the side.
        found: its tensors by name, for each trial.
        exact: the same in float64, for the side's own statistics.
        torchs: torch's tensors, for each trial.
        torchs_exact: the same in float64, for torch's statistics.
        dtype: in which the sides compute.
    """
    checks = []
    for name, wanted in exact.items():
        error = min(_relative_errors(name, found, wanted), key=_nan_first)
        torch_error = max(_relative_errors(name, torchs, torchs_exact[name]))
        unit = torch.finfo(dtype).eps * wanted.abs().max() / wanted.norm()
        checks.append(Check(side, name, error, torch_error, FACTOR * torch_error + unit.item()))
    return tuple(checks)


def failures(where: str, checks: Iterable[Check]) -> list[str]:
    """Give a sentence for each check that is red; an error that is not a number is red."""
    return [
        f"{where}: {c.side}: {c.tensor} has the relative error {c.error:.2e}, torch {c.torch_error:.2e}; "
        f"allowed is {c.limit:.2e}"
        for c in checks
        if not c.error <= c.limit
    ]


def red(cases: Iterable[LayerCase | TrainingCase]) -> list[str]:
    """Give a sentence for each check of the cases that is red."""
    return [failure for case in cases for failure in failures(_name(case), case.checks)]


def _name(case: LayerCase | TrainingCase) -> str:
    if isinstance(case, LayerCase):
        return f"{case.operation} {case.shape} {case.layout} {case.dtype}"
    return case.model


def _relative_errors(name: str, trials: Sequence[Mapping[str, Tensor]], exact: Tensor) -> list[float]:
    return [((trial[name].double() - exact).norm() / exact.norm()).item() for trial in trials]


def _nan_first(error: float) -> float:
    return -math.inf if math.isnan(error) else error
