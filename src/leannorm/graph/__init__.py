"""Rewrites of captured graphs: batch normalization folded into what surrounds it."""

from leannorm.graph.folding import fold

__all__ = ["fold"]
