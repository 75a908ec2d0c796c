"""The correctness gate: no speed is reported of a side whose error is more than twice torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from leannorm.bench.results import Check

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

FACTOR = 2.0


class RedGate(Exception):  # noqa: N818 - a verdict about results
    """Some side is less accurate than it may be, so nothing is timed."""

    def __init__(self, failures: Iterable[str]) -> None:
        super().__init__("\n".join(("the correctness gate is red, so nothing was timed:", *failures)))


def check(
    side: str,
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    torchs_exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[Check, ...]:
    r"""Compare a side's tensors with float64, as `FlashAttention`'s tests do.

    .. math:: limit = 2 error_{torch} + eps \max|exact| / \|exact\|

    The second term is one rounding of the largest element in the whole tensor: where torch happens to be exact, nobody
    else has to be.

    Args:
        side: the name of the side.
        found: its tensors, by name.
        exact: the same in float64, for the side's own statistics.
        torchs: torch's tensors.
        torchs_exact: the same in float64, for torch's statistics.
        dtype: in which the sides compute.
    """
    checks = []
    for name, tensor in found.items():
        torch_error = _relative_error(torchs[name], torchs_exact[name])
        unit = torch.finfo(dtype).eps * exact[name].abs().max() / exact[name].norm()
        limit = FACTOR * torch_error + unit.item()
        checks.append(Check(side, name, _relative_error(tensor, exact[name]), torch_error, limit))
    return tuple(checks)


def failures(where: str, checks: Iterable[Check]) -> list[str]:
    """Give a sentence for each check that is red; an error that is not a number is red."""
    return [
        f"{where}: {c.side}: {c.tensor} has the relative error {c.error:.2e}, torch {c.torch_error:.2e}; "
        f"allowed is {c.limit:.2e}"
        for c in checks
        if not c.error <= c.limit
    ]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()
