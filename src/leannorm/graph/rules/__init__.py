"""Rules that take batch normalization out of a graph, one file each: match, check, rewrite.

``match`` finds the pattern around a node, ``check`` says why the rewrite would be wrong there (the reason is data: it
ends in the report), ``rewrite`` changes the graph and says what it did. `ABSORBING` are tried in their order on every
batch normalization, the first without an objection is taken; then `parallel` on every addition; at last `table` takes
each batch normalization that is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from leannorm.graph.rules import following, preceding

if TYPE_CHECKING:
    from torch.fx import Node

    from leannorm.graph.absorption import Folding


class Rule(Protocol):
    """What every file of this folder defines."""

    def match(self, folding: Folding, node: Node) -> Any | None:
        """The pattern around this node, or None where it is not there."""
        ...

    def check(self, folding: Folding, found: Any) -> str | None:
        """Why the rewrite would be wrong here, or None."""
        ...

    def rewrite(self, folding: Folding, node: Node, found: Any) -> str:
        """Change the graph; returns what was done."""
        ...


ABSORBING: tuple[Rule, ...] = (preceding, following)
