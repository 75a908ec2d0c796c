"""Rewrites of captured graphs: batch normalization folded into what surrounds it."""

from leannorm.graph.fold import fold

__all__ = ["fold"]
