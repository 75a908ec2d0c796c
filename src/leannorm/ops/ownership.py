"""Whether backward may write over the gradient that it is given: where nobody but autograd holds it, as autograd itself
does where it adds gradients up."""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

# PyTorch names neither of these publicly. Without one of them no gradient is written over.
_known = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")

Holders = tuple[int, int, int]


def holders(gradient: Tensor) -> Holders | None:
    """Count who holds the Python object, the tensor and its memory, from within a backward function; None where this
    cannot be told."""
    if not _known or type(gradient) is not Tensor or torch.compiler.is_compiling():
        return None
    if not torch._C._has_storage(gradient):
        return None
    memory = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    tensor = gradient._use_count()  # pyright: ignore[reportAttributeAccessIssue]
    return sys.getrefcount(gradient), tensor, memory


def is_autograd_alone(counted: Holders | None) -> bool:
    """Whether `holders` counted autograd alone, whose own references depend on the versions of Python and PyTorch."""
    return counted is not None and counted == _autograd_alone()


@cache
def _autograd_alone() -> Holders | None:
    """Count the holders of a gradient that is autograd's alone; None where they are as many as those of others."""
    held: list[object] = []
    alone = _count(lambda y: None)
    shared = (
        _count(lambda y: y.register_hook(held.append)),
        _count(lambda y: y.register_hook(lambda gradient: held.append(gradient.detach()))),
        _count(lambda y: y.grad_fn.register_hook(lambda *_: None)),
    )
    return None if alone in shared else alone


def _count(watch) -> Holders | None:
    found: list[Holders | None] = []
    with torch.enable_grad():
        x = torch.ones(1, device="cpu", requires_grad=True)
        y = _Counting.apply(x, found)
        watch(y)
        torch.autograd.grad(y * 2, x)
    return found[0]


class _Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, found):
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.found.append(holders(dy))
        return dy, None
