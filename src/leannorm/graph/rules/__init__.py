"""Rules that remove batch normalization from a graph, one file each: match, check, rewrite.

A rule sees one call of batch normalization at a time. ``match`` finds the pattern around it, ``check`` says
why the rewrite would be wrong there (the reason is data: it ends in the report), ``rewrite`` changes the
graph and says what it did. The first rule that matches and has no objection is taken, in the order of
``RULES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from leannorm.graph.rules import conv_batch_norm, linear_batch_norm

if TYPE_CHECKING:
    from leannorm.graph.batch_norm import BatchNorm
    from leannorm.graph.capture import Capture


class Rule(Protocol):
    """What every file of this folder defines."""

    def match(self, capture: Capture, norm: BatchNorm) -> Any | None:
        """The pattern around this call, or None where it is not there."""
        ...

    def check(self, capture: Capture, norm: BatchNorm, found: Any) -> str | None:
        """Why the rewrite would be wrong here, or None."""
        ...

    def rewrite(self, capture: Capture, norm: BatchNorm, found: Any) -> str:
        """Change the graph; returns what was done."""
        ...


RULES: tuple[Rule, ...] = (conv_batch_norm, linear_batch_norm)
