"""Implementations of the operators; importing this package registers them with PyTorch's dispatcher."""

from leannorm.backends import aten, conv_batch_norm, cpu, triton

__all__ = ["aten", "conv_batch_norm", "cpu", "triton"]
