"""The contract between layers and back ends: operator schemas, fake kernels, autograd."""

from leannorm.ops import autograd, contract

__all__ = ["autograd", "contract"]
