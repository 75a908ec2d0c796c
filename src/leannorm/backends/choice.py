"""Whose code computes an operator on an input."""

from __future__ import annotations

from torch import Tensor

from leannorm.backends import cpu, triton


def takes(x: Tensor) -> bool:
    """Say whether kernels of ours take a call on this input; `serving` gives the reason where they do not."""
    return cpu.takes(x) if x.is_cpu else triton.why_not(x) is None


def serving(x: Tensor, operator: str = "batch_norm") -> tuple[str, str | None]:
    """Say whose code computes an operator on x: its name, and why it is not a kernel of ours (None: it is one)."""
    if x.device.type == "cuda":
        name, reason = "Triton kernels", triton.why_not(x)
    elif x.device.type != "cpu":
        name, reason = "", f"there are kernels for the CPU and for NVIDIA GPUs, the input is on {x.device}"
    elif operator not in ("batch_norm", "normalize"):
        name, reason = "", f"the native kernels compute batch_norm and normalize, not {operator}"
    else:
        name, reason = "native CPU kernels", cpu.why_not(x)
    return ("ATen", reason) if reason is not None else (name, None)
