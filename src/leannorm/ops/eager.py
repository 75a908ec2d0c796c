"""Operators called by their kernels where nothing watches: the dispatcher costs more than a small layer's kernel."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from leannorm.ops.contract import library
from leannorm.ops.ownership import Holders, holders, is_autograd_alone

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


def differentiable(
    name: str, setup_context: Callable[..., Any], backward: Callable[..., Any], tensors: int
) -> Callable[..., tuple[Tensor, ...]]:
    """Give an operator its derivative with respect to its first ``tensors`` inputs, of its first output.

    ``backward`` is called with ctx, the gradient, which inputs need theirs, and who holds the gradient: `kernel_over`.

    Returns:
        a function of a kernel and the operator's inputs that gives what the kernel gives, with that derivative: what
        eager mode calls, since what `torch.library.register_autograd` makes of the same two functions costs more.
    """
    others = len(getattr(torch.ops.leannorm, name).default._schema.arguments) - tensors

    def setup(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        setup_context(ctx, inputs, outputs)

    def backward_of_all(ctx, dy, *_):
        gradients = (None,) * tensors if dy is None else backward(ctx, dy, ctx.needs_input_grad[:tensors], None)
        return *gradients, *(None,) * others

    torch.library.register_autograd(f"leannorm::{name}", backward_of_all, setup_context=setup, lib=library)

    def forward_eagerly(ctx, kernel, others, constants, *inputs):
        output = kernel(*inputs, *others)
        outputs = output if isinstance(output, tuple) else (output,)
        setup_context(ctx, (*inputs, *others), outputs)
        constants += outputs[1:]
        return outputs[0]

    def backward_eagerly(ctx, dy):
        if dy is None:
            return (None,) * (3 + tensors)
        held = holders(dy)  # before dy is an argument, which holds it once more
        return None, None, None, *backward(ctx, dy, ctx.needs_input_grad[3:], held)

    members = {"forward": staticmethod(forward_eagerly), "backward": staticmethod(backward_eagerly)}
    title = name.title().replace("_", "")  # the one in profiles
    base: Any = torch.autograd.Function
    function: Any = types.new_class(title, (base,), exec_body=lambda body: body.update(members))
    # Function.apply asks for transforms, as `kernel` does before, and unwraps tensors that have left one.
    apply_to_plain = super(base, function).apply

    def call(kernel, *inputs):
        constants: list[Tensor] = []
        apply = apply_to_plain
        for x in inputs[:tensors]:
            if x is not None and not torch._C._has_storage(x):
                apply = function.apply
        return apply(kernel, inputs[tensors:], constants, *inputs[:tensors]), *constants

    return call


def is_transforming() -> bool:
    """Whether a transform of `torch.func` is at work, as far as PyTorch tells."""
    return not _known or torch._C._are_functorch_transforms_active()


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
    return _kernels.get((name, "cpu" if x.is_cpu else x.device.type))  # to ask for the device is slow


def kernel_over(name: str, x: Tensor, dy: Tensor, held: Holders | None) -> Callable[..., Any] | None:
    """Give the kernel of a backward operator as `kernel` does, where there is one and ``held`` allows it the variant
    that may leave dx in the memory of dy."""
    found = kernel(name, x, dy)
    if found is None or not is_autograd_alone(held):
        return found
    return kernel(f"{name}_in_place", x, dy) or found
