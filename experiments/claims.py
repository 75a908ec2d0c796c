"""What others have found, held against our runs one claim at a time."""

import math
from dataclasses import dataclass

from comparison import CONFIDENCE, Paired, paired_over_seeds
from trials import Trial, accuracies


@dataclass(frozen=True)
class Claim:
    """That an arm's accuracy differs from another's by ``low`` to ``high`` (1 is all validation images).

    Args:
        text: the claim in words.
        arm: name of the arm that it is about.
        against: name of the arm that it is compared with.
        low: the least difference that agrees.
        high: the largest difference that agrees.
        note: what a second look at a disagreement has found; written after the runs.
    """

    text: str
    arm: str
    against: str
    low: float = 0.0
    high: float = math.inf
    note: str = ""

    def verdict(self, difference: Paired) -> str:
        """Say "agrees" or "disagrees" where the whole interval does, else that the seeds do not resolve it."""
        lowest, highest = difference.mean - difference.half_width, difference.mean + difference.half_width
        if self.low <= lowest and highest <= self.high:
            return "agrees"
        if highest < self.low or lowest > self.high:
            return "disagrees"
        return "not resolved"


def table(claims: tuple[Claim, ...], found: list[Trial]) -> str:
    """Give the claims in Markdown; "" where there are none."""
    if not claims:
        return ""
    lines = [
        f"| claim | says | difference in points, {CONFIDENCE:.0%} interval | seeds | these runs | |",
        "|---|---|---|---|---|---|",
    ]
    for claim in claims:
        bounds = f"{100 * claim.low:+g} to {100 * claim.high:+g}"
        says = f"at least {100 * claim.low:+g}" if math.isinf(claim.high) else bounds
        difference = paired_over_seeds(accuracies(claim.arm, found), accuracies(claim.against, found))
        if difference is None:
            cells = ["", "0", "not run"]
        else:
            half = "one seed" if difference.seeds == 1 else f"± {100 * difference.half_width:.2f}"
            cells = [f"{100 * difference.mean:+.2f} {half}", str(difference.seeds), claim.verdict(difference)]
        lines.append(
            f"| {claim.text}: {claim.arm} against {claim.against} | {says} | {' | '.join(cells)} | {claim.note} |"
        )
    return "\n".join(lines)
