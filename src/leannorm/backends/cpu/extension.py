"""The extension of native kernels: whether it is there, and what it is called with."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

kernels: Any = None
missing = ""
try:
    kernels = importlib.import_module("leannorm.backends.cpu._kernels")
except ImportError as error:
    missing = f"the extension leannorm.backends.cpu._kernels was not built or does not load ({error})"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = ("", "relu", "clamp", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh")  # as the kernels count them
_LEAST_KEPT = 1 << 20  # bytes; the C library itself keeps what is smaller
_keeps = kernels is not None and "LEANNORM_NO_CPU_MEMORY_CACHING" not in os.environ


def empty_like(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Give `torch.empty_like`, for large tensors in memory that is kept; see `leannorm.empty_cache`."""
    return torch.empty_like(x) if x.nbytes < _LEAST_KEPT else empty_strided(x.shape, strides, x.dtype)


def empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Give `torch.empty_strided`, for large tensors in memory that is kept."""
    if math.prod(shape) * dtype.itemsize >= _LEAST_KEPT and _keeps and dtype in DTYPES:
        with contextlib.suppress(MemoryError):  # torch's error says how much there was to be
            return from_dlpack(kernels.kept_tensor(DTYPES[dtype], shape, strides))
    return torch.empty_strided(shape, strides, dtype=dtype)


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Give an empty tensor whose channels come last in memory; see `empty_strided`."""
    strides, step = [0, 1], shape[1]
    for size in reversed(shape[2:]):
        strides.insert(2, step)
        step *= size
    strides[0] = step
    return empty_strided(shape, strides, dtype)


def empty_cache() -> None:
    """Return to the system the memory that the native CPU kernels keep for their next results.

    Results of 1 MiB and more lie in memory that is kept when they die, as PyTorch keeps it on a GPU; a result takes a
    kept block of at most 1.25 times its size. What is kept and not in use is at most 1.5 times what was ever in use
    at once, less what is in use. ``LEANNORM_NO_CPU_MEMORY_CACHING=1`` in the environment leaves all memory to PyTorch
    (it is read at import), for instance where activations are resized in place, which is refused on kept memory.

    >>> empty_cache()
    """
    if kernels is not None:
        kernels.release()


def addresses(*tensors: Tensor | None) -> list[int]:
    """Give where tensors begin, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def per_channel(tensor: Tensor | None) -> Tensor | None:
    """Give a tensor as the kernels read it: dense, in float32."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


@lru_cache(maxsize=256)
def activation_code(kind: str, parameters: tuple[float, ...]) -> tuple[int, float, float]:
    """Give an activation as the kernels take it."""
    first, second = (*parameters, 0.0, 0.0)[:2]
    return _KINDS.index(kind), first, second
