"""Layers: state, mode and buffers; the arithmetic is in the operators."""

from leannorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
