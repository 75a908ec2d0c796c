"""Operators called by their kernels where nothing watches: the dispatcher costs more than a small layer's kernel."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from leannorm.ops.contract import library

_PLAIN = (Tensor, torch.nn.Parameter)
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}

# PyTorch names none of these publicly. Without one of them every call goes through the dispatcher.
_WATCHERS = ("_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_get_tracing_state")
_watchers: list[Callable[[], Any]] = [getattr(torch._C, name) for name in _WATCHERS if hasattr(torch._C, name)]
_known = (
    len(_watchers) == len(_WATCHERS)
    and hasattr(forward_ad, "_current_level")  # that of forward-mode differentiation; -1 is none
    and hasattr(torch._C, "_has_storage")
)


def register(name: str, function: Callable[..., Any], device: str) -> None:
    """Make ``function`` the kernel of an operator of `leannorm.ops.contract` for a type of device."""
    library.impl(name, function, device.upper())
    provide(name, function, device)


def provide(name: str, function: Callable[..., Any], device: str) -> None:
    """Make ``function`` a kernel that eager mode alone calls: a variant of an operator, by a name of its own."""
    _kernels[name, device] = function


def differentiable(name: str, setup_context: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that takes an operator's inputs and then its kernel, and has this derivative.

    What `torch.library.register_autograd` makes of the same two functions is slower. ``name`` is the one in profiles.
    """

    def forward(ctx, *inputs_and_kernel):
        *inputs, kernel = inputs_and_kernel
        output = kernel(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def with_kernel(ctx, *gradients):
        return *backward(ctx, *gradients), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(with_kernel)}
    function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda body: body.update(members))
    return function.apply


def kernel(name: str, x: Tensor, dy: Tensor | None = None) -> Callable[..., Any] | None:
    """Give the kernel of an operator for x, an ordinary tensor that is not traced, compiled, transformed or seen by a
    dispatch mode; None where the call must go through the dispatcher, also since the gradient is a batch of gradients.
    """
    if not _known or type(x) not in _PLAIN or torch.compiler.is_compiling():
        return None
    for watches in _watchers:
        if watches():
            return None
    if forward_ad._current_level >= 0 or (dy is not None and not torch._C._has_storage(dy)):
        return None
    return _kernels.get((name, x.device.type))
