"""Implementations of the operators; importing this package registers them with PyTorch's dispatcher."""

from __future__ import annotations

from leannorm.backends import aten, conv_batch_norm, cpu, triton
from leannorm.backends.choice import serving, takes
from leannorm.backends.cpu.concatenated import takes as takes_concatenation
from leannorm.backends.cpu.convolution import pays as convolution_pays
from leannorm.backends.cpu.extension import empty_cache
from leannorm.backends.cpu.preactivated import takes as takes_preactivated

__all__ = [
    "aten",
    "conv_batch_norm",
    "convolution_pays",
    "cpu",
    "empty_cache",
    "serving",
    "takes",
    "takes_concatenation",
    "takes_preactivated",
    "triton",
]
