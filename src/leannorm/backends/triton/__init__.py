"""GPU kernels of all operators, in Triton; whatever they do not take goes to the ATen back end, call by call.

Nothing here imports Triton before the first call that needs it, so that the package loads where there is none.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leannorm.backends import aten
from leannorm.backends.memory import PLAIN, is_channels_last
from leannorm.ops import eager

if TYPE_CHECKING:
    from collections.abc import Callable

installed = importlib.util.find_spec("triton") is not None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INPUT = {  # which argument is x
    "batch_norm": 0,
    "batch_norm_backward": 1,
    "moments": 0,
    "normalize": 0,
    "backward_reduce": 1,
    "backward_apply": 1,
    "backward_fused": 1,
    "correct": 1,
}


def why_not(x: Tensor) -> str | None:
    """Give the reason why the Triton kernels do not take a call on this input, or None where they do."""
    if not installed:
        return "Triton is not installed: pip install 'leannorm[gpu]'"
    if type(x) not in PLAIN:
        return f"the Triton kernels read memory, which a {type(x).__name__} may not have"
    if x.dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, the input is {x.dtype}"
    if x.numel() == 0:
        return "the input is empty"
    if x.ndim > 5:
        return f"the Triton kernels take at most three spatial dimensions, the input has {x.ndim - 2}"
    if is_channels_last(x) is None and is_channels_last(torch.empty_like(x, device="meta")) is None:
        return f"the input's memory order is neither contiguous nor channels-last, its strides are {x.stride()}"
    if x.device.type != "cuda":
        return f"the Triton kernels are for GPUs, the input is on {x.device}"
    return _why_not_device(x.device)


@lru_cache
def _why_not_device(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, this PyTorch is for AMD's"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"Triton needs a GPU of compute capability 8.0 or later, {device} has {major}.{minor}"
    return None


def _operator(name: str, position: int) -> Callable:
    def operator(*args):
        x = args[position]
        if why_not(x) is not None:
            return aten.kernels[name](*args)
        return _launched(name, x, args)

    return operator


def _launched(name: str, x: Tensor, args: tuple) -> Any:
    from leannorm.backends.triton import launchers

    launcher = getattr(launchers, name)
    if x.device.index == torch.cuda.current_device():
        return launcher(*args)
    with torch.cuda.device(x.device):
        return launcher(*args)


def _track(running_mean, *args) -> bool:
    if _why_not_device(running_mean.device) is not None:
        return False
    return _launched("track", running_mean, (running_mean, *args))


if installed:
    eager.provide("track", _track, "cuda")
    for _name, _position in _INPUT.items():
        eager.register(_name, _operator(_name, _position), "cuda")
