"""Implementations of the operators; importing this package registers them with PyTorch's dispatcher."""

from leannorm.backends import aten, cpu, triton

__all__ = ["aten", "cpu", "triton"]
