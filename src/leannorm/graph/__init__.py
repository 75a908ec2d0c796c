"""Rewrites of captured graphs: batch normalization folded into what surrounds it, channels without a say removed."""

from leannorm.graph.folding import fold
from leannorm.graph.pruning import prune
from leannorm.graph.zeros import sparsity

__all__ = ["fold", "prune", "sparsity"]
