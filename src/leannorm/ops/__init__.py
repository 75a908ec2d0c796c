"""The contract between layers and back ends: operator schemas, fake kernels, autograd."""

from leannorm.ops import autograd, contract, conv_batch_norm

__all__ = ["autograd", "contract", "conv_batch_norm"]
